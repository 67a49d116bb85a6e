"""Rows of tables: CSV, TSV, Parquet, Arrow, and data sets of the hub.

Row numbers are those a person would count: of a CSV as a spreadsheet numbers them (the header is row 1), of the others from 1.
pyarrow and datasets are loaded where they are needed and not before.
"""

from __future__ import annotations

import csv
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Final

from sparklab.data.faults import WrongError, excerpt
from sparklab.data.rows import Row
from sparklab.data.strict import LINE_LIMIT
from sparklab.errors import DataError, DataNotFound

BATCH: Final = 256
"""Rows decoded at a time."""
FEW: Final = 16
"""Rows decoded at a time where each may be large."""
OBJECT: Final = 48
"""Bytes of an empty Python object, about: a null takes none on disk, and a place in a list."""
UNPACKED_LIMIT: Final = 64 * 2**20
"""Bytes of a row group or batch from which on it is asked how well it packs."""
PACKED_LIMIT: Final = 200
"""Unpacked bytes for each packed one that no text has."""
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
        header: list[str] | None = None
        for number, cells in _csv_cells(csv.reader(_bounded_lines(file, source), delimiter=delimiter, strict=True), source):
            if header is None:
                header = _header(cells, source)
            elif len(cells) != len(header):
                detail = f"{len(cells):,} cells, the header has {len(header):,}"
                yield Row(number, None, WrongError("a row of another width", cells[:20], detail=detail, fix="quote cells that hold the delimiter"), source)
            else:
                yield Row(number, {name: cell for name, cell in zip(header, cells, strict=True) if cell != ""}, None, source)


def _csv_cells(reader: Any, source: str) -> Iterator[tuple[int, list[str]]]:
    """Number and cells of every row that is not blank."""
    number = 0
    while True:
        number += 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            # Behind a quote that is not closed everything is one cell: there is no next record to go on with.
            raise DataError(f"{source}:{number}: not CSV ({excerpt(str(error))})", "close or double the quotes; write the file with a CSV writer") from None
        if cells:
            yield number, cells


def _bounded_lines(file: IO[str], source: str) -> Iterator[str]:
    while line := file.readline(LINE_LIMIT + 1):
        if len(line) > LINE_LIMIT:
            raise DataError(f"{source} has a line of more than {LINE_LIMIT // 2**20} MiB", "this is no CSV file, or its line ends are missing")
        yield line


def _header(cells: list[str], source: str) -> list[str]:
    header = [cell.strip() for cell in cells]
    twice = {name for name in header if header.count(name) > 1} if len(header) < 10_000 else {"10,000 columns"}
    if twice or "" in header:
        what = f"names {', '.join(map(excerpt, sorted(twice)))} twice" if twice - {""} else "has columns without a name"
        raise DataError(f"{source}:1: the header {what}", "give each column one name in the first row")
    return header


# ---------------------------------------------------------------- Parquet, Arrow


def parquet_rows(path: Path, source: str) -> Iterator[Row]:
    """A row for every row, decoded a few at a time.

    Before anything is unpacked its declared size is looked at, and texts that the file keeps once and points to often stay so: a file of a
    few kilobytes can stand for terabytes.
    """
    import pyarrow  # noqa: PLC0415
    import pyarrow.parquet  # noqa: PLC0415

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _refuse_bomb(file.metadata, path, source)
            texts = [column.path for column in map(file.schema.column, range(len(file.schema))) if column.physical_type == "BYTE_ARRAY"]
        with pyarrow.parquet.ParquetFile(path) as plain, pyarrow.parquet.ParquetFile(path, read_dictionary=texts) as pointing:
            number = 0
            for group in range(pointing.num_row_groups):
                for batch in _group_batches(plain, pointing, group):
                    yield from _batch_rows(batch, number, source)
                    number += len(batch)
    except DataError:
        raise
    except (pyarrow.ArrowException, OSError, MemoryError, ValueError) as error:  # ValueError: a name that is not UTF-8
        raise DataError(f"{source} cannot be read as Parquet: {excerpt(str(error))}", "write it anew: the file is damaged or cut") from None


def _group_batches(plain: Any, pointing: Any, group: int) -> Iterator[Any]:
    """The rows of one row group, a few at a time, texts pointed to where pyarrow can keep them so, which within lists is not always."""
    import pyarrow  # noqa: PLC0415

    done = 0
    try:
        for batch in pointing.iter_batches(batch_size=BATCH, row_groups=[group], use_threads=False):
            yield batch
            done += len(batch)
    except pyarrow.ArrowException:  # of a damaged file it comes again below
        for batch in plain.iter_batches(batch_size=FEW, row_groups=[group], use_threads=False):
            left = batch.slice(min(done, len(batch)))
            done -= len(batch) - len(left)
            if len(left):
                yield left


def _refuse_bomb(metadata: Any, path: Path, source: str) -> None:
    """Raise :class:`DataError` for a file that unpacks to far more than any text does.

    Row groups alone are asked: for what a damaged file says of a column, pyarrow ends the process.
    """
    packed = path.stat().st_size
    for group in range(metadata.num_row_groups):
        unpacked = metadata.row_group(group).total_byte_size
        if unpacked > UNPACKED_LIMIT and unpacked > PACKED_LIMIT * packed:
            fact = f"{source}: row group {group + 1} packs {unpacked:,} bytes into {packed:,}"
            raise DataError(fact, "no text packs so well; if it is meant, write it anew in smaller row groups")


