"""Opening data: what a path or a name is, which format its records have, and a stream of them.

A byte order mark, CRLF and blank lines are harmless and accepted; anything else that is off is refused rather than guessed at.
Files are recognised by their content before their name. Nothing is ever read whole, and a local path never reaches the network.
"""

from __future__ import annotations

import difflib
import hashlib
import stat
from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Final

from sparklab.data import rows, tables
from sparklab.data.faults import Faults, excerpt
from sparklab.data.formats import SNIFFED, parse, recognise
from sparklab.data.record import Record
from sparklab.data.rows import Row
from sparklab.data.split import refuse_undivided
from sparklab.data.strict import BOM, LINE_LIMIT
from sparklab.errors import DataError, DataNotFound
from sparklab.files import reason

TEXT_SUFFIXES: Final = (".txt", ".md", ".text", ".rst")
DATA_SUFFIXES: Final = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".feather")
_VERSION: Final = "1"
"""Part of every fingerprint: to be raised when the same bytes are read as other records."""
_EXAMPLE: Final = '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'
_NOT_TEXT: Final = {
    b"\xff\xfe": "UTF-16 text; save it as UTF-8: iconv -f UTF-16 -t UTF-8 {path} > chats.jsonl",
    b"\xfe\xff": "UTF-16 text; save it as UTF-8: iconv -f UTF-16 -t UTF-8 {path} > chats.jsonl",
    b"\x1f\x8b": "gzip; unpack it first: gunzip {path}",
    b"PK\x03\x04": "a zip archive; unpack it first: unzip {path}",
}


class Source:
    """Records in a file, a directory or on the hub, read anew whenever asked for, one at a time."""

    name: str
    """As errors show it."""
    kind: str
    """jsonl, json, csv, tsv, parquet, arrow, text or hub."""
    format: str | None
    """The records' format, recognised from the first of them or named by the user; None where none of them has any."""

    def __init__(self, name: str, kind: str, make_rows: Callable[[], Iterator[Row]], digest: Callable[[], str], hint: Callable[[], str] = str) -> None:
        self.name, self.kind = name, kind
        self._make_rows, self._digest, self._hint = make_rows, digest, hint
        self.format = None
        self.is_named = False

    def records(self, faults: Faults) -> Iterator[Record]:
        """Every good record, in its order; those that cannot be used are left out and what is wrong with them added to ``faults``.

        Holds one record at a time. Raises :class:`DataError` where the file itself cannot be read on.
        """
        for row in self.rows():
            if row.record is None:
                assert row.wrong is not None
                faults.add(row.wrong.at(row.source, row.line))
                continue
            made = parse(row.record, self.format, row.line, row.source, faults)
            if made is not None:
                yield made

    def rows(self) -> Iterator[Row]:
        """The records as their file has them, or what is wrong with a line."""
        try:
            yield from self._make_rows()
        except OSError as error:
            raise DataError(f"{self.name} cannot be read: {reason(error)}", "check the file's permissions and the disk") from error

    @cached_property
    def fingerprint(self) -> str:
        """Thirty-two hex digits of the content, the format and this reader: the same only for the same records."""
        return hashlib.blake2b(f"{_VERSION} {self.format} {self._digest()}".encode(), digest_size=16).hexdigest()

    def refuse(self, faults: Faults, records: int) -> None:
        """Raise one :class:`DataError` for all ``faults``, or where none of ``records`` records (good and bad) is there; else return."""
        faults.raise_any(self.name, records, self._hint() if faults.total else "")
        if not records:
            raise DataError(f"{self.name} holds no records", f"give one chat a line: {_EXAMPLE}")

    def refuse_untrainable(self) -> None:
        """Raise :class:`DataError` for what can be read and shown but not yet trained on."""
        if self.format == "preference":
            fact = f"{self.name} holds preference pairs (chosen and rejected), and training on pairs is not there yet"
            raise DataError(fact, "train on the chosen answers alone: format='chosen'")

    def _sniff(self) -> str | None:
        """The format of the first records that can be read at all."""
        return recognise(self._first_good(), self.name)

    def _first_good(self) -> Iterator[dict[str, Any]]:
        found = 0
        for seen, row in enumerate(self.rows()):
            if row.record is not None:
                found += 1
                yield row.record
            if found == SNIFFED or (found and seen > 10 * SNIFFED):
                return


def open_source(data: str | Path, format: str = "auto") -> Source:  # noqa: A002 - the recipe's word
    """The records at a path or, where there is no such path, in the hub's data set of that name.

    ``data`` may end in ``#split`` where there are several; a hub name may have ``:config`` before it. ``format`` is recognised, or one of
    :mod:`sparklab.data.formats`. Raises :class:`DataNotFound`, and :class:`DataError` for what cannot be read.
    """
    text = str(data)
    path, _, split = text.rpartition("#") if "#" in text and not _exists(text) else (text, "", "")
    source = _open_hub(path, split) if tables.is_hub_name(path) and not _exists(path) else _open_path(Path(path).expanduser(), text, split)
    source.is_named = format != "auto"
    source.format = format if source.is_named else source._sniff()
    return source


