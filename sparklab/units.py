"""Units: every figure sparklab shows goes through here, so that a gibibyte is always 2**30 bytes.

Unknown is a value: ``NA`` prints "N/A", counts as not-a-number in arithmetic and becomes ``null`` in JSON.
"""

from __future__ import annotations

import math
from typing import Any, Final

KIB: Final = 2**10
MIB: Final = 2**20
GIB: Final = 2**30
GB: Final = 10**9  # what memory and disk makers print on the box

NA: Final = math.nan  # nobody measured it; never a guess, never zero


def is_na(value: float | None) -> bool:
    """True where the value is unknown (``NA`` or None)."""
    return value is None or math.isnan(value)


def gib(size_bytes: float) -> float:
    """Bytes as GiB."""
    return size_bytes / GIB


def format_bytes(size_bytes: float) -> str:
    """Bytes in the largest binary unit that keeps the figure at 1 or more: ``format_bytes(3 * 2**29) == '1.5 GiB'``."""
    if is_na(size_bytes):
        return "N/A"
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(size_bytes) >= unit:
            return f"{size_bytes / unit:.3g} {name}" if abs(size_bytes) < 1000 * unit else f"{size_bytes / unit:,.0f} {name}"
    return f"{size_bytes:.0f} B"


def format_seconds(seconds: float) -> str:
    """A duration as people say it: ``'4.2 s'``, ``'3 min 05 s'``, ``'7 h 20 min'``, ``'2 d 3 h'``."""
    if is_na(seconds):
        return "N/A"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} min"
    return f"{hours // 24} d {hours % 24} h"


def format_count(count: float) -> str:
    """A count with a decimal prefix: ``format_count(8_030_261_248) == '8.03B'``."""
    if is_na(count):
        return "N/A"
    for unit, name in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if abs(count) >= unit:
            return f"{count / unit:.3g}{name}"
    return f"{count:.0f}"


def jsonable(value: Any) -> Any:
    """The same value with every NaN and infinity as None, since JSON has neither; walks dicts, lists and tuples."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    return value
