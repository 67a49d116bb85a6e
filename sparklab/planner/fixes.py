"""What would make a plan fit: single changes to its recipe, cheapest first, each with the peak it leads to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from sparklab.planner.ledger import Ledger
from sparklab.planner.recipe import Recipe
from sparklab.planner.search import least_checkpointing
from sparklab.units import gib

LEAST_TOKENS: Final = 128
LEAST_RANK: Final = 4


@dataclass(frozen=True)
class Fix:
    """One way to fit: ``recipe.replace(**changes)`` peaks at ``peak_bytes``."""

    text: str
    changes: dict[str, Any]
    peak_bytes: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON; the peak in GiB."""
        return {"change": self.text, "changes": self.changes, "peak_gib": gib(self.peak_bytes)}

    def __str__(self) -> str:
        return f"{self.text} ({gib(self.peak_bytes):.3g})"


def find_fixes(ledger: Ledger) -> tuple[Fix, ...]:
    """Every kind of single change that makes the ledger's recipe fit, cheapest first; where none does, the first combination that does."""
    usable, recipe = ledger.box.usable_bytes, ledger.recipe

    def tried(changes: dict[str, Any]) -> float:
        return Ledger(ledger.anatomy, recipe.replace(**changes), ledger.box).peak_bytes

    fixes = []
    for candidates in _levers(ledger, tried):
        for text, changes in candidates:
            peak = tried(changes)
            if peak <= usable:
                fixes.append(Fix(text, changes, peak))
                break
    if fixes:
        return tuple(fixes)
    for text, changes in _combinations(ledger):
        peak = tried(changes)
        if peak <= usable:
            return (Fix(text, changes, peak),)
    return ()


Candidate = tuple[str, dict[str, Any]]


def _levers(ledger: Ledger, tried: Callable[[dict[str, Any]], float]) -> Iterator[Iterator[Candidate]]:
    """Kinds of change in the order of what they cost; each yields its candidates, mildest first."""
    recipe = ledger.recipe
    if recipe.loss == "full":
        yield iter([("loss='chunked'", {"loss": "chunked"})])
    yield ((f"{tokens} tokens", _rows(recipe, tokens)) for tokens in _halvings(recipe.micro_batch_tokens, LEAST_TOKENS))
    yield _checkpointing(ledger, tried)
    if recipe.optimizer == "adamw":
        yield iter([("optimizer='adamw_8bit'", {"optimizer": "adamw_8bit"})])
    if recipe.method == "qlora" and not recipe.double_quantization:
        yield iter([("double_quantization=True", {"double_quantization": True})])
    if recipe.method != "full":
        if ledger.adapter_width > ledger.width:
            yield iter([("adapter_dtype='bf16'", {"adapter_dtype": "bf16"})])
        yield ((f"rank {rank}", {"rank": rank}) for rank in _halvings(recipe.rank, LEAST_RANK))
    for method in _lighter(recipe):
        yield iter([(f"method={method!r}", {"method": method})])


def _checkpointing(ledger: Ledger, tried: Callable[[dict[str, Any]], float]) -> Iterator[Candidate]:
    """The fewest more layers to checkpoint that help."""
    layers = ledger.anatomy.layers
    if ledger.checkpointed == layers:
        return
    count = least_checkpointing(lambda count: tried({"checkpoint_layers": count}), layers, ledger.box.usable_bytes)
    if count is not None and count > ledger.checkpointed:
        yield f"checkpoint {count} of {layers} layers", {"checkpoint_layers": count}


def _combinations(ledger: Ledger) -> Iterator[Candidate]:
    """Every layer checkpointed and ever shorter rows, in this method and then in lighter ones."""
    recipe = ledger.recipe
    for method in (recipe.method, *_lighter(recipe)):
        for tokens in (recipe.micro_batch_tokens, *_halvings(recipe.micro_batch_tokens, LEAST_TOKENS)):
            changes = {"method": method, "checkpoint_layers": "all", "loss": "chunked", **_rows(recipe, tokens)}
            named = f"method={method!r} with " if method != recipe.method else ""
            yield f"{named}all layers checkpointed and {tokens} tokens", changes


def _rows(recipe: Recipe, tokens: int) -> dict[str, Any]:
    """Rows of ``tokens`` tokens; a document never is longer than its row."""
    return {"micro_batch_tokens": tokens, **({"max_length": tokens} if recipe.max_length > tokens else {})}


def _halvings(value: int, least: int) -> Iterator[int]:
    while value // 2 >= least:
        value //= 2
        yield value


def _lighter(recipe: Recipe) -> tuple[str, ...]:
    return {"full": ("lora", "qlora"), "lora": ("qlora",), "qlora": ()}[recipe.method]