def read_records(data: str | Path, format: str = "auto") -> list[Record]:  # noqa: A002
    """Every record, in its order.

    Raises :class:`DataNotFound` where there is no such data, and one :class:`DataError` that counts all faults and shows the first few
    (file, line, field, first 80 characters).
    """
    source, faults = open_source(data, format), Faults()
    records = list(source.records(faults))
    source.refuse(faults, len(records) + faults.lines)
    return records


def check(data: str, format: str, on_bad: str, *, divided: bool = False) -> None:  # noqa: A002
    """Read everything once and keep nothing: raises what :func:`read_records` does; with ``on_bad="skip"`` only where no good record is left.

    ``divided``: some are to be held out, so there must be two that differ.
    """
    source, faults = open_source(data, format), Faults()
    source.refuse_untrainable()
    good, different = 0, set[bytes]()
    for record in source.records(faults):
        good += 1
        if divided and len(different) < 2:
            different.add(record.key)
    if not (good and on_bad == "skip"):
        source.refuse(faults, good + faults.lines)
    if divided:
        refuse_undivided(good, len(different))


def resolved(data: str) -> str:
    """The same data whatever the working directory: a path made absolute, a hub name as it is."""
    path, mark, split = data.rpartition("#") if "#" in data and not _exists(data) else (data, "", "")
    if tables.is_hub_name(path) and not _exists(path):
        return data
    return f"{Path(path).expanduser().resolve()}{mark}{split}"


# ---------------------------------------------------------------- a path


def _exists(path: str) -> bool:
    try:
        return Path(path).expanduser().exists()
    except (OSError, ValueError):
        return False