def arrow_rows(path: Path, source: str) -> Iterator[Row]:
    """A row for every row of an Arrow file or stream, mapped rather than read."""
    import pyarrow  # noqa: PLC0415

    try:
        with pyarrow.memory_map(str(path)) as file:
            number = 0
            for batch in _arrow_batches(file, source):
                batch.validate(full=True)  # offsets that point elsewhere would crash this process
                for start in range(0, len(batch), BATCH):
                    yield from _batch_rows(batch.slice(start, BATCH), number + start, source)
                number += len(batch)
    except DataError:
        raise
    except (pyarrow.ArrowException, OSError, MemoryError, ValueError) as error:
        raise DataError(f"{source} cannot be read as Arrow: {excerpt(str(error))}", "write it anew: the file is damaged or cut") from None


def _arrow_batches(file: Any, source: str) -> Iterator[Any]:
    """The batches of a stream, or of a file, which is one between a mark and a footer; what they unpack to is looked at before."""
    import pyarrow  # noqa: PLC0415

    begin = 8 if file.read(6) == b"ARROW1" else 0
    file.seek(begin)
    for message in pyarrow.ipc.MessageReader.open_stream(file):
        packed, unpacked = packed_sizes(message)
        if unpacked > UNPACKED_LIMIT and unpacked > PACKED_LIMIT * packed:
            raise DataError(f"{source}: a batch packs {unpacked:,} bytes into {packed:,}", "no text packs so well; if it is meant, write it anew uncompressed")
    file.seek(begin)
    yield from pyarrow.ipc.open_stream(file)


def packed_sizes(message: Any) -> tuple[int, int]:
    """Bytes of an Arrow message's body as it stands and unpacked. Both are 0 where nothing is packed.

    pyarrow unpacks whatever a buffer's first eight bytes say, so they are read here, by the format's schema (Message.fbs): of the message the
    third field is the batch, whose third are the buffers (offset and length of each) and whose fourth says that they are packed.
    """
    if message.type not in ("record batch", "dictionary"):
        return 0, 0
    head, body = bytes(message.metadata), message.body
    try:
        table = _field(head, int.from_bytes(head[:4], "little"), 2)
        if message.type == "dictionary":  # whose second field is a batch
            table = table and _field(head, table, 1)
        buffers = table and _field(head, table, 2)
        if not buffers or not _field(head, table, 3):
            return 0, 0
        (count,) = struct.unpack_from("<I", head, buffers)
        places = [struct.unpack_from("<qq", head, buffers + 4 + 16 * index) for index in range(count)]
        sizes = [struct.unpack_from("<q", body, offset)[0] for offset, length in places if length >= 8]
    except struct.error as error:
        raise WrongError("a batch whose buffers are elsewhere") from error
    return len(body), sum(max(size, 0) for size in sizes)  # -1: this one is not packed


def _field(data: bytes, table: int, index: int) -> int:
    """Where the table, or list, is that a FlatBuffers table's field points to; 0 where the field is not there."""
    vtable = table - struct.unpack_from("<i", data, table)[0]
    if 4 + 2 * index >= struct.unpack_from("<H", data, vtable)[0]:
        return 0
    (offset,) = struct.unpack_from("<H", data, vtable + 4 + 2 * index)
    return table + offset + int(struct.unpack_from("<I", data, table + offset)[0]) if offset else 0


def _batch_rows(batch: Any, before: int, source: str) -> Iterator[Row]:
    """The rows of a batch: all at once, or one by one where they are large or hold what is no text."""
    if sum(map(_weight, batch.columns)) <= LINE_LIMIT:
        try:
            for index, record in enumerate(batch.to_pylist()):
                yield Row(before + index + 1, record, None, source)
            return
        except UnicodeDecodeError:
            pass
    for index in range(len(batch)):
        yield _row(batch.slice(index, 1), before + index + 1, source)


def _row(batch: Any, number: int, source: str) -> Row:
    weight = sum(map(_weight, batch.columns))
    if weight > LINE_LIMIT:
        return Row(number, None, WrongError("row too large", detail=f"{weight:,} bytes", fix=f"split records of more than {LINE_LIMIT // 2**20} MiB"), source)
    try:
        return Row(number, batch.to_pylist()[0], None, source)
    except UnicodeDecodeError as error:
        shown = error.object[max(0, error.start - 20) : error.start + 200].decode("utf-8", "backslashreplace")
        detail = f"byte 0x{error.object[error.start]:02x}"
        return Row(number, None, WrongError("not UTF-8", shown, detail=detail, fix="write the texts as UTF-8"), source)


def _weight(array: Any) -> int:
    """Bytes of an array as Python values, nearly: of texts that are kept once and pointed to, what all pointers together would be."""
    from pyarrow import compute, types  # noqa: PLC0415

    kind, each = array.type, OBJECT * len(array)
    if types.is_dictionary(kind) and _is_text(kind.value_type):
        return each + _sum(compute.binary_length(array.dictionary).take(array.indices))
    if _is_text(kind):
        return each + _sum(compute.binary_length(array))
    if types.is_list(kind) or types.is_large_list(kind) or types.is_map(kind):
        return each + _weight(array.flatten() if not types.is_map(kind) else array.items)
    if types.is_struct(kind):
        return each + sum(map(_weight, array.flatten()))
    return each + int(array.nbytes)


def _is_text(kind: Any) -> bool:
    from pyarrow import types  # noqa: PLC0415

    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_binary(kind) or types.is_large_binary(kind))


def _sum(lengths: Any) -> int:
    from pyarrow import compute  # noqa: PLC0415

    return int(compute.sum(lengths.cast("int64")).as_py() or 0)


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
    for table in dataset.with_format("arrow").iter(BATCH):
        for batch in table.to_batches():
            yield from _batch_rows(batch, number, source)
            number += len(batch)
