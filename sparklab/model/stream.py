"""Weights that come once: read tensor by tensor, moved or quantised at once, and the page cache dropped behind.

transformers puts the model together; it is handed tensors that are read when it takes them. So renaming, the stacking of experts, tied
weights and NF4 are the library's own, and what is held beyond the model itself is one source tensor at a time (of a mixture, one layer's
experts), on the host never more than a buffer where a GPU computes. Nothing is mapped: a mapped file's pages count twice in one pool, once
as page cache and once as the tensor made of them.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from sparklab.errors import ModelError
from sparklab.model.shards import AGAIN, StoredTensor, read_headers
from sparklab.units import MIB, format_bytes

BLOCK_BYTES: Final = 32 * MIB  # read at a time; what lies in the page cache is never more than this and the kernel's own reading ahead
TRIM_BYTES: Final = 32 * MIB  # read between two times that freed memory is given back to the system
WANTED: Final = ("config.json", "generation_config.json", "model*.safetensors*")  # of a hub model, beside its tokenizer
DTYPES: Final = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16, "U16": torch.uint16, "F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32, "U32": torch.uint32, "F32": torch.float32,
    "I64": torch.int64, "U64": torch.uint64, "F64": torch.float64,
}  # fmt: skip

Tell = Callable[[str, float, float], None]
"""Told (words, bytes read, bytes in all) as weights come in."""


class Reader:
    """Reads tensors of safetensors files to a device. ``tell`` hears of every block.

    On a CPU a tensor is read into its own memory. For a GPU it goes through two page-locked buffers in turn, one being read into while the
    other is copied; ``staged`` takes that way on a CPU too, for tests.
    """

    def __init__(self, device: torch.device, total_bytes: int = 0, tell: Tell | None = None, staged: bool = False) -> None:
        self.device, self.total_bytes, self.done_bytes = device, total_bytes, 0
        self._tell, self._began = tell, time.monotonic()
        self._files: dict[Path, int] = {}
        pinned = device.type == "cuda"
        self._buffers = [torch.empty(BLOCK_BYTES, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)] if pinned or staged else []
        self._copied: list[Any] = [torch.cuda.Event() if pinned else None for _ in self._buffers]  # type: ignore[no-untyped-call]

    def read(self, path: Path, stored: StoredTensor) -> Tensor:
        """The tensor, on the device. Raises :class:`ModelError` where the file ends before it does."""
        tensor = torch.empty(stored.shape, dtype=DTYPES[stored.dtype], device=self.device)
        content = tensor.reshape(-1).view(torch.uint8)
        for index, begin in enumerate(range(0, content.numel(), BLOCK_BYTES)):
            part = content[begin : begin + BLOCK_BYTES]
            if not self._buffers:
                self._fill(path, stored, stored.begin + begin, part)
                continue
            buffer, copied = self._buffers[index % 2], self._copied[index % 2]
            if copied is not None:
                copied.synchronize()  # what lay in the buffer is where it belongs
            self._fill(path, stored, stored.begin + begin, buffer[: part.numel()])
            part.copy_(buffer[: part.numel()], non_blocking=True)
            if copied is not None:
                copied.record()
        return tensor

    def _fill(self, path: Path, stored: StoredTensor, place: int, part: Tensor) -> None:
        """Reads ``part.numel()`` bytes from ``place`` on, and lets go of the page cache they came through."""
        file = self._open(path)
        view, done = part.numpy().data, 0
        while done < len(view):
            count = os.preadv(file, [view[done:]], place + done)
            if count == 0:
                raise ModelError(f"{path} ends in the middle of {stored.name!r}: it was cut short while it was read", AGAIN)
            done += count
        _drop(file)
        if (self.done_bytes + done) // TRIM_BYTES > self.done_bytes // TRIM_BYTES:
            _give_back()
        self.done_bytes += done
        if self._tell is not None:
            seconds = time.monotonic() - self._began
            rate = f", {format_bytes(self.done_bytes / seconds)}/s" if seconds > 0 else ""
            self._tell(f"{format_bytes(self.done_bytes)} of {format_bytes(self.total_bytes)}{rate}", self.done_bytes, self.total_bytes)

    def _open(self, path: Path) -> int:
        if path not in self._files:
            self._files[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return self._files[path]

    def close(self) -> None:
        """Closes the files; nothing of them stays in the page cache."""
        for file in self._files.values():
            _drop(file)
            os.close(file)
        self._files.clear()


class ComingTensor:
    """Stands for a stored tensor; ``[...]`` reads it, as with a safetensors slice."""

    def __init__(self, reader: Reader, path: Path, stored: StoredTensor) -> None:
        self._reader, self._path, self._stored = reader, path, stored

    def __getitem__(self, key: Any) -> Tensor:
        assert key is Ellipsis
        return self._reader.read(self._path, self._stored)

    def get_shape(self) -> list[int]:
        return list(self._stored.shape)

    def get_dtype(self) -> str:
        return self._stored.dtype


def load_streamed(source: str, config: Any, dtype: torch.dtype, device: torch.device, attention: str, quantization: Any, tell: Tell | None) -> Any:
    """The language model of a directory, every weight read once. Raises :class:`ModelError` that names what is missing, damaged or does not belong."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, GenerationConfig  # noqa: PLC0415 - takes seconds; only the worker pays

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(f"{config.model_type!r} is no language model that transformers knows", "train a model that writes text one token after the other")
    folder = Path(source)
    headers = read_headers(folder)
    reader = Reader(device, sum(tensor.end - tensor.begin for tensors in headers.values() for tensor in tensors), tell)
    coming = {tensor.name: ComingTensor(reader, path, tensor) for path, tensors in headers.items() for tensor in tensors}
    options = {"device_map": {"": device.index or 0}} if device.type == "cuda" else {}
    if quantization is not None:
        options["quantization_config"] = quantization
    try:
        with one_at_a_time():
            model, told = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
                None,
                config=config,
                state_dict=coming,
                dtype=dtype,
                attn_implementation=attention,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **options,
            )
    finally:
        reader.close()
        _give_back()
    _check(folder, told)
    # Told of no directory, it could not look for these.
    model.config.name_or_path = model.name_or_path = source
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source)
    return model


def _check(folder: Path, told: dict[str, Any]) -> None:
    """Weights that the files lack would be random, and nobody would notice before the loss does."""
    faults = []
    if told["missing_keys"]:
        faults.append(f"lack {_some(told['missing_keys'])}")
    if told["mismatched_keys"]:
        faults.append(
            "have another shape than config.json says: " + _some([f"{name} {tuple(has)} for {tuple(wants)}" for name, has, wants in told["mismatched_keys"]])
        )
    if faults:
        raise ModelError(f"the weights in {folder} {' and '.join(faults)}", "check that config.json and weights belong together, or download the model again")


def _some(names: Sequence[str]) -> str:
    shown = sorted(names)
    return ", ".join(shown[:3]) + (f" and {len(shown) - 3} more" if len(shown) > 3 else "")


def fetched(source: str) -> str:
    """The directory of a hub model, fetched where it is not in the local cache; a broken download goes on where it stopped."""
    from huggingface_hub import snapshot_download  # noqa: PLC0415

    return snapshot_download(source, allow_patterns=list(WANTED))


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """transformers takes the tensors in the order it places them; left to itself, four threads read ahead as far as they get."""
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _drop(file: int) -> None:
    """Tells the kernel that nothing of the file will be read again: also what it read ahead, as the next tensor often lies elsewhere."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)


def _give_back() -> None:
    """What quantising took and let go of goes back to the system, where C's allocator keeps it else (glibc; on others nothing happens)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
