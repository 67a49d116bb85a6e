"""Rows of tables: CSV, TSV, Parquet, Arrow, and data sets of the hub.

Row numbers are those a person would count: of a CSV as a spreadsheet numbers them (the header is row 1), of the others from 1.
pyarrow and datasets are loaded where they are needed and not before.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from sparklab.data.faults import WrongError, excerpt
from sparklab.data.rows import Row
from sparklab.data.strict import LINE_LIMIT
from sparklab.errors import DataError, DataNotFound

BATCH: Final = 256
"""Rows decoded at a time."""
_HUB_NAME: Final = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}(?::[\w.-]+)?")
_FILE_LIKE: Final = re.compile(r"\.(?:jsonl?|ndjson|csv|tsv|parquet|arrow|feather|txt|md|gz|zip)$", re.IGNORECASE)


def csv_rows(path: Path, source: str, delimiter: str) -> Iterator[Row]:
    """A row for every record of a table with a header. An empty cell is no value."""
    csv.field_size_limit(max(csv.field_size_limit(), LINE_LIMIT))  # the module keeps one for the process; raising it takes nothing from anybody
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        first = file.readline(LINE_LIMIT)
        file.seek(0)
        # A spreadsheet set to a language with decimal commas writes semicolons.
        if delimiter == "," and first.count(";") > first.count(","):
            delimiter = ";"
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        header: list[str] | None = None
        number = 0
        while True:
            number += 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                # Behind a quote that is not closed everything is one cell: there is no next record to go on with.
                raise DataError(f"{source}:{number}: not CSV ({error})", "close or double the quotes; write the file with a CSV writer") from None
            if not cells:
                continue
            if header is None:
                header = _header(cells, source)
                continue
            if len(cells) != len(header):
                detail = f"{len(cells)} cells, the header has {len(header)}"
                yield Row(number, None, WrongError("a row of another width", cells, detail=detail, fix="quote cells that hold the delimiter"), source)
                continue
            yield Row(number, {name: cell for name, cell in zip(header, cells, strict=True) if cell != ""}, None, source)


def _header(cells: list[str], source: str) -> list[str]:
    header = [cell.strip() for cell in cells]
    twice = {name for name in header if header.count(name) > 1} if len(header) < 10_000 else {"10,000 columns"}
    if twice or "" in header:
        what = f"names {', '.join(map(excerpt, sorted(twice)))} twice" if twice - {""} else "has columns without a name"
        raise DataError(f"{source}:1: the header {what}", "give each column one name in the first row")
    return header


# ---------------------------------------------------------------- Parquet, Arrow


def parquet_rows(path: Path, source: str) -> Iterator[Row]:
    """A row for every row, decoded a few at a time."""
    import pyarrow  # noqa: PLC0415
    import pyarrow.parquet  # noqa: PLC0415

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=BATCH):
                yield from _batch_rows(batch, number, source)
                number += len(batch)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{source} cannot be read as Parquet: {excerpt(str(error))}", "write it anew: the file is damaged or cut") from None


def arrow_rows(path: Path, source: str) -> Iterator[Row]:
    """A row for every row of an Arrow file or stream, mapped rather than read."""
    import pyarrow  # noqa: PLC0415

    try:
        with pyarrow.memory_map(str(path)) as file:
            number = 0
            for batch in _arrow_batches(file):
                for start in range(0, len(batch), BATCH):
                    yield from _batch_rows(batch.slice(start, BATCH), number + start, source)
                number += len(batch)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{source} cannot be read as Arrow: {excerpt(str(error))}", "write it anew: the file is damaged or cut") from None


def _arrow_batches(file: Any) -> Iterator[Any]:
    import pyarrow  # noqa: PLC0415

    if file.read(6) == b"ARROW1":
        reader = pyarrow.ipc.open_file(file)
        yield from (reader.get_batch(index) for index in range(reader.num_record_batches))
    else:
        file.seek(0)
        yield from pyarrow.ipc.open_stream(file)


def _batch_rows(batch: Any, before: int, source: str) -> Iterator[Row]:
    for index in range(len(batch)):
        (record,) = batch.slice(index, 1).to_pylist()
        yield Row(before + index + 1, record, None, source)


# ---------------------------------------------------------------- the hub


def is_hub_name(name: str) -> bool:
    """Whether this can be a data set's name on the hub, as ``org/name`` or ``org/name:config``, and not a path that is missing."""
    return bool(_HUB_NAME.fullmatch(name)) and not _FILE_LIKE.search(name) and not Path(name.split("/", maxsplit=1)[0]).is_dir()


def load_hub(name: str, split: str) -> Any:
    """A data set of the hub, or of its cache, as Arrow files that are mapped. Raises :class:`DataError`."""
    import datasets  # noqa: PLC0415

    path, _, config = name.partition(":")
    try:
        return datasets.load_dataset(path, config or None, split=split or "train")
    except Exception as error:  # the hub's library raises what the network, the server and the set's own files make it
        fix = f"check the name, or give a local file; the hub's library says: {type(error).__name__}: {excerpt(str(error))}"
        raise DataNotFound(f"No file {name}, and no data set of that name can be had from the hub", fix) from error


def dataset_rows(dataset: Any, source: str) -> Iterator[Row]:
    """A row for every row of a ``datasets.Dataset``."""
    number = 0
    for batch in dataset.with_format("arrow").iter(BATCH):
        yield from _batch_rows(batch, number, source)
        number += len(batch)
