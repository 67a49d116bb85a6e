"""Text from elsewhere, made harmless: what data, models, run directories and commands say reaches a screen only through here.

A terminal obeys escape codes, and a browser direction overrides; neither may come out of a file that somebody else wrote.
"""

from __future__ import annotations

import re

_ESCAPE_CODE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\-_])")
_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def clean(text: object, limit: int = 4000) -> str:
    """``text`` without terminal escape codes, control characters and direction overrides, cut at ``limit`` characters.

    >>> clean("a\\x1b[31mb\\x00c")
    'abc'
    """
    plain = str(text)
    plain = plain[: 4 * limit]  # a hostile file may hold megabytes: no pattern runs over them
    plain = _INVISIBLE.sub("", _ESCAPE_CODE.sub("", plain).replace("\r\n", "\n"))
    return plain if len(plain) <= limit else plain[: limit - 1] + "…"


def one_line(text: object, limit: int = 300) -> str:
    """As :func:`clean`, with line breaks and tabs as spaces."""
    return clean(" ".join(clean(text, 4 * limit).split()), limit)


def first_line(error: BaseException, limit: int = 300) -> str:
    """The first line of an error's words; what kind it is where it has none.

    >>> first_line(ValueError("no\\nand why")), first_line(AssertionError())
    ('no', 'AssertionError')
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:limit]


def said(error: Exception, line: int = 0) -> str:
    """What kind of error it is and one line of its words, the first unless ``line`` says another.

    >>> said(ValueError("no\\nand why"))
    'ValueError: no'
    """
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no word'])[line][:200]}"


def harmless_json(text: str) -> str:
    """A JSON text with what a terminal would obey written as ``\\u`` escapes: the same values, readable letters left as they are.

    >>> harmless_json('"a\\x9b31m"')
    '"a\\\\u009b31m"'
    """
    return _INVISIBLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
