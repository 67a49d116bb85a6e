"""Records from memory, written down once: a recipe is a plain value, and a run reads files.

A data frame, a list of dicts or a ``datasets.Dataset`` becomes a JSONL file named by its content, so the same records are the same file.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from sparklab.errors import RecipeError

FOLDER: Final = Path("runs") / "data"
"""Where records from memory are written unless a run has a directory of its own to stand beside."""


def kept(data: Any, folder: str | os.PathLike[str] | None = None) -> str:
    """``data`` as a recipe names it: a path or name as it is; records from memory as the path of the file they were written to, in ``folder``.

    Raises :class:`RecipeError` for what are no records, and for values that JSON has no form for.
    """
    if isinstance(data, (str, os.PathLike)):
        return os.fspath(data)
    folder = Path(folder if folder is not None else FOLDER)
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / f".records-{os.getpid()}.new"
    digest = hashlib.sha256()
    try:
        with draft.open("wb") as file:
            for index, record in enumerate(_records(data)):
                line = _line(record, index)
                digest.update(line)
                file.write(line)
        path = folder / f"records-{digest.hexdigest()[:16]}.jsonl"
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return str(path)


def _records(data: Any) -> Iterator[Any]:
    if isinstance(data, (Mapping, bytes, bytearray)):
        names = ", ".join(map(repr, list(data)[:5])) if isinstance(data, Mapping) else type(data).__name__
        raise RecipeError(f"data is a {type(data).__name__} ({names}), which is one record or a set of splits", "give a list of records, or one split of it")
    columns = getattr(data, "to_dict", None) if hasattr(data, "iloc") else None
    if columns is not None:  # a pandas DataFrame, a thousand rows at a time
        for start in range(0, len(data), 1000):
            yield from data.iloc[start : start + 1000].to_dict("records")
    elif isinstance(data, Iterable):
        yield from data
    else:
        raise RecipeError(f"data is a {type(data).__name__}", "give a path, a name, a list of dicts, a pandas DataFrame or a datasets.Dataset")


def _line(record: Any, index: int) -> bytes:
    if not isinstance(record, Mapping):
        raise RecipeError(f"record {index} of data is a {type(record).__name__}", 'give records as dicts, as {"messages": [...]}')
    try:
        text = json.dumps(_plain(record), ensure_ascii=False, allow_nan=False)
        return text.encode("utf-8") + b"\n"
    except UnicodeEncodeError as error:
        raise RecipeError(f"record {index} of data holds half a surrogate pair", "mend the text: some tool cut an emoji in half") from error
    except (TypeError, ValueError, RecursionError) as error:
        raise RecipeError(f"record {index} of data cannot be written as JSON: {error}", "keep texts, numbers, lists and dicts") from error


def _plain(value: Any) -> Any:
    """The value as JSON has it: arrays as lists, a table's missing values as null, dates as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return None if math.isnan(value) else value
    if value is None or isinstance(value, (str, int)):
        return value
    if hasattr(value, "tolist"):  # numpy's arrays and numbers
        return _plain(value.tolist())
    return None if type(value).__name__ in ("NAType", "NaTType") else value.isoformat() if hasattr(value, "isoformat") else value
