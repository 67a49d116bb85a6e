"""Bisection for what only grows or only shrinks: layers to checkpoint, tokens in a row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

STEP_TOKENS: Final = 128  # lengths are told in steps of this


def least_checkpointing(peak: Callable[[int], float], layers: int, usable_bytes: float) -> int | None:
    """The fewest layers to checkpoint so that ``peak(layers)`` is within ``usable_bytes``; None where even all do not help."""
    if peak(0) <= usable_bytes:
        return 0
    if peak(layers) > usable_bytes:
        return None
    low, high = 0, layers  # low does not fit, high does
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if peak(middle) <= usable_bytes else (middle, high)
    return high


def longest_row(fits: Callable[[int], bool], most_tokens: int) -> int:
    """The most tokens that fit: ``most_tokens``, or the multiple of 128 that fits while the next does not; 0 where 128 do not.

    >>> longest_row(lambda tokens: tokens <= 1000, 4096)
    896
    """
    if fits(most_tokens):
        return most_tokens
    low, high = 0, -(-most_tokens // STEP_TOKENS)  # low fits, high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * STEP_TOKENS) else (low, middle)
    return low * STEP_TOKENS


def checkpoint_setting(count: int, layers: int) -> int | str:
    """A count of layers as a recipe says it."""
    return "none" if count == 0 else "all" if count == layers else count
