"""Sizes of attention's backward pass by products (:mod:`sparklab.engine.products`), and what it holds."""

from __future__ import annotations

from typing import Final

MULTIPLE: Final = 32  # lengths are padded to one: oneDNN makes, and keeps, kernels for every shape that it meets
ROWS: Final = 256  # most queries whose weights are made at once, against all keys up to theirs
NUMBERS: Final = 2**23  # most weights made at once, unless MULTIPLE rows have more
COLUMNS: Final = 4  # three parts of a number in fp32, and one more: bf16 products like even counts


def sizes(length: int, heads: int) -> tuple[int, int]:
    """(the padded length of a document, the rows whose weights are made at once)."""
    padded = -(-length // MULTIPLE) * MULTIPLE
    return padded, min(padded, max(MULTIPLE, min(ROWS, NUMBERS // (heads * padded) // MULTIPLE * MULTIPLE)))


def held_bytes(length: int, heads: int, kv_heads: int, width: int) -> int:
    """Most bytes held at once for a document: when the weights' gradients are made beside the weights."""
    padded, rows = sizes(length, heads)
    wide = 2 * padded * 2 * (heads + kv_heads) * (width + COLUMNS)
    sums = 2 * padded * width * (heads + kv_heads if rows == padded else heads + 2 * 2 * kv_heads)
    return wide + sums + 2 * 2 * heads * rows * padded
