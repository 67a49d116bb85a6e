"""A recipe's data, made ready: read, divided, tokenised with its mask, packed into rows."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain
from pathlib import Path
from typing import TYPE_CHECKING, overload

from sparklab.data.encode import Encoder
from sparklab.data.faults import Faults, Skipped
from sparklab.data.pack import pack
from sparklab.data.read import open_source
from sparklab.data.record import Record
from sparklab.data.render import Tokenizer
from sparklab.data.report import DataReport
from sparklab.data.split import Split, split_file, split_share
from sparklab.data.template import IGNORED, Document, pieces, too_long, truncated
from sparklab.errors import DataError

if TYPE_CHECKING:
    from sparklab.planner.recipe import Recipe


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


_Compact = tuple["array[int]", "array[int]"]
"""Ids and labels of a document, 4 bytes each."""


class Rows(Sequence[Row]):
    """Packed rows, laid out when asked for: what is kept is 8 bytes a token, a tenth of what lists of Python integers take.

    Behaves as a list of :class:`Row`: ``len``, index, slice, iterate.
    """

    def __init__(self, documents: Sequence[_Compact], rows: Sequence[Sequence[int]]) -> None:
        self._documents = documents
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        return make_row([Document(ids.tolist(), labels.tolist()) for ids, labels in (self._documents[at] for at in self._rows[index])])

    def __repr__(self) -> str:
        return f"<{len(self)} rows of {len(self._documents)} documents>"


@dataclass(frozen=True)
class Prepared:
    """Data ready to train on and to be asked about."""

    train_rows: Rows
    held_out_rows: Rows
    """Empty where nothing is held out."""
    held_out_chats: list[Record] = field(repr=False)
    """For answering: ``record.prompt`` is asked, ``record.answer`` is right. Those of plain text, or that end in a call, are not among them."""
    stop_ids: tuple[int, ...]
    """Where generation is to stop."""
    report: DataReport
    encoder: Encoder = field(repr=False)
    """Makes the tokens that the model is asked with: ``encoder.prompt_ids(record.prompt, record.tools)``."""


def prepare(recipe: Recipe, tokenizer: Tokenizer, skipped: Path | None = None) -> Prepared:
    """Everything the recipe says about data, done: the same recipe, files and tokenizer give the same rows.

    ``skipped`` is where records that ``on_bad="skip"`` leaves out are written down. Puts the chat template that the recipe names on the
    tokenizer. Raises :class:`DataError` (:class:`DataNotFound` for a missing file) with all faults located and counted; also where no token
    would be learned.
    """
    encoder = Encoder(tokenizer, recipe)
    with Skipped(skipped) as leave_out:
        faults = Faults(leave_out)
        records = _read(recipe.data, recipe, faults)
        held_out = recipe.held_out
        split = split_file(records, _read(held_out, recipe, faults)) if isinstance(held_out, str) else split_share(records, held_out, recipe.seed)
        train = _Side(split.train, encoder, recipe, faults)
        asked = _Side(split.held_out, encoder, recipe, faults)
    if recipe.on_bad == "error":
        faults.raise_any(recipe.data, len(split.train) + len(split.held_out))
    _refuse_nothing_to_learn(train, recipe)
    row_tokens = recipe.micro_batch_tokens
    train_rows = Rows(train.documents, pack(train.lengths, row_tokens, recipe.seed))
    return Prepared(
        train_rows=train_rows,
        held_out_rows=Rows(asked.documents, pack(asked.lengths, row_tokens, recipe.seed)),
        held_out_chats=[record for record in split.held_out if record.asks],
        stop_ids=encoder.stop_ids,
        report=_report(split, train, asked, rows=len(train_rows), row_tokens=row_tokens, warnings=encoder.warnings, skipped=faults.lines),
        encoder=encoder,
    )


def _read(data: str, recipe: Recipe, faults: Faults) -> list[Record]:
    """The good records; raises for the others where the recipe says so."""
    source = open_source(data, recipe.format)
    source.refuse_untrainable()
    before = faults.lines
    records = list(source.records(faults))
    if recipe.on_bad == "error" or not records:
        source.refuse(faults, len(records) + faults.lines - before)
    return records


class _Side:
    """The documents of one side of the split, and the counts of those that are not there whole."""

    def __init__(self, records: Sequence[Record], encoder: Encoder, recipe: Recipe, faults: Faults) -> None:
        self.documents: list[_Compact] = []
        self.truncated = self.dropped = self.unsupervised = self.longest = self.supervised = 0
        for encoded in encoder.encode(records):
            if encoded.fault is not None:
                faults.add(encoded.fault)
            for document in encoded.documents:
                self._take(encoded.record, document, recipe, faults)
        self.lengths = [len(ids) for ids, _ in self.documents]

    def _take(self, chat: Record, document: Document, recipe: Recipe, faults: Faults) -> None:
        length = len(document.input_ids)
        self.longest = max(self.longest, length)
        if length > recipe.max_length:
            if recipe.on_long == "drop":
                self.dropped += 1
                return
            if recipe.on_long == "error":
                faults.add(too_long(chat, length, recipe.max_length))
                return
            if recipe.on_long == "split":
                for piece in pieces(document, recipe.max_length):
                    self._keep(piece)
                return
            document = truncated(document, recipe.max_length)
        self.truncated += self._keep(document) and length > recipe.max_length

    def _keep(self, document: Document) -> bool:
        """Take a document that has a token to learn; whether it has."""
        supervised = document.supervised
        if supervised == 0:
            self.unsupervised += 1
            return False
        self.supervised += supervised
        self.documents.append((array("i", document.input_ids), array("i", document.labels)))
        return True


def _refuse_nothing_to_learn(train: _Side, recipe: Recipe) -> None:
    if train.documents:
        return
    fact = f"{recipe.data}: not one token to learn ({train.dropped:,} records dropped as too long, {train.unsupervised:,} without a learned token)"
    if train.longest > recipe.max_length:
        raise DataError(fact, f"raise max_length: it is {recipe.max_length:,} and the longest record has {train.longest:,} tokens")
    raise DataError(fact, "the chat template's {% generation %} marks leave out every answer: put them around the assistant's content")


def _report(split: Split, train: _Side, held_out: _Side, *, rows: int, row_tokens: int, warnings: list[str], skipped: int) -> DataReport:
    records = split.train + split.held_out
    return DataReport(
        records=len(records),
        skipped=skipped,
        documents=len(train.documents),
        tokens=sum(train.lengths),
        supervised=train.supervised,
        rows=rows,
        row_tokens=row_tokens,
        longest=max(train.longest, held_out.longest),
        truncated=train.truncated,
        dropped=train.dropped,
        unsupervised=train.unsupervised,
        held_out=len(split.held_out),
        held_out_documents=len(held_out.documents),
        held_out_tokens=sum(held_out.lengths),
        held_out_supervised=held_out.supervised,
        held_out_truncated=held_out.truncated,
        held_out_dropped=held_out.dropped + held_out.unsupervised,
        overlap=split.overlap,
        duplicates=split.duplicates,
        ignored_fields=dict(Counter(name for record in records for name in record.ignored)),
        template_warnings=tuple(warnings),
    )
