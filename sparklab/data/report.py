"""What became of the data, in numbers."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from sparklab.units import format_count

if TYPE_CHECKING:
    from sparklab.planner.recipe import Recipe

FEW_UPDATES: Final = 10
"""A run of fewer is over before its learning rate has come down, and is mostly not meant."""


def total_steps(recipe: Recipe, rows: int) -> int:
    """Updates in the whole run: rows a pass over rows an update, rounded up, times passes; or max_steps where that is less."""
    steps = math.ceil(math.ceil(rows / recipe.micro_batches_per_update) * recipe.epochs)
    return min(steps, recipe.max_steps or steps)


def few_updates(recipe: Recipe, rows: int, documents: int) -> str:
    """Where a run ends before ``max_steps``, or without one after fewer than ten updates: why, and which ``epochs`` make more; else "".

    >>> from sparklab.planner.recipe import Recipe
    >>> few_updates(Recipe(model="tiny", data="six.jsonl", max_steps=2, micro_batch_tokens=2048), rows=1, documents=6)
    'max_steps is 2, and the run ends after 1 update: 6 documents fill 1 row of 2,048 tokens; epochs=2 makes 2'
    """
    wanted, steps = recipe.max_steps or FEW_UPDATES, total_steps(recipe, rows)
    if not rows or steps >= wanted:
        return ""
    a_pass = math.ceil(rows / recipe.micro_batches_per_update)
    epochs = math.ceil(wanted / a_pass)
    fact = f"max_steps is {recipe.max_steps:,}, and the run" if recipe.max_steps else "the run"
    at_once = f", {recipe.micro_batches_per_update:,} an update" if recipe.micro_batches_per_update > 1 else ""
    return (
        f"{fact} ends after {_counted(steps, 'update')}: {_counted(documents, 'document')} fill{'s' * (documents == 1)} {_counted(rows, 'row')} of "
        f"{recipe.micro_batch_tokens:,} tokens{at_once}; epochs={epochs:,} makes {total_steps(recipe.replace(epochs=float(epochs)), rows):,}"
    )


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """Counts over one preparation; the training side unless the name says otherwise. All counts are exact."""

    records: int
    """Records read, those held out included."""
    documents: int
    """Documents that are trained on: training records less dropped and unsupervised ones."""
    tokens: int
    """Tokens in them, none of it padding."""
    supervised: int
    """Tokens that are learned."""
    rows: int
    row_tokens: int
    """Tokens a full row holds."""
    longest: int
    """Tokens of the longest record as tokenised, before truncation, held-out ones included."""
    truncated: int
    """Documents cut at max_length."""
    split: int
    """Documents longer than max_length that became several, each learned token in one of them."""
    dropped: int
    """Records left out because they were longer than max_length."""
    unsupervised: int
    """Records left out because no token of theirs is learned, mostly after truncation."""
    held_out: int
    """Held-out records (those that are asked)."""
    held_out_documents: int
    """Held-out documents (those whose loss is taken)."""
    held_out_tokens: int
    held_out_supervised: int
    held_out_truncated: int
    held_out_dropped: int
    """Held-out records without a loss, being too long or without a learned token."""
    overlap: int
    """Held-out records that are word for word among those trained on."""
    duplicates: int
    """Training records that repeat an earlier one word for word."""
    ignored_fields: dict[str, int]
    """Fields of the records that nothing uses, and in how many records they stand."""
    skipped: int = 0
    """Records that cannot be used and were left out (``on_bad="skip"``); they are written down in the run directory."""
    template_warnings: tuple[str, ...] = ()
    few_updates: str = ""
    """As :func:`few_updates` says it."""

    @property
    def fill(self) -> float:
        """Share of the rows that is tokens, 0 to 1."""
        return self.tokens / (self.rows * self.row_tokens) if self.rows else 0.0

    @property
    def supervised_share(self) -> float:
        """Share of the tokens that is learned, 0 to 1."""
        return self.supervised / self.tokens if self.tokens else 0.0

    @property
    def warnings(self) -> list[str]:
        """What a person should know before spending a step, in words."""
        found = [*self.template_warnings, *([self.few_updates] if self.few_updates else [])]
        for count, what in (
            (self.truncated + self.held_out_truncated, "documents were cut at max_length, and with the end their last answer's end-of-turn"),
            (self.split, "documents were split at max_length: what comes later does not see what came before"),
            (self.skipped, "records cannot be used and were skipped (on_bad='skip'; skipped.jsonl in the run directory names them)"),
            (self.dropped, "records were left out, being longer than max_length"),
            (self.unsupervised, "records were left out, having no token to learn"),
            (self.overlap, f"of {self.held_out:,} held-out records are also trained on, so what is measured there was learned by heart"),
            (self.duplicates, "training records repeat an earlier one"),
        ):
            if count:
                found.append(f"{count:,} {what}")
        if self.ignored_fields:
            found.append("not used: " + ", ".join(f"{name} ({count:,} records)" for name, count in sorted(self.ignored_fields.items())))
        return found

    def to_dict(self) -> dict[str, Any]:
        """All numbers by name, ready for JSON."""
        computed = {"fill": self.fill, "supervised_share": self.supervised_share, "warnings": self.warnings}
        return {**dataclasses.asdict(self), "template_warnings": list(self.template_warnings), **computed}

    def __str__(self) -> str:
        lines = [
            f"{self.records:,} records: {self.documents:,} documents to train on, {self.held_out:,} held out",
            f"{format_count(self.tokens)} tokens, {self.supervised_share:.0%} of them learned; longest record {self.longest:,}",
            f"{self.rows:,} rows of {self.row_tokens:,} tokens, {self.fill:.1%} full",
        ]
        return "\n".join([*lines, *(f"! {warning}" for warning in self.warnings)])
