"""Sizes of attention on a CPU in bf16 (:mod:`sparklab.engine.cpu_attention`), and what its backward pass holds."""

from __future__ import annotations

from typing import Final

MULTIPLE: Final = 32  # lengths are padded to one: oneDNN makes, and keeps, kernels for every shape that it meets
ROWS: Final = 128  # most queries of a document whose weights are made at once, against all keys up to theirs
TOGETHER: Final = 2**21  # most weights of several documents made at once
NUMBERS: Final = 2**23  # most weights of one document made at once, unless MULTIPLE rows have more
PRODUCTS: Final = 1024  # the longest padded document whose forward pass is products
COLUMNS: Final = 4  # three parts of a number in fp32, and one more: bf16 products like even counts


def padded(length: int) -> int:
    """The padded length of a document."""
    return -(-length // MULTIPLE) * MULTIPLE


def rows_at_once(end: int, heads: int) -> int:
    """How many rows of a document of the padded length ``end`` have their weights made at once."""
    return min(end, max(MULTIPLE, min(ROWS, NUMBERS // (heads * end) // MULTIPLE * MULTIPLE)))


def documents_at_once(end: int, heads: int) -> int:
    """How many documents of the padded length ``end`` are worked on together."""
    return max(1, TOGETHER // (heads * rows_at_once(end, heads) * end))


def kept_bytes(tokens: int, length: int, heads: int, kv_heads: int) -> int:
    """What stays as long as a row of ``tokens`` in documents of ``length``: where they lie."""
    return 4 * kv_heads * (_sizes(tokens, length, heads)[2] + tokens + 1)


def forward_bytes(tokens: int, length: int, heads: int, kv_heads: int, width: int) -> int:
    """Most bytes held at once forward, beside what is given and kept, by a row of ``tokens`` in documents of ``length``."""
    end, many, whole = _sizes(tokens, length, heads)
    queries, keys = 2 * heads * width, 2 * kv_heads * width  # a token's, in bf16
    made = whole * (queries + 4 * heads)
    if end > PRODUCTS:
        return made + many * end * (2 * queries + 2 * keys + 4 * heads)
    rows = rows_at_once(end, heads)

    def block(some: int, met: int) -> int:
        weights = heads * some * met
        return 4 * weights + 2 * some * queries + 2 * met * keys + max(2 * met * keys, 2 * weights + some * queries)

    last = end % rows or rows
    return made + many * max(block(last, end), block(rows, end - last)) + 4 * ROWS * ROWS


def backward_bytes(tokens: int, length: int, heads: int, kv_heads: int, width: int) -> int:
    """The same of the backward pass: when the weights' gradients are made beside the weights."""
    end, many, whole = _sizes(tokens, length, heads)
    rows = rows_at_once(end, heads)
    last = end % rows or rows  # the rows that meet all keys; the others' parts are added up in fp32
    wide, narrow = 2 * (width + COLUMNS), 2 * width

    def block(queries: int, keys: int) -> int:
        return 4 * heads * queries * keys + 2 * wide * (heads * queries + kv_heads * keys) + narrow * kv_heads * keys

    row = 2 * (tokens + 1) * wide * (heads + kv_heads) + 4 * tokens * heads + whole * narrow * (heads + 2 * kv_heads)
    totals = 2 * 2 * narrow * kv_heads * end
    most = block(rows, end) if rows == end else max(block(last, end), block(rows, end - last) + totals)
    return row + many * most + 2 * ROWS * ROWS * heads // kv_heads


def _sizes(tokens: int, length: int, heads: int) -> tuple[int, int, int]:
    """Padded length of a document, how many are worked on together, and the tokens of a whole row with what its documents are padded with."""
    end, documents = padded(length), max(1, tokens // length)
    return end, min(documents, documents_at_once(end, heads)), tokens + documents * (end - length)
