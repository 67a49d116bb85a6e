"""Sizes of attention's backward pass on a CPU (:mod:`sparklab.engine.cpu_attention`), and what it holds."""

from __future__ import annotations

from typing import Final

MULTIPLE: Final = 32  # lengths are padded to one: oneDNN makes, and keeps, kernels for every shape that it meets
ROWS: Final = 256  # most queries whose weights are made at once, against all keys up to theirs
NUMBERS: Final = 2**23  # most weights made at once, unless MULTIPLE rows have more
COLUMNS: Final = 4  # three parts of a number in fp32, and one more: bf16 products like even counts


def padded(length: int) -> int:
    """The padded length of a document."""
    return -(-length // MULTIPLE) * MULTIPLE


def rows_at_once(end: int, heads: int) -> int:
    """How many rows of a document of the padded length ``end`` have their weights made at once."""
    return min(end, max(MULTIPLE, min(ROWS, NUMBERS // (heads * end) // MULTIPLE * MULTIPLE)))


def held_bytes(tokens: int, length: int, heads: int, kv_heads: int, width: int) -> int:
    """Most bytes held at once for a row of ``tokens`` whose longest document has ``length``: when the weights' gradients are made beside the weights."""
    end, whole = padded(length), tokens + MULTIPLE
    rows = rows_at_once(end, heads)
    last = end % rows or rows  # the rows that meet all keys; the others' parts are added up in fp32
    wide, narrow = 2 * (width + COLUMNS), 2 * width

    def block(many: int, keys: int) -> int:
        weights = 2 * 2 * heads * many * keys + 2 * rows * rows * heads // kv_heads
        copies = wide * 2 * (heads * many + kv_heads * keys) if kv_heads > 1 else 0  # of one group, pieces lie as they should
        return weights + copies + narrow * kv_heads * keys

    row = whole * (wide * 2 * (heads + kv_heads) + narrow * (heads + 2 * kv_heads))
    return row + (block(rows, end) if rows == end else max(block(last, end), block(rows, end - last) + 2 * 2 * narrow * kv_heads * end))