def _open_path(path: Path, name: str, split: str) -> Source:
    mode = _mode(path)
    if stat.S_ISDIR(mode):
        return _open_directory(path, name, split)
    if not stat.S_ISREG(mode):
        raise DataError(f"{path} is not a regular file but a {_sort_of(mode)}", "write the records to a file first")
    try:
        head = _head(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {reason(error)}", "check the file's permissions and the disk") from error
    kind, shown = _kind_of(path, head), str(path)
    if split and kind != "json":
        raise DataError(f"{path} is {kind} and has no splits, but {name} asks for {excerpt(split)}", f"give {path} alone")
    makers: dict[str, Callable[[], Iterator[Row]]] = {
        "jsonl": lambda: rows.jsonl_rows(path, shown),
        "text": lambda: rows.text_rows([(path, shown)]),
        "csv": lambda: tables.csv_rows(path, shown, ","),
        "tsv": lambda: tables.csv_rows(path, shown, "\t"),
        "parquet": lambda: tables.parquet_rows(path, shown),
        "arrow": lambda: tables.arrow_rows(path, shown),
    }
    if kind == "json":
        chosen = choose_split(rows.json_splits(path, shown), split, shown)
        makers[kind] = lambda: rows.json_rows(path, shown, chosen)
    return Source(shown, kind, makers[kind], lambda: _digest([path], split), lambda: _whole_file_hint(path))


def _mode(path: Path) -> int:
    """What the path is; asks the file system and never opens a pipe or a device, which could block for ever."""
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in the name
        raise DataNotFound(f"No data file {excerpt(str(path))}", _near_names(path)) from None
    except OSError as error:  # a loop of links, a name too long, no permission
        raise DataError(f"{excerpt(str(path))} cannot be read: {error.strerror}", "give the path of a JSONL file") from None


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(4096).removeprefix(BOM)


def _kind_of(path: Path, head: bytes) -> str:
    """What a file is, by its first bytes and only then by its name."""
    for magic, kind in ((b"PAR1", "parquet"), (b"ARROW1", "arrow")):
        if head.startswith(magic):
            return kind
    suffix = path.suffix.lower()
    if suffix in TEXT_SUFFIXES:
        return "text"
    if suffix in (".csv", ".tsv", ".parquet"):
        return suffix[1:]
    if suffix in (".arrow", ".feather"):
        return "arrow"
    text = head.lstrip()
    whole = text.startswith(b"[") or text.split(b"\n", 1)[0].strip() == b"{" or (suffix == ".json" and not _has_lines(path))
    return "json" if whole else "jsonl"


def _has_lines(path: Path) -> bool:
    """Whether the first two lines each look like an object: many a .json file is JSONL."""
    with path.open("rb") as file:
        first, second = file.readline(LINE_LIMIT).strip(), file.readline(16).strip()
    return first.endswith(b"}") and second.startswith(b"{")


def _open_directory(path: Path, name: str, split: str) -> Source:
    """A directory of text files, of Parquet files, or a data set that ``datasets`` saved."""
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _open_saved(path, split)
    found = sorted(entry for entry in path.rglob("*") if not entry.is_dir() and not any(part.startswith(".") for part in entry.relative_to(path).parts))
    kinds = {suffix: [entry for entry in found if entry.suffix.lower() == suffix] for suffix in (*DATA_SUFFIXES, *TEXT_SUFFIXES)}
    data = [suffix for suffix in DATA_SUFFIXES if kinds[suffix]]
    if data == [".parquet"]:
        shards = kinds[".parquet"]
        chosen = choose_split(sorted({_split_of(shard) for shard in shards} - {""}), split, str(path))
        shards = [shard for shard in shards if _split_of(shard) == chosen]
        return Source(
            str(path), "parquet", lambda: chain.from_iterable(tables.parquet_rows(shard, str(shard)) for shard in shards), lambda: _digest(shards, "")
        )
    texts = sorted(chain.from_iterable(kinds[suffix] for suffix in TEXT_SUFFIXES))
    if texts and not data and not split:
        return Source(str(path), "text", lambda: rows.text_rows((entry, str(entry)) for entry in texts), lambda: _digest(texts, ""))
    inside = [str(entry.relative_to(path)) for suffix in data for entry in kinds[suffix]][:5]
    raise DataError(
        f"{path} is a directory, neither of text files nor of Parquet files alone",
        f"name the file in it: {', '.join(inside)}" if inside else "give a file of records; there is none in it",
    )


def _open_saved(path: Path, split: str) -> Source:
    """What ``datasets`` wrote with ``save_to_disk``: Arrow files that are mapped, not read."""
    if (path / "dataset_dict.json").is_file():
        chosen = choose_split(sorted(entry.name for entry in path.iterdir() if (entry / "state.json").is_file()), split, str(path))
        path = path / chosen
    shards = sorted(path.glob("*.arrow"))
    return _shards(path, "arrow", tables.arrow_rows, shards)


def _shards(path: Path, kind: str, read: Callable[[Path, str], Iterator[Row]], files: list[Path]) -> Source:
    return Source(str(path), kind, lambda: chain.from_iterable(read(file, str(file)) for file in files), lambda: _digest(files, ""))


def _split_of(shard: Path) -> str:
    """``train`` for ``train-00000-of-00004.parquet``."""
    split, mark, rest = shard.stem.partition("-")
    return split if mark and "-of-" in rest else ""


def choose_split(splits: list[str], wanted: str, name: str) -> str:
    """The split to read: the one asked for, the only one, or ``train``; "" where there are none. Raises :class:`DataError`."""
    if wanted and wanted not in splits:
        raise DataError(f"{name} has no split {excerpt(wanted)}", f"it has {', '.join(map(excerpt, splits)) or 'no splits'}")
    if wanted or len(splits) <= 1:
        return wanted or "".join(splits)
    if "train" in splits:
        return "train"
    raise DataError(f"{name} has the splits {', '.join(map(excerpt, splits[:20]))}", f"say which: {name}#{splits[0]}")


def _open_hub(name: str, split: str) -> Source:
    dataset = tables.load_hub(name, split)
    return Source(f"{name}#{split}" if split else name, "hub", lambda: tables.dataset_rows(dataset, name), lambda: str(dataset._fingerprint))


def _digest(paths: list[Path], split: str) -> str:
    """SHA-256 over names and contents of files."""
    whole = hashlib.sha256(split.encode())
    for path in paths:
        if path.is_file():
            with path.open("rb") as file:
                whole.update(f"\0{path.name}\0".encode("utf-8", "surrogateescape") + hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


def _sort_of(mode: int) -> str:
    checks = ((stat.S_ISFIFO, "pipe"), (stat.S_ISSOCK, "socket"), (stat.S_ISCHR, "character device"), (stat.S_ISBLK, "block device"))
    return next((name for check, name in checks if check(mode)), "special file")


def _near_names(path: Path) -> str:
    folder = path.parent
    try:
        names = [entry.name for entry in folder.iterdir()]
    except (OSError, ValueError):
        return f"there is no folder {excerpt(str(folder))} either; check the path, relative to {Path.cwd()}"
    by_lower = {name.lower(): name for name in names}
    near = [by_lower[name] for name in difflib.get_close_matches(path.name.lower(), by_lower, n=3, cutoff=0.6)]
    if near:
        return f"did you mean {' or '.join(str(folder / name) for name in near)}?"
    there = sorted(name for name in names if name.endswith(DATA_SUFFIXES))[:5]
    return f"in {folder.resolve()} there is {', '.join(there)}" if there else f"there is no file of records in {folder.resolve()}"


def _whole_file_hint(path: Path) -> str:
    """One fix for a file that as a whole is something else, or ""."""
    head = _head(path)
    for magic, fix in _NOT_TEXT.items():
        if head.startswith(magic):
            return f"the file is {fix.format(path=path)}"
    if b"\r" in head and b"\n" not in head:
        return f"the lines end in bare carriage returns; mend them: tr '\\r' '\\n' < {path} > chats.jsonl"
    return ""
