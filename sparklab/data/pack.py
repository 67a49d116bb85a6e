"""Packing: which documents stand together in a row, and in which order the rows are seen. Pure arithmetic on lengths.

Best fit: each document goes to the fullest row that still takes it. Documents above a third of a row go first, longest first, because
they are hard to place; all others go in by chance. Sorting those too (best fit decreasing) gains half a per cent of fill and fills the
last rows with nothing but short documents: at 8,192 tokens a row, 20 documents on average, 330 in one. An update would then average
over a handful here and hundreds there, so the mix is kept as chance makes it.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import numpy as np

    IntArray = np.ndarray[Any, np.dtype[np.int64]]

_LONG: Final = 3
"""Documents above 1/3 of a row are placed first."""
_FEW_ROWS: Final = 1000
"""Below this a half-empty last row is worth avoiding; above, one such row changes nothing and dealing would double the time."""


def pack(lengths: Sequence[int], row_tokens: int, seed: int = 0) -> list[list[int]]:
    """Rows of document indices, each row at most ``row_tokens`` tokens; every index appears exactly once.

    The same arguments give the same rows; the order of rows, and of documents in a row, is drawn from ``seed``.
    Raises :class:`ValueError` for a length outside 1 to ``row_tokens``: over-long documents are cut or dropped before packing.

    >>> sorted(sorted(row) for row in pack([6, 4, 5, 5], row_tokens=10))
    [[0, 1], [2, 3]]
    """
    documents, borders = (column.tolist() for column in pack_flat(lengths, row_tokens, seed))
    return [documents[start:end] for start, end in pairwise(borders)]


def pack_flat(lengths: Sequence[int] | IntArray, row_tokens: int, seed: int = 0) -> tuple[IntArray, IntArray]:
    """The rows of :func:`pack` as two arrays: document indices [documents], row after row, and where each row begins [rows + 1]."""
    import numpy as np  # noqa: PLC0415 - whoever only imports this package need not wait for it

    sizes = np.asarray(lengths, dtype=np.int64)
    if not len(sizes):
        return np.zeros(0, np.int64), np.zeros(1, np.int64)
    if sizes.min() < 1 or sizes.max() > row_tokens:
        raise ValueError(f"lengths from {sizes.min()} to {sizes.max()} do not fit rows of {row_tokens} tokens")
    rng = random.Random(f"pack {seed}")  # a string seeds the same on every platform and in every process
    shuffled = list(range(len(sizes)))
    rng.shuffle(shuffled)
    order = np.array(shuffled)
    is_long = sizes[order] > row_tokens // _LONG
    long = order[is_long]
    placed = np.concatenate([long[np.argsort(-sizes[long], kind="stable")], order[~is_long]])
    row_of, count = _best_fit(sizes[placed].tolist(), row_tokens)
    if count < _FEW_ROWS:
        longest_first = order[np.argsort(-sizes[order], kind="stable")]
        dealt = _deal(sizes[longest_first].tolist(), row_tokens, count)
        if dealt is not None:
            placed, row_of = longest_first, dealt
    rows = np.empty(len(sizes), np.int64)
    rows[placed] = row_of
    turns = list(range(count))
    rng.shuffle(turns)
    turn = np.empty(count, np.int64)  # in which place each row comes
    turn[turns] = np.arange(count)
    by_row = turn[rows[order]]  # of documents by chance, so that they stand by chance within their row, not longest first
    return order[np.argsort(by_row, kind="stable")], np.concatenate([[0], np.cumsum(np.bincount(by_row, minlength=count))])


def _best_fit(lengths: Sequence[int], row_tokens: int) -> tuple[list[int], int]:
    """Each document, in this order, to the fullest row that takes it: the row of every document, and how many rows."""
    row_of = []
    count = 0
    with_room: list[list[int]] = [[] for _ in range(row_tokens + 1)]  # by free tokens: the rows that have just so many
    # One big integer says which of these lists hold a row, so that the least sufficient room is the lowest bit set from the length on.
    rooms = 0
    for length in lengths:
        enough = rooms >> length
        if enough:
            left = (enough & -enough).bit_length() - 1
            same = with_room[length + left]
            row = same.pop()
            if not same:
                rooms ^= 1 << length + left
        else:
            left, row = row_tokens - length, count
            count += 1
        row_of.append(row)
        if left:
            if not with_room[left]:
                rooms |= 1 << left
            with_room[left].append(row)
    return row_of, count


def _deal(lengths: Sequence[int], row_tokens: int, count: int) -> list[int] | None:
    """Each document, longest first, to the emptiest of ``count`` rows, which ends with all rows alike; None where they do not all fit so."""
    row_of = []
    heap = [(0, row) for row in range(count)]  # (tokens used, row)
    for length in lengths:
        used, row = heap[0]
        used += length
        if used > row_tokens:
            return None
        row_of.append(row)
        heapq.heapreplace(heap, (used, row))
    return row_of


def epoch_order(rows: int, seed: int, epoch: int, world: int = 1) -> list[int]:
    """The order in which ``rows`` rows are seen in one epoch: a permutation that depends on seed and epoch alone, so a resumed run finds it again.

    With ``world`` ranks, of which rank r takes every ``world``-th from the r-th on, each row is still seen once in an epoch, by one rank: where
    ranks do not divide the rows, ``rows`` itself, one beyond the last index, fills up, and stands for a row from which nothing is learned.

    >>> epoch_order(3, seed=0, epoch=0, world=2)[3:]
    [3]
    """
    order = list(range(rows))
    random.Random(f"epoch {seed} {epoch}").shuffle(order)
    return order + [rows] * (-rows % world)
