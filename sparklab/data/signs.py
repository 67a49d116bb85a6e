"""What a record shows at a glance, as bits: the scripts its letters are written in, and what is odd about it."""

from __future__ import annotations

import functools
from bisect import bisect_right
from typing import Final

EMPTY_TURN: Final = 1
"""A system, user or tool message that says nothing."""
NO_END: Final = 2
"""No end-of-turn token is learned."""
DOUBLE_BOS: Final = 4
"""The tokens begin with BOS twice."""
NOTHING_LEARNED: Final = 8
"""No token is learned, whatever its length."""
SPELLS: Final = 16
"""Its words spell special tokens."""
FAULT: Final = 32
"""It could not become tokens; the faults say why."""
ASKS: Final = 64
"""It can be asked about: it ends in an answer in words. Nothing odd."""

# First code points of ranges of letters, and their script, after Scripts.txt of the Unicode Character Database 16.0
# (https://www.unicode.org/Public/16.0.0/ucd/Scripts.txt); neighbouring ranges of one script are one, and what stands between scripts in use
# today counts as Other. Letters only: digits, marks and signs are common to many scripts.
_RANGES: Final = (
    (0x0041, "Latin"), (0x0370, "Greek"), (0x0400, "Cyrillic"), (0x0531, "Armenian"), (0x0591, "Hebrew"), (0x0600, "Arabic"), (0x0700, "Syriac"),
    (0x0750, "Arabic"), (0x0780, "Thaana"), (0x07C0, "Other"), (0x0860, "Syriac"), (0x0870, "Arabic"), (0x0900, "Devanagari"), (0x0980, "Bengali"),
    (0x0A00, "Gurmukhi"), (0x0A80, "Gujarati"), (0x0B00, "Oriya"), (0x0B80, "Tamil"), (0x0C00, "Telugu"), (0x0C80, "Kannada"), (0x0D00, "Malayalam"),
    (0x0D80, "Sinhala"), (0x0E00, "Thai"), (0x0E80, "Lao"), (0x0F00, "Tibetan"), (0x1000, "Myanmar"), (0x10A0, "Georgian"), (0x1100, "Hangul"),
    (0x1200, "Ethiopic"), (0x13A0, "Other"), (0x1780, "Khmer"), (0x1800, "Mongolian"), (0x18B0, "Other"), (0x1C80, "Cyrillic"), (0x1C90, "Georgian"),
    (0x1CC0, "Other"), (0x1D00, "Latin"), (0x1D26, "Greek"), (0x1D2B, "Cyrillic"), (0x1D2C, "Latin"), (0x1F00, "Greek"), (0x2071, "Latin"),
    (0x2100, "Other"), (0x2160, "Latin"), (0x2190, "Other"), (0x2C60, "Latin"), (0x2C80, "Other"), (0x2D00, "Georgian"), (0x2D30, "Other"),
    (0x2D80, "Ethiopic"), (0x2DE0, "Cyrillic"), (0x2E00, "Other"), (0x2E80, "Han"), (0x3040, "Hiragana"), (0x30A0, "Katakana"), (0x3105, "Bopomofo"),
    (0x3131, "Hangul"), (0x31A0, "Bopomofo"), (0x31C0, "Han"), (0x31F0, "Katakana"), (0x3200, "Other"), (0x3400, "Han"), (0x4DC0, "Other"),
    (0x4E00, "Han"), (0xA000, "Other"), (0xA640, "Cyrillic"), (0xA6A0, "Other"), (0xA722, "Latin"), (0xA800, "Other"), (0xA8E0, "Devanagari"),
    (0xA900, "Other"), (0xA960, "Hangul"), (0xA980, "Other"), (0xA9E0, "Myanmar"), (0xAA00, "Other"), (0xAA60, "Myanmar"), (0xAA80, "Other"),
    (0xAB01, "Ethiopic"), (0xAB30, "Latin"), (0xAB70, "Other"), (0xAC00, "Hangul"), (0xD800, "Other"), (0xF900, "Han"), (0xFB00, "Latin"),
    (0xFB13, "Armenian"), (0xFB1D, "Hebrew"), (0xFB50, "Arabic"), (0xFE00, "Other"), (0xFE70, "Arabic"), (0xFEFF, "Other"), (0xFF21, "Latin"),
    (0xFF66, "Katakana"), (0xFFA0, "Hangul"), (0xFFE0, "Other"), (0x10780, "Latin"), (0x107C0, "Other"), (0x1AFF0, "Katakana"), (0x1B000, "Hiragana"),
    (0x1B170, "Other"), (0x1D400, "Other"), (0x1E030, "Cyrillic"), (0x1E090, "Other"), (0x1EE00, "Arabic"), (0x1EF00, "Other"), (0x20000, "Han"),
    (0x33480, "Other"),
)  # fmt: skip
_STARTS: Final = [start for start, _ in _RANGES]
SCRIPTS: Final = tuple(dict.fromkeys(script for _, script in _RANGES))
"""Script names; the place of each is its bit. Letters of scripts that are not listed are "Other"."""


@functools.lru_cache(maxsize=65536)
def _bit(char: str) -> int:
    if not char.isalpha():
        return 0
    at = bisect_right(_STARTS, ord(char)) - 1
    return 1 << SCRIPTS.index(_RANGES[at][1])


def script_bits(text: str) -> int:
    """The scripts of a text's letters.

    >>> script_names(script_bits("kitten, قطة, 小猫"))
    ['Latin', 'Arabic', 'Han']
    """
    bits = 0
    for char in set(text):
        bits |= _bit(char)
    return bits


def script_names(bits: int) -> list[str]:
    """The names of the scripts in ``bits``."""
    return [name for place, name in enumerate(SCRIPTS) if bits >> place & 1]
