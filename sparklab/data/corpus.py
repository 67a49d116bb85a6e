"""A recipe's data as it lies on disk once tokenised: divided into a side to learn from and a side to ask about, and long documents dealt with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

from sparklab.data import signs, split
from sparklab.data.encode import Encoder
from sparklab.data.faults import SHOWN, Fault, Faults
from sparklab.data.packed import Slices
from sparklab.data.read import Source, open_source
from sparklab.data.record import Record
from sparklab.data.store import Store
from sparklab.data.template import too_long
from sparklab.data.tokenise import Tell, tokenised

if TYPE_CHECKING:
    import numpy as np

    from sparklab.planner.recipe import Recipe

    Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Opened:
    """One source and its tokens."""

    source: Source
    store: Store

    @classmethod
    def open(cls, data: str, recipe: Recipe, encoder: Encoder, tell: Tell | None = None, trains: bool = True) -> Opened:
        """Reads and tokenises ``data`` as the recipe says, or finds that done.

        Raises :class:`DataError` where the data cannot be read on and, where it is to be trained on, for what can only be looked at.
        """
        source = open_source(data, recipe.format)
        if trains:
            source.refuse_untrainable()
        return cls(source, tokenised(data, source, recipe, encoder, tell))

    @property
    def records(self) -> int:
        """Records in the source, those that cannot be used included."""
        return int(self.store.notes["good"] + self.store.notes["bad_lines"])

    def faults(self, to: Faults) -> None:
        """Add what is wrong with the source's records to a collection."""
        for fault in self.store.faults():
            to.add(Fault(**fault))

    def pick(self, numbers: Sequence[int]) -> Iterator[Record]:
        """The good records with these ascending numbers, read anew from the source."""
        wanted = iter(numbers)
        next_one = next(wanted, None)
        if next_one is None:
            return
        for number, record in enumerate(self.source.records(Faults())):
            if number == next_one:
                yield record
                next_one = next(wanted, None)
                if next_one is None:
                    return


class HeldOut(Sequence[Record]):
    """Held-out records that can be asked about; read from their source when they are wanted, since there may be very many."""

    def __init__(self, opened: Opened, numbers: Array) -> None:
        self._opened, self._numbers = opened, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            if (index.step or 1) < 0:
                return list(self)[index]
            return list(self._opened.pick(self._numbers[index].tolist()))
        return next(self._opened.pick([int(self._numbers[index])]))

    def __iter__(self) -> Iterator[Record]:
        return self._opened.pick(self._numbers.tolist())

    def __repr__(self) -> str:
        return f"<{len(self):,} held-out records>"


