"""Packed rows: documents back to back, laid out when a row is asked for, from tokens that stay on disk until then."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any, overload

from sparklab.data.pack import pack_flat
from sparklab.data.template import IGNORED, Document

if TYPE_CHECKING:
    import numpy as np

    from sparklab.data.store import Store
    from sparklab.planner.recipe import Recipe

    Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Row:
    """Documents back to back, T tokens in all; T is at most the recipe's ``micro_batch_tokens`` and nothing is padded."""

    input_ids: list[int]
    """[T]"""
    labels: list[int]
    """[T], not shifted: the token itself where it is learned, -100 elsewhere, and always -100 on a document's first token."""
    position_ids: list[int]
    """[T], from 0 in every document."""
    boundaries: list[int]
    """[documents + 1], where each document begins, and T at the end: ``[0, 5, 12]`` are documents of 5 and 7 tokens (cu_seqlens)."""

    @property
    def documents(self) -> int:
        """Documents in the row."""
        return len(self.boundaries) - 1


def make_row(documents: Sequence[Document]) -> Row:
    """Lay documents back to back.

    >>> make_row([Document([5, 6], [-100, 6]), Document([7], [-100])])
    Row(input_ids=[5, 6, 7], labels=[-100, 6, -100], position_ids=[0, 1, 0], boundaries=[0, 2, 3])
    """
    # A loss predicts token t+1 at token t. At the last token of a document that would be the first of the next, of which it knows
    # nothing: with a first label of -100 the usual shift predicts nothing across a border, and no loss has to know of borders.
    assert all(document.labels[0] == IGNORED for document in documents)
    lengths = [len(document.input_ids) for document in documents]
    return Row(
        input_ids=list(chain.from_iterable(document.input_ids for document in documents)),
        labels=list(chain.from_iterable(document.labels for document in documents)),
        position_ids=list(chain.from_iterable(map(range, lengths))),
        boundaries=list(accumulate(lengths, initial=0)),
    )


def longest_micro_batch(recipe: Recipe, draw: Callable[[int], list[int]]) -> Row:
    """The row that holds most: documents of ``max_length`` tokens, the last one what is left, all of them learned. ``draw(n)`` makes n token ids."""
    tokens, longest = recipe.micro_batch_tokens, recipe.max_length
    drawn = [draw(min(longest, tokens - start)) for start in range(0, tokens, longest)]
    return make_row([Document(ids, [IGNORED, *ids[1:]]) for ids in drawn])


@dataclass(frozen=True)
class Slices:
    """Stretches of a store's tokens, each of which is learned from as a document of its own."""

    store: Store
    starts: Array
    """[slices] int64, the first token of each."""
    lengths: Array
    """[slices] int64."""
    learned: Array
    """[slices] int64, tokens learned in each; its first one never is."""
    documents: Array
    """[slices] int64, which of the store's documents each comes from."""

    def __len__(self) -> int:
        return len(self.starts)

    def document(self, index: int) -> Document:
        """One of them with its labels."""
        start, end = int(self.starts[index]), int(self.starts[index] + self.lengths[index])
        ids: list[int] = self.store.ids[start:end].tolist()
        labels = [token if learned else IGNORED for token, learned in zip(ids, self.store.learned[start:end].tolist(), strict=True)]
        labels[0] = IGNORED
        return Document(ids, labels)


class Rows(Sequence[Row]):
    """Packed rows, laid out when asked for: what is kept is 16 bytes a document.

    Behaves as a list of :class:`Row`: ``len``, index, slice, iterate.
    """

    def __init__(self, slices: Slices, row_tokens: int, seed: int) -> None:
        self.slices = slices
        self._order, self._borders = pack_flat(slices.lengths, row_tokens, seed)

    def __len__(self) -> int:
        return len(self._borders) - 1

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        return make_row([self.slices.document(at) for at in self._inside(index)])

    def lines(self, index: int) -> tuple[int, ...]:
        """The source lines, from 1, of what stands in a row."""
        store = self.slices.store
        return tuple(int(store.records["line"][store.documents["record"][self.slices.documents[at]]]) for at in self._inside(index))

    def _inside(self, index: int) -> list[int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        index %= len(self)
        inside: list[int] = self._order[self._borders[index] : self._borders[index + 1]].tolist()
        return inside

    def __repr__(self) -> str:
        return f"<{len(self)} rows of {len(self.slices)} documents>"
