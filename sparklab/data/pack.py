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
from typing import Final

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
    if not lengths:
        return []
    if min(lengths) < 1 or max(lengths) > row_tokens:
        raise ValueError(f"lengths from {min(lengths)} to {max(lengths)} do not fit rows of {row_tokens} tokens")
    rng = random.Random(f"pack {seed}")  # a string seeds the same on every platform and in every process
    order = list(range(len(lengths)))
    rng.shuffle(order)
    long = row_tokens // _LONG
    by_chance = [document for document in order if lengths[document] <= long]
    long_first = sorted((document for document in order if lengths[document] > long), key=lengths.__getitem__, reverse=True)
    row_of, count = _best_fit(long_first + by_chance, lengths, row_tokens)
    if count < _FEW_ROWS:
        row_of = _deal(sorted(order, key=lengths.__getitem__, reverse=True), lengths, row_tokens, count) or row_of
    rows: list[list[int]] = [[] for _ in range(count)]
    for document in order:  # by chance, so that documents stand by chance within their row, not longest first
        rows[row_of[document]].append(document)
    rng.shuffle(rows)
    return rows


def _best_fit(order: Sequence[int], lengths: Sequence[int], row_tokens: int) -> tuple[list[int], int]:
    """Each document, in this order, to the fullest row that takes it: the row of every document, and how many rows."""
    row_of = [0] * len(lengths)
    count = 0
    with_room: list[list[int]] = [[] for _ in range(row_tokens + 1)]  # by free tokens: the rows that have just so many
    # One big integer says which of these lists hold a row, so that the least sufficient room is the lowest bit set from the length on.
    rooms = 0
    for document in order:
        length = lengths[document]
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
        row_of[document] = row
        if left:
            if not with_room[left]:
                rooms |= 1 << left
            with_room[left].append(row)
    return row_of, count


def _deal(order: Sequence[int], lengths: Sequence[int], row_tokens: int, count: int) -> list[int] | None:
    """Each document, longest first, to the emptiest of ``count`` rows, which ends with all rows alike; None where they do not all fit so."""
    row_of = [0] * len(lengths)
    heap = [(0, row) for row in range(count)]  # (tokens used, row)
    for document in order:
        used, row = heap[0]
        used += lengths[document]
        if used > row_tokens:
            return None
        row_of[document] = row
        heapq.heapreplace(heap, (used, row))
    return row_of


def epoch_order(rows: int, seed: int, epoch: int) -> list[int]:
    """The order in which ``rows`` rows are seen in one epoch: a permutation that depends on seed and epoch alone, so a resumed run finds it again."""
    order = list(range(rows))
    random.Random(f"epoch {seed} {epoch}").shuffle(order)
    return order