class Side:
    """One side of the split: its records, and the stretches of tokens that come of its documents."""

    def __init__(self, opened: Opened, chosen: Array, recipe: Recipe) -> None:
        self.opened, self.chosen, self.recipe = opened, chosen, recipe
        documents = opened.store.documents
        self.documents = chosen[documents["record"]].nonzero()[0] if len(documents) else documents["record"]
        """Which of the store's documents are on this side."""
        self.too_long = self.documents[documents["length"][self.documents] > recipe.max_length]
        self.longest = int(documents["length"][self.documents].max()) if len(self.documents) else 0
        self.truncated = self.split = self.dropped = 0
        cut = self._cut()
        taught = cut.learned > 0
        self.unsupervised = int((~taught).sum())
        """Documents, or pieces of them, without a learned token: they are left out."""
        if recipe.on_long == "truncate":
            self.truncated = int(taught[self._is_long(cut)].sum())
        self.slices = Slices(cut.store, cut.starts[taught], cut.lengths[taught], cut.learned[taught], cut.documents[taught])

    @property
    def records(self) -> int:
        """Records on this side."""
        return int(self.chosen.sum())

    @property
    def keys(self) -> Array:
        """Sixteen bytes a record."""
        found: Array = self.opened.store.records["key"][self.chosen]
        return found

    @property
    def asked(self) -> HeldOut:
        """The records that can be asked about."""
        records = self.opened.store.records
        return HeldOut(self.opened, records["number"][self.chosen & (records["flags"] & signs.ASKS > 0)])

    def complain(self, faults: Faults) -> None:
        """Under ``on_long="error"``, add each document that is too long."""
        if self.recipe.on_long != "error" or not len(self.too_long):
            return
        documents, records = self.opened.store.documents[self.too_long], self.opened.store.records
        numbers = records["number"][documents["record"]].tolist()
        shown = sorted(set(numbers[:SHOWN]))  # the error shows these, with their words
        first = dict(zip(shown, self.opened.pick(shown), strict=True))
        for number, length, record in zip(numbers, documents["length"].tolist(), documents["record"].tolist(), strict=True):
            said = first.get(number) or Record(line=int(records["line"][record]), source=self.opened.source.name, text="")
            faults.add(too_long(said, length, self.recipe.max_length))

    def _is_long(self, cut: Slices) -> Array:
        long: Array = self.opened.store.documents["length"][cut.documents] > self.recipe.max_length
        return long

    def _cut(self) -> Slices:
        """Every document as it is, and those beyond ``max_length`` as the recipe wants them."""
        import numpy as np  # noqa: PLC0415

        store, most = self.opened.store, self.recipe.max_length
        table = store.documents[self.documents]
        starts, lengths, learned = (table[name].astype(np.int64) for name in ("start", "length", "learned"))
        whole, documents = lengths <= most, np.asarray(self.documents, np.int64)
        columns = [starts[whole], lengths[whole], learned[whole], documents[whole]]
        if self.recipe.on_long in ("truncate", "split"):
            pieces = [piece for at in np.flatnonzero(~whole).tolist() for piece in self._pieces(int(starts[at]), int(lengths[at]), int(documents[at]))]
            if pieces:
                added = np.array(pieces, np.int64)
                columns = [np.concatenate([column, added[:, place]]) for place, column in enumerate(columns)]
                order = np.argsort(columns[3], kind="stable")  # in the order of the source again
                columns = [column[order] for column in columns]
        else:
            self.dropped = int((~whole).sum()) if self.recipe.on_long == "drop" else 0
        return Slices(store, *columns)

    def _pieces(self, start: int, length: int, document: int) -> Iterator[tuple[int, int, int, int]]:
        """(first token, tokens, learned tokens, document) of what a document that is too long becomes.

        The pieces of a split one overlap by a token: the last of one, where it is learned, is the first of the next, where it is only read.
        So each token is learned as often as in the whole.
        """
        most = self.recipe.max_length
        if self.recipe.on_long == "truncate":
            yield start, most, self._learned(start, most), document
            return
        self.split += 1
        for at in range(start, start + max(1, length - 1), max(1, most - 1)):
            size = min(most, start + length - at)
            yield at, size, self._learned(at, size), document

    def _learned(self, start: int, length: int) -> int:
        return int(self.opened.store.learned[start + 1 : start + length].sum())


@dataclass(frozen=True)
class Corpus:
    """All of a recipe's data, tokenised and divided."""

    encoder: Encoder
    opened: tuple[Opened, ...]
    """The data, and the held-out data where that is a file of its own."""
    train: Side
    held_out: Side

    @classmethod
    def open(cls, recipe: Recipe, encoder: Encoder, opened: tuple[Opened, ...]) -> Corpus:
        """Divides what was opened. Raises :class:`DataError` where nothing can be held out."""
        import numpy as np  # noqa: PLC0415

        first = opened[0]
        everything = np.ones(len(first.store.records), bool)
        if len(opened) == 2:
            other = opened[1]
            return cls(encoder, opened, Side(first, everything, recipe), Side(other, np.ones(len(other.store.records), bool), recipe))
        assert not isinstance(recipe.held_out, str)
        held = split.split_share(first.store.records["key"], recipe.held_out, recipe.seed)
        return cls(encoder, opened, Side(first, ~held, recipe), Side(first, held, recipe))

    @property
    def overlap(self) -> int:
        """Held-out records that are also among those learned from; more than 0 only with held-out data of its own."""
        return split.overlap(self.train.keys, self.held_out.keys) if len(self.opened) == 2 else 0
