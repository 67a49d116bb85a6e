"""Reading chats from JSONL: one ``{"messages": [{"role": ..., "content": ...}, ...]}`` a line, and every fault located.

Roles: an optional ``system`` first, then ``user`` and ``assistant`` in turn, the last word the assistant's.
A byte order mark, CRLF and blank lines are harmless and accepted; anything else that is off is refused rather than guessed at.
"""

from __future__ import annotations

import difflib
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final

from sparklab.data.chat import Chat, parse_chat
from sparklab.data.faults import Faults, excerpt
from sparklab.errors import DataError, DataNotFound

LINE_LIMIT: Final = 64 * 2**20
"""Bytes of the longest line that is read: beyond it the file is no JSONL, and reading on would only fill the memory."""
_BOM: Final = b"\xef\xbb\xbf"
_NOT_TEXT: Final = {
    b"\xff\xfe": "UTF-16 text; save it as UTF-8: iconv -f UTF-16 -t UTF-8 {path} > chats.jsonl",
    b"\xfe\xff": "UTF-16 text; save it as UTF-8: iconv -f UTF-16 -t UTF-8 {path} > chats.jsonl",
    b"\x1f\x8b": "gzip; unpack it first: gunzip {path}",
    b"PK\x03\x04": "a zip archive; unpack it first: unzip {path}",
    b"PAR1": "Parquet; write it as JSONL first: pandas.read_parquet('{path}').to_json('chats.jsonl', orient='records', lines=True)",
}


def read_chats(path: str | Path) -> list[Chat]:
    """Every chat of a JSONL file, in its order.

    Raises :class:`DataNotFound` where there is no such file, and one :class:`DataError` that counts all faults and shows the first few
    (file, line, field, first 80 characters).
    """
    chats, faults = scan_chats(path)
    records = len(chats) + faults.lines
    faults.raise_any(str(path), records, _whole_file_hint(Path(path).expanduser()) if faults.total else "")
    if not records:
        record = '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'
        raise DataError(f"{path} holds no records", f"give one chat a line: {record}")
    return chats


def scan_chats(path: str | Path) -> tuple[list[Chat], Faults]:
    """The good chats of a JSONL file and the faults of the others; raises only where the file itself cannot be read."""
    checked = _regular_file(Path(path).expanduser())
    chats: list[Chat] = []
    faults = Faults()
    try:
        with checked.open("rb") as file:
            for line, raw in _lines(file):
                chat = parse_chat(raw, line, str(path), faults)
                if chat is not None:
                    chats.append(chat)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}", "check the file's permissions and the disk") from error
    return chats, faults


# ---------------------------------------------------------------- the file


def _regular_file(path: Path) -> Path:
    """The path if it is a regular file that holds text; asks the file system and never opens a pipe or a device, which could block for ever."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in the name
        raise DataNotFound(f"No data file {excerpt(str(path))}", _near_names(path)) from None
    except OSError as error:  # a loop of links, a name too long, no permission
        raise DataError(f"{excerpt(str(path))} cannot be read: {error.strerror}", "give the path of a JSONL file") from None
    if stat.S_ISDIR(mode):
        inside = sorted(entry.name for entry in path.iterdir() if entry.suffix in (".jsonl", ".json"))[:5]
        raise DataError(f"{path} is a directory", f"name the file in it: {', '.join(inside)}" if inside else "give a JSONL file; there is none in it")
    if not stat.S_ISREG(mode):
        raise DataError(f"{path} is not a regular file but a {_sort_of(mode)}", "write the records to a file first")
    return path


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
    there = sorted(name for name in names if name.endswith(".jsonl"))[:5]
    return f"in {folder.resolve()} there is {', '.join(there)}" if there else f"there is no .jsonl file in {folder.resolve()}"


def _lines(file: IO[bytes]) -> Iterator[tuple[int, bytes | None]]:
    """Line number from 1 and bytes of every line that is not blank; None for one beyond the limit. Holds one line at a time."""
    line = 0
    while raw := file.readline(LINE_LIMIT + 1):
        line += 1
        if line == 1 and raw.startswith(_BOM):
            raw = raw[len(_BOM) :]
        if len(raw) > LINE_LIMIT:
            while raw and not raw.endswith(b"\n"):
                raw = file.readline(LINE_LIMIT)
            yield line, None
        elif raw.strip():
            yield line, raw


def _whole_file_hint(path: Path) -> str:
    """One fix for a file that as a whole is something else than JSONL, or ""."""
    with path.open("rb") as file:
        head = file.read(4096).removeprefix(_BOM)
    for magic, fix in _NOT_TEXT.items():
        if head.startswith(magic):
            return f"the file is {fix.format(path=path)}"
    text = head.lstrip()
    if text.startswith(b"["):
        return f"the file is one JSON array; write one record a line: jq -c '.[]' {path} > chats.jsonl"
    if text.split(b"\n", 1)[0].strip() == b"{":
        return f"the records are spread over several lines; write one a line: jq -c . {path} > chats.jsonl"
    if b"\r" in head and b"\n" not in head:
        return f"the lines end in bare carriage returns; mend them: tr '\\r' '\\n' < {path} > chats.jsonl"
    return ""
