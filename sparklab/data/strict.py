"""JSON as all readers agree on it: no key twice, no NaN, no NUL byte, UTF-8; and a long JSON file read one value at a time."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import IO, Any, Final

from sparklab.data.faults import WrongError, excerpt

BOM: Final = b"\xef\xbb\xbf"
LINE_LIMIT: Final = 64 * 2**20
"""Bytes of the longest line or value that is read: beyond it the file is something else, and reading on would only fill the memory."""
_FIX: Final = "write each record as one JSON object on one line"
_CHUNK: Final = 2**18
_SPACE: Final = re.compile(r"[ \t\r\n]*")


class _NotStrictError(ValueError):
    """JSON that Python would take and other readers would not."""


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _NotStrictError(f"key '{excerpt(twice)}' appears twice, and readers disagree on which counts")
    return record


def _no_constant(name: str) -> Any:
    raise _NotStrictError(f"{name} is a Python word")


_DECODER: Final = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_no_constant)


def record_of(raw: bytes | None) -> dict[str, Any]:
    """One line as a JSON object; raises :class:`WrongError`. ``raw`` is None for a line that was too long to read."""
    if raw is None:
        raise WrongError("line too long", fix="this is no JSONL file, or its line ends are missing")
    return object_of(value_of(text_of(raw).strip()))


def text_of(raw: bytes) -> str:
    """Bytes as text; raises :class:`WrongError`."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        shown = raw[max(0, error.start - 20) : error.start + 200].decode("utf-8", "backslashreplace")
        raise WrongError("not UTF-8", shown, detail=f"byte {error.start} is 0x{raw[error.start]:02x}", fix="save the file as UTF-8") from None
    if "\0" in text:
        raise WrongError("NUL byte", text.lstrip(), fix="remove the NUL bytes (tr -d '\\000'); they mean that the file was cut or is not text")
    return text


def object_of(value: Any) -> dict[str, Any]:
    """The value if it is an object; raises :class:`WrongError`."""
    if not isinstance(value, dict):
        raise WrongError("not a JSON object", value, detail=type_name(value), fix='write each record as {"messages": [...]}')
    return value


def value_of(text: str) -> Any:
    """A text as a JSON value; raises :class:`WrongError`."""
    try:
        return _DECODER.decode(text)
    except _NotStrictError as error:
        raise WrongError("not strict JSON", text, detail=str(error), fix=_FIX) from None
    except json.JSONDecodeError as error:
        raise WrongError("not JSON", text, detail=f"{error.msg} at character {error.pos + 1}", fix=_FIX) from None
    except RecursionError:
        raise WrongError("not JSON", text, detail="nested too deep", fix=_FIX) from None
    except ValueError:  # Python refuses to read an integer of thousands of digits
        raise WrongError("not JSON", text, detail="a number too long to read", fix=_FIX) from None


def type_name(value: object) -> str:
    """A JSON type in words."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), type(value).__name__)


class JsonReader:
    """A JSON file read one value at a time: the caller asks what comes next and takes it, so that a file of any size stays on disk.

    Holds one value and a chunk. All methods raise :class:`WrongError`; ``line`` says where.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._decode = codecs.getincrementaldecoder("utf-8")()
        self._text = ""
        self._at = 0
        self._ended = False
        self.line = 1
        """Line of the next character, from 1."""
        self._first = True

    def peek(self) -> str:
        """The next character that is no white space; "" at the end."""
        while True:
            end = _SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]
            self._advance(end)
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def take(self, char: str) -> bool:
        """Step over ``char`` if it comes next."""
        if self.peek() != char:
            return False
        self._advance(self._at + 1)
        return True

    def value(self) -> Any:
        """The next value, whole."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except _NotStrictError as error:
                raise WrongError("not strict JSON", self._rest(), detail=str(error), fix="write the file with json.dump, keys once and null for NaN") from None
            except json.JSONDecodeError as error:
                # At the end of what has been read, or in a string that begins there and goes on, it may be well with more of it.
                cut = error.msg.startswith("Unterminated string") or error.pos > len(self._text) - 16
                if not cut or not self._more(double=True):
                    raise self._not_json(error.msg) from None
            except RecursionError:
                raise self._not_json("nested too deep") from None
            except ValueError:
                raise self._not_json("a number too long to read") from None
            else:
                if end < len(self._text) or not self._more(double=True):  # a number may go on
                    self._advance(end)
                    return value

    def members(self) -> Iterator[str]:
        """Key of each member of the object that comes next; the caller takes its value before asking for another."""
        assert self.take("{")
        seen: set[str] = set()
        while not self.take("}"):
            key = self.value() if self.peek() == '"' else None
            if not isinstance(key, str) or not self.take(":"):
                raise self._not_json("no key and colon in an object")
            if key in seen:
                raise WrongError("not strict JSON", key, detail=f"key '{excerpt(key)}' appears twice, and readers disagree on which counts", fix="keep one")
            seen.add(key)
            yield key
            if not self.take(",") and self.peek() != "}":
                raise self._not_json("no comma or brace after a member of the object")

    def elements(self) -> Iterator[tuple[int, Any]]:
        """Line and value of each element of the array that comes next."""
        assert self.take("[")
        if self.take("]"):
            return
        while True:
            self.peek()
            line = self.line
            yield line, self.value()
            if self.take("]"):
                return
            if not self.take(","):
                raise self._not_json("no comma or bracket after an element of the array")

    def _advance(self, end: int) -> None:
        self.line += self._text.count("\n", self._at, end)
        self._at = end

    def _more(self, *, double: bool = False) -> bool:
        """Read on; with ``double`` as much again as is held, so that a long value is not decoded anew at every chunk."""
        if self._ended:
            return False
        held = len(self._text) - self._at
        if held > LINE_LIMIT:
            raise WrongError("value too long", self._rest(), fix="write one record a line (JSONL)")
        raw = self._file.read(max(_CHUNK, held) if double else _CHUNK)
        if self._first:
            raw, self._first = raw.removeprefix(BOM), False
        self._ended = not raw
        try:
            text = self._decode.decode(raw, final=self._ended)
        except UnicodeDecodeError as error:
            shown = error.object[max(0, error.start - 20) :].decode("utf-8", "backslashreplace")
            raise WrongError("not UTF-8", shown, detail=f"byte 0x{error.object[error.start]:02x}", fix="save the file as UTF-8") from None
        if "\0" in text:
            raise WrongError("NUL byte", text, fix="remove the NUL bytes (tr -d '\\000'); they mean that the file was cut or is not text")
        self._text, self._at = self._text[self._at :] + text, 0
        return not self._ended

    def _rest(self) -> str:
        return self._text[self._at : self._at + 200]

    def _not_json(self, why: str) -> WrongError:
        return WrongError("not JSON", self._rest(), detail=why, fix="mend the file; python3 -m json.tool says where it breaks")
