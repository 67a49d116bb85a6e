"""Tokenised data on disk: written once, whole or not at all, and memory-mapped from then on, so that millions of records take no memory.

An entry is a folder of plain arrays, one kind of value each, without any header (their types stand here), and JSON; no pickle::

    ids.bin        int32 [tokens]      all documents back to back
    learned.bin    uint8 [tokens]      1 where the token is learned
    documents.bin  DOCUMENT [documents]
    records.bin    RECORD [records]    records that became documents, or could not
    faults.jsonl                       what was wrong with others
    notes.json                         stop ids, warnings, counts
    seal.json                          bytes and CRC-32 of each file, written last

Entries lie in ``$XDG_CACHE_HOME/sparklab/tokens``, or where ``SPARKLAB_DATA_CACHE`` says; with ``off`` they are made anew each time. The
least recently used ones go when all of them together are beyond :data:`LIMIT_BYTES`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
import weakref
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sparklab.box.calibration import cache_folder

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

FORMAT: Final = 1
SWITCH: Final = "SPARKLAB_DATA_CACHE"
LIMIT_BYTES: Final = 32 * 2**30
DOCUMENT: Final = [("start", "<i8"), ("length", "<i4"), ("learned", "<i4"), ("record", "<i8")]
"""First token, tokens, learned tokens, and the record it comes from."""
RECORD: Final = [("key", "V16"), ("number", "<i8"), ("line", "<i8"), ("scripts", "<u8"), ("flags", "<u4")]
"""A hash of its words, its number among the source's good records, its line, and bits of :mod:`sparklab.data.signs`: scripts, what is odd."""
TABLES: Final[dict[str, Any]] = {"ids": "<i4", "learned": "u1", "documents": DOCUMENT, "records": RECORD}
_BLOCK: Final = 2**24


class Store:
    """One entry, open for reading. Arrays are memory-mapped: what is not looked at is not loaded."""

    ids: Array
    learned: Array
    documents: Array
    records: Array

    def __init__(self, folder: Path) -> None:
        import numpy as np  # noqa: PLC0415 - whoever only imports this package need not wait for it

        self.folder = folder
        for name, kind in TABLES.items():
            path, dtype = folder / f"{name}.bin", np.dtype(kind)
            mapped = np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype)
            setattr(self, name, mapped)
        self.notes: dict[str, Any] = json.loads((folder / "notes.json").read_text(encoding="utf-8"))
        self._faults = open(folder / "faults.jsonl", encoding="utf-8")  # noqa: SIM115 - stays readable when the entry goes, as what is mapped does
        weakref.finalize(self, self._faults.close)

    def faults(self) -> Iterator[dict[str, Any]]:
        """What was wrong with records that are not here, in the order of the source."""
        self._faults.seek(0)
        for line in self._faults:
            yield json.loads(line)

    def __repr__(self) -> str:
        return f"<{len(self.documents):,} documents of {len(self.ids):,} tokens>"


class Shard:
    """The growing half of an entry: one writer's documents and records, appended as they come."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._files = {name: open(folder / f"{name}.bin", "wb") for name in TABLES}  # noqa: SIM115 - closed by close()
        self.tokens = 0

    def append(self, **columns: Array) -> None:
        """Arrays to add to some of the tables; documents' starts count from the shard's first token."""
        import numpy as np  # noqa: PLC0415

        for name, values in columns.items():
            self._files[name].write(np.ascontiguousarray(values, dtype=np.dtype(TABLES[name])).tobytes())
        self.tokens += len(columns.get("ids", ()))

    def close(self) -> None:
        """Ends writing."""
        for file in self._files.values():
            file.close()


def merge(shards: list[Path], folder: Path) -> None:
    """The shards' tables as one: tokens back to back, documents and records in the order of the source."""
    import numpy as np  # noqa: PLC0415

    for name in ("ids", "learned"):
        with open(folder / f"{name}.bin", "wb") as whole:
            for shard in shards:
                with open(shard / f"{name}.bin", "rb") as part:
                    shutil.copyfileobj(part, whole, _BLOCK)
                if name == "learned":
                    os.unlink(shard / "learned.bin")
    first, documents = 0, []
    for shard in shards:
        table = np.fromfile(shard / "documents.bin", np.dtype(DOCUMENT))
        table["start"] += first
        documents.append(table)
        first += (shard / "ids.bin").stat().st_size // 4
        os.unlink(shard / "ids.bin")
    records = np.concatenate([np.fromfile(shard / "records.bin", np.dtype(RECORD)) for shard in shards])
    order = np.argsort(records["number"], kind="stable")
    table = np.concatenate(documents)
    table = table[np.argsort(table["record"], kind="stable")]
    table["record"] = np.searchsorted(records["number"][order], table["record"])  # from numbers in the source to places in the table
    table.tofile(folder / "documents.bin")
    records[order].tofile(folder / "records.bin")


