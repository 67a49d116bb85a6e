"""Rows of the files that are text: JSONL, JSON, plain text. Each reader holds one record at a time."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, Final, NamedTuple

from sparklab.data import strict
from sparklab.data.faults import WrongError
from sparklab.errors import DataError

FIELDS: Final = ("messages", "conversations", "prompt", "instruction", "text", "chosen")
"""Fields by which a JSON object is a record rather than a set of splits."""


_BUFFER: Final = 2**20


class Row(NamedTuple):
    """One record as its file has it, or why there is none."""

    line: int
    record: dict[str, Any] | None
    wrong: WrongError | None
    source: str


def jsonl_rows(path: Path, source: str) -> Iterator[Row]:
    """A row for every line that is not blank."""
    with path.open("rb", buffering=_BUFFER) as file:
        for line, raw in _lines(file):
            try:
                yield Row(line, strict.record_of(raw), None, source)
            except WrongError as wrong:
                yield Row(line, None, wrong, source)


def _lines(file: IO[bytes]) -> Iterator[tuple[int, bytes | None]]:
    """Line number from 1 and bytes of every line that is not blank; None for one beyond the limit. Holds one line at a time."""
    line, limit = 0, strict.LINE_LIMIT
    while raw := file.readline(limit + 1):
        line += 1
        if line == 1 and raw.startswith(strict.BOM):
            raw = raw[len(strict.BOM) :]
        if len(raw) > limit:
            while not raw.endswith(b"\n") and (raw := file.read(_BUFFER)):
                end = raw.find(b"\n") + 1
                if end:
                    file.seek(end - len(raw), os.SEEK_CUR)
                    break
            yield line, None
        elif raw.strip():
            yield line, raw


def text_rows(paths: Iterable[tuple[Path, str]]) -> Iterator[Row]:
    """A row for every text file, its whole content one record; a file that cannot be one is a fault of its own."""
    for path, source in paths:
        try:
            if not path.is_file():  # asked before it is opened: a pipe would block for ever
                raise WrongError("not a regular file", fix="remove it from the directory")
            with path.open("rb") as file:
                raw = file.read(strict.LINE_LIMIT + 1)
            if len(raw) > strict.LINE_LIMIT:
                raise WrongError("text too long", fix=f"split files of more than {strict.LINE_LIMIT // 2**20} MiB")
            yield Row(1, {"text": strict.text_of(raw.removeprefix(strict.BOM))}, None, source)
        except WrongError as wrong:
            yield Row(1, None, wrong, source)
        except OSError as error:
            yield Row(1, None, WrongError("cannot be read", detail=str(error.strerror), fix="check the file's permissions"), source)


# ---------------------------------------------------------------- JSON


def json_rows(path: Path, source: str, split: str) -> Iterator[Row]:
    """A row for every element of an array, for every object, or for every element of one array of an object of splits.

    Behind a fault of its syntax a JSON file cannot be read on: raises :class:`DataError`, whatever is done with bad records.
    A record is found by the line it begins in; where several begin in one line, as in a file that is one line, they count on from it.
    """
    with path.open("rb") as file:
        reader, number = strict.JsonReader(file), 0
        try:
            for line, value in _values(reader, split):
                number = max(line, number + 1)
                yield _row(number, value, source)
        except WrongError as wrong:
            raise DataError(str(wrong.at(source, reader.line)), wrong.fix) from None


def _row(line: int, value: Any, source: str) -> Row:
    try:
        return Row(line, strict.object_of(value), None, source)
    except WrongError as wrong:
        return Row(line, None, wrong, source)


def _values(reader: strict.JsonReader, split: str) -> Iterator[tuple[int, Any]]:
    while reader.peek():
        if reader.peek() == "[":
            yield from reader.elements()
        elif split:
            for name in reader.members():
                if name == split and reader.peek() == "[":
                    yield from reader.elements()
                else:
                    _pass_over(reader)
        else:
            line = reader.line
            yield line, reader.value()


def json_splits(path: Path, source: str) -> list[str]:
    """The names of the arrays of records that the object in this file holds; empty where the file is an array, or records. Reads it once, streaming."""
    with path.open("rb") as file:
        reader = strict.JsonReader(file)
        try:
            return _splits(reader) if reader.peek() == "{" else []
        except WrongError as wrong:
            raise DataError(str(wrong.at(source, reader.line)), wrong.fix) from None


def _splits(reader: strict.JsonReader) -> list[str]:
    names = []
    for name in reader.members():
        if name in FIELDS:
            return []
        if reader.peek() == "[" and _pass_over(reader):
            names.append(name)
        elif reader.peek() not in (",", "}"):
            _pass_over(reader)
    return [] if reader.peek() else names


def _pass_over(reader: strict.JsonReader) -> bool:
    """Step over the next value, an array element by element; whether it was an array of objects."""
    if reader.peek() != "[":
        reader.value()
        return False
    objects = 0
    for _, value in reader.elements():
        objects += isinstance(value, dict)
    return objects > 0
