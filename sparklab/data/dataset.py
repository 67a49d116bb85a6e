"""A recipe's data, made ready: read, divided, tokenised with its mask, packed into rows."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from sparklab.data import split
from sparklab.data.corpus import Corpus, HeldOut, Opened
from sparklab.data.encode import Encoder
from sparklab.data.faults import Faults, Skipped
from sparklab.data.packed import Row, Rows, longest_micro_batch, make_row
from sparklab.data.render import Tokenizer, names
from sparklab.data.report import DataReport, few_updates
from sparklab.data.tokenise import Tell
from sparklab.errors import DataError
from sparklab.model.anatomy import vocabulary_of

if TYPE_CHECKING:
    from sparklab.planner.recipe import Recipe

__all__ = ["Prepared", "Row", "Rows", "longest_micro_batch", "make_row", "prepare"]


@dataclass(frozen=True)
class Prepared:
    """Data ready to train on and to be asked about."""

    train_rows: Rows
    held_out_rows: Rows
    """Empty where nothing is held out."""
    held_out_chats: HeldOut = field(repr=False)
    """For answering: ``record.prompt`` is asked, ``record.answer`` is right. Those of plain text, or that end in a call, are not among them."""
    stop_ids: tuple[int, ...]
    """Where generation is to stop."""
    report: DataReport
    encoder: Encoder = field(repr=False)
    """Makes the tokens that the model is asked with: ``encoder.prompt_ids(record.prompt, record.tools)``."""


def prepare(recipe: Recipe, tokenizer: Tokenizer, skipped: Path | None = None, tell: Tell | None = None) -> Prepared:
    """Everything the recipe says about data, done: the same recipe, files and tokenizer give the same rows.

    Tokens are kept on disk (:mod:`sparklab.data.store`), so the second time takes no time. ``skipped`` is where records that
    ``on_bad="skip"`` leaves out are written down; ``tell`` hears how many records are tokenised, of how many where that is known. Puts the
    chat template that the recipe names on the tokenizer. Raises :class:`DataError` (:class:`DataNotFound` for a missing file) with all
    faults located and counted; also where no token would be learned.
    """
    encoder = Encoder(tokenizer, recipe)
    with Skipped(skipped) as leave_out:
        faults = Faults(leave_out)
        opened = tuple(_open(data, recipe, encoder, faults, tell) for data in (recipe.data, recipe.held_out) if isinstance(data, str))
    corpus = Corpus.open(recipe, encoder, opened)
    for check in (refuse_too_long, refuse_nothing_to_learn, refuse_strangers):
        check(corpus, recipe)
    train_rows, held_out_rows = (Rows(side.slices, recipe.micro_batch_tokens, recipe.seed) for side in (corpus.train, corpus.held_out))
    return Prepared(
        train_rows=train_rows,
        held_out_rows=held_out_rows,
        held_out_chats=corpus.held_out.asked,
        stop_ids=encoder.stop_ids,
        report=report_of(corpus, len(train_rows), skipped=faults.lines),
        encoder=encoder,
    )


def _open(data: str, recipe: Recipe, encoder: Encoder, faults: Faults, tell: Tell | None) -> Opened:
    """One source, tokenised; raises for records that cannot be used where the recipe says so, and where no other is left."""
    opened = Opened.open(data, recipe, encoder, tell)
    refuse_unusable(opened, recipe)
    opened.faults(faults)
    return opened


def refuse_unusable(opened: Opened, recipe: Recipe) -> None:
    """Raise for records that cannot be used where the recipe says so, and where no other is left."""
    if recipe.on_bad == "error" or not len(opened.store.documents):
        found = Faults()
        opened.faults(found)
        opened.source.refuse(found, opened.records)


def refuse_too_long(corpus: Corpus, recipe: Recipe) -> None:
    """Under ``on_long="error"``, raise for documents that are too long."""
    found = Faults()
    for side in (corpus.train, corpus.held_out):
        side.complain(found)
    found.raise_any(recipe.data, sum(one.records for one in corpus.opened))


def refuse_nothing_to_learn(corpus: Corpus, recipe: Recipe) -> None:
    """Raise where there is not one document with a learned token."""
    train = corpus.train
    if len(train.slices):
        return
    fact = f"{recipe.data}: not one token to learn ({train.dropped:,} records dropped as too long, {train.unsupervised:,} without a learned token)"
    if train.longest > recipe.max_length:
        raise DataError(fact, f"raise max_length: it is {recipe.max_length:,} and the longest record has {train.longest:,} tokens")
    raise DataError(fact, "the chat template's {% generation %} marks leave out every answer: put them around the assistant's content")


def refuse_strangers(corpus: Corpus, recipe: Recipe) -> None:
    """Raise for tokens that the model has no embedding of."""
    known = vocabulary_of(recipe.model)
    highest = max(int(one.store.ids.max()) if len(one.store.ids) else 0 for one in corpus.opened)
    if known is None or highest < known:
        return
    fact = f"the tokenizer makes token {names(corpus.encoder.tokenizer, [highest])} of the data, and the model's tokens are 0 to {known - 1}"
    raise DataError(fact, "put back the tokenizer that belongs to the model, or save a model whose embeddings were resized to it")


def report_of(corpus: Corpus, rows: int, skipped: int = 0) -> DataReport:
    """The corpus in numbers."""
    train, held_out = corpus.train, corpus.held_out
    ignored: Counter[str] = Counter()
    for one in corpus.opened:
        ignored.update(one.store.notes["ignored"])
    warnings = dict.fromkeys(warning for one in corpus.opened for warning in one.store.notes["warnings"])
    return DataReport(
        records=train.records + held_out.records,
        skipped=skipped,
        documents=len(train.slices),
        tokens=int(train.slices.lengths.sum()),
        supervised=int(train.slices.learned.sum()),
        rows=rows,
        row_tokens=train.recipe.micro_batch_tokens,
        longest=max(train.longest, held_out.longest),
        truncated=train.truncated,
        split=train.split,
        dropped=train.dropped,
        unsupervised=train.unsupervised,
        held_out=held_out.records,
        held_out_documents=len(held_out.slices),
        held_out_tokens=int(held_out.slices.lengths.sum()),
        held_out_supervised=int(held_out.slices.learned.sum()),
        held_out_truncated=held_out.truncated,
        held_out_dropped=held_out.dropped + held_out.unsupervised,
        overlap=corpus.overlap,
        duplicates=split.duplicates(train.keys),
        ignored_fields=dict(ignored),
        template_warnings=tuple(warnings),
        few_updates=few_updates(train.recipe, rows, len(train.slices)),
    )