# ---------------------------------------------------------------- entries


def root() -> Path | None:
    """Where entries are kept; None where the environment says that they are not."""
    said = os.environ.get(SWITCH, "")
    if said.lower() in ("off", "0", "no", "false"):
        return None
    return Path(said).expanduser() if said else cache_folder() / "tokens"


@contextmanager
def held(key: str) -> Iterator[Path]:
    """A folder for the entry of this key, with the right to make it: whoever asks for the same one meanwhile waits.

    Where nothing can be kept, a folder of its own, which goes when this ends; what is mapped by then stays readable.
    """
    home = root()
    try:
        if home is not None:
            home.mkdir(parents=True, exist_ok=True)
            lock = open(home / f"{key}.lock", "ab")  # noqa: SIM115 - closed below
    except OSError:  # no right to write there, or no room
        home = None
    if home is None:
        with tempfile.TemporaryDirectory(prefix="sparklab-tokens-") as folder:
            yield Path(folder) / key
        return
    with lock:
        with contextlib.suppress(OSError):  # a file system without locks: two may do the same work, and the last one's stays
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield home / key


def open_entry(folder: Path) -> Store | None:
    """The entry in this folder; None where there is none, or where it is not as it was sealed (what is left of it is removed)."""
    if not folder.exists():
        return None
    try:
        seal = json.loads((folder / "seal.json").read_text(encoding="utf-8"))
        if seal["format"] == FORMAT and seal["files"] == _digests(folder):
            os.utime(folder / "seal.json")  # used just now: the last to go
            return Store(folder)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    shutil.rmtree(folder, ignore_errors=True)
    return None


@contextmanager
def draft(folder: Path) -> Iterator[Path]:
    """A folder beside the entry's to make it in; sealed and renamed at the end, or removed where that is not reached."""
    made = folder.with_name(f"{folder.name}.{os.getpid()}.new")
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    try:
        yield made
        (made / "seal.json").write_text(json.dumps({"format": FORMAT, "files": _digests(made)}), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(made, folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _digests(folder: Path) -> dict[str, list[int]]:
    """Bytes and CRC-32 of each file of an entry."""
    found = {}
    for name in (*(f"{table}.bin" for table in TABLES), "faults.jsonl", "notes.json"):
        size = crc = 0
        with open(folder / name, "rb") as file:
            while block := file.read(_BLOCK):
                size, crc = size + len(block), zlib.crc32(block, crc)
        found[name] = [size, crc]
    return found


def evict(keep: Path, limit_bytes: int = LIMIT_BYTES) -> None:
    """Removes the least recently used entries beyond the limit, and what crashes left behind; never ``keep``."""
    home = root()
    if home is None or keep.parent != home:
        return
    entries = []
    for folder in home.iterdir():
        try:
            if folder == keep or not folder.is_dir():
                continue
            if (folder / "seal.json").exists():
                entries.append(((folder / "seal.json").stat().st_mtime, sum(file.stat().st_size for file in folder.iterdir()), folder))
            elif folder.name.endswith(".new") and not _lives(folder.name.split(".")[-2]):
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:  # another process removed it meanwhile
            continue
    room = limit_bytes - sum(file.stat().st_size for file in keep.iterdir())
    for _, size, folder in sorted(entries, reverse=True):  # newest first
        room -= size
        if room < 0:
            shutil.rmtree(folder, ignore_errors=True)  # whoever has it mapped keeps it


def _lives(pid: str) -> bool:
    return pid.isdigit() and Path(f"/proc/{pid}").exists()
