"""The files weights lie in: which they are, what is in each, and what is wrong with those that are not whole. No torch here.

A safetensors file is eight bytes that say how long its header is, the header (JSON: name, type, shape and place of each tensor), and the
tensors end to end. So a file that was cut short, mixed up or is missing is told from its first bytes, before anything is loaded.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sparklab.errors import ModelError

SINGLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
LONGEST_HEADER: Final = 100_000_000  # the format's own limit
ITEM_BYTES: Final = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4,
                     "F32": 4, "I64": 8, "U64": 8, "F64": 8}  # fmt: skip
AGAIN: Final = "copy or download it again (`hf download` goes on where it stopped and checks what it has)"


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file: ``dtype`` in the format's words (``"BF16"``), bytes from ``begin`` to ``end`` counted from the file's start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def weight_files(folder: Path) -> list[Path]:
    """The files of a model directory's weights, in the order of their names. Raises :class:`ModelError` where there are none or some are missing."""
    if (folder / INDEX).is_file():
        names = sorted(set(_index(folder).values()))
        strange = [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]
        if strange:
            raise ModelError(f"{folder / INDEX} names {strange[0]!r}, which is no safetensors file beside it", "use the index that came with the weights")
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ModelError(
                f"{folder} lacks {len(missing)} of its {len(names)} weight files: {', '.join(missing[:5])}", AGAIN.replace("it again", "them again")
            )
        return [folder / name for name in names]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
    shards = sorted(file.name for file in folder.glob("*.safetensors"))
    if pickled and not shards:
        raise ModelError(f"the weights in {folder} are a pickle ({pickled[0]}), which can run any code and is never loaded",
                         "use a copy in safetensors; most models on the hub have one")  # fmt: skip
    beside = f"; it has {', '.join(shards[:3])}, but no {INDEX} that says what is where" if shards else ""
    raise ModelError(f"{folder} has no {SINGLE}{beside}", "save the model there with save_pretrained, or download it again")


def read_headers(folder: Path) -> dict[Path, tuple[StoredTensor, ...]]:
    """Every weight file with its tensors, in the order they lie in it.

    Raises :class:`ModelError` that names every file that is cut short, damaged or missing, and every tensor that the index promises and no
    file has.
    """
    files = weight_files(folder)
    found: dict[Path, tuple[StoredTensor, ...]] = {}
    faults = []
    for path in files:
        try:
            found[path] = tuple(_header(path))
        except _Damaged as damage:
            faults.append(f"{path.name} {damage}")
    if not faults and (folder / INDEX).is_file():
        there = {(tensor.name, path.name) for path, tensors in found.items() for tensor in tensors}
        lost = sorted(name for name, file in _index(folder).items() if (name, file) not in there)
        if lost:
            faults.append(f"{len(lost)} tensors are not in the file that {INDEX} says, the first {lost[0]!r}")
    if faults:
        raise ModelError(f"the weights in {folder} cannot be read: {'; '.join(faults)}", AGAIN)
    return found


class _Damaged(Exception):
    """What is wrong with one file."""


def _header(path: Path) -> Iterator[StoredTensor]:
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, LONGEST_HEADER):
                raise _Damaged(f"is no whole safetensors file ({size:,} bytes, a header of {length:,} announced)")
            header = json.loads(file.read(length))
    except OSError as error:
        raise _Damaged(f"cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError):
        raise _Damaged("has a damaged header") from None
    if not isinstance(header, dict):
        raise _Damaged("has a damaged header")
    header.pop("__metadata__", None)
    tensors = sorted((_stored(name, entry, 8 + length) for name, entry in header.items()), key=lambda tensor: (tensor.begin, tensor.end))
    place = 8 + length
    for tensor in tensors:
        if tensor.begin != place:
            raise _Damaged(f"has a damaged header: {tensor.name!r} does not begin where the one before it ends")
        place = tensor.end
    if place != size:
        short = f"is cut short: {size:,} of {place:,} bytes are there" if size < place else f"has {size - place:,} bytes too many"
        raise _Damaged(short)
    yield from tensors


def _stored(name: str, entry: Any, start: int) -> StoredTensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        whole = all(isinstance(size, int) and size >= 0 for size in (*shape, begin, end))
        if not whole or end - begin != math.prod(shape) * ITEM_BYTES[dtype]:
            raise ValueError(name)
    except (KeyError, TypeError, ValueError):
        raise _Damaged(f"has a damaged header: the entry of {name!r} is none") from None
    return StoredTensor(name, dtype, shape, start + begin, start + end)


def _index(folder: Path) -> dict[str, str]:
    """Tensor to file, as the index says."""
    try:
        places = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        return {os.fspath(name): os.fspath(file) for name, file in places.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ModelError(f"{folder / INDEX} is damaged", AGAIN) from None
