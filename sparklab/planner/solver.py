"""Sized to the box means solved for: the fastest settings of each method whose peak stays under the usable memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, overload

from sparklab.box import Box
from sparklab.errors import ModelError, RecipeError
from sparklab.model.anatomy import Anatomy
from sparklab.planner.cost import cost
from sparklab.planner.forecast import ModelTable, Plan, PlanTable
from sparklab.planner.ledger import Ledger
from sparklab.planner.recipe import METHODS, Method, Recipe
from sparklab.planner.search import checkpoint_setting, least_checkpointing
from sparklab.planner.sound import sound
from sparklab.units import is_na

ROWS: Final = (512, 1024, 2048, 4096, 8192, 16384, 32768)  # tokens per micro-batch to choose from
GOOD_ENOUGH: Final = 1.05  # shorter rows make more updates of the same data, so the shortest within 5 % of the fastest is taken
FULL_RATE: Final = 2e-5  # learning rates that are sound to start from
ADAPTER_RATE: Final = 2e-4
LARGE_ADAPTER_RATE: Final = 1e-4
LARGE_MODEL: Final = 30e9  # parameters from which on adapters want that one


@overload
def plan(source: Recipe, *, box: Box | str | None = None, tokens: float | None = None) -> Plan: ...
@overload
def plan(
    source: str | Path | Anatomy, *, box: Box | str | None = None, method: Method | None = None, tokens: float | None = None, **changes: Any
) -> PlanTable: ...
@overload
def plan(
    source: Sequence[str | Path | Anatomy], *, box: Box | str | None = None, method: Method | None = None, tokens: float | None = None, **changes: Any
) -> ModelTable: ...
def plan(
    source: Any, *, box: Box | str | None = None, method: Method | None = None, tokens: float | None = None, **changes: Any
) -> Plan | PlanTable | ModelTable:
    """What a recipe will hold and take on ``box`` (one, its name, or this machine); or, for a model, the best plan of each method; or that of several models.

    ``source`` is a :class:`Recipe`, planned as it is, or a model (config.json, directory, hub name, ``"tiny"`` or :class:`Anatomy`): then
    tokens per micro-batch and layers to checkpoint are solved for, unless ``changes`` (fields of a recipe) say them; or a list of models.
    ``tokens`` is the size of the training data in tokens, one pass (default: 10 million, and the plan says so); the recipe's epochs and
    max_steps count on top.

    ::

        plan("path/to/8b").best()                                   # the fastest way to train it here
        plan("path/to/8b", method="qlora").longest_context()        # the longest documents that fit
        plan(["path/to/8b", "path/to/70b"]).largest()               # the largest of them that fits

    Reads config.json and nothing else. Raises ModelNotFound, ModelError, RecipeError, BoxError.
    """
    box = Box.of(box)
    if isinstance(source, Recipe):
        if method is not None or changes:
            asked = ", ".join(f"{name}=..." for name in (*(["method"] if method else []), *changes))
            raise RecipeError("a recipe is planned as it is", f"plan recipe.replace({asked})")
        (anatomy,) = sound([source.model], source.to_dict(), tokens)
        return _forecast(source, anatomy, box, tokens)
    if isinstance(source, Sequence) and not isinstance(source, str):
        if not source:
            raise ModelError("the list of models is empty", "name at least one")
        anatomies = sound(source, {**changes, **({} if method is None else {"method": method})}, tokens)
        return ModelTable.ordered([plan(one, box=box, method=method, tokens=tokens, **changes) for one in anatomies])
    (anatomy,) = sound([source], {**changes, **({} if method is None else {"method": method})}, tokens)
    methods = METHODS if method is None else (method,)
    return PlanTable.ranked([_forecast(solve(anatomy, box, method, changes), anatomy, box, tokens) for method in methods])


def solve(anatomy: Anatomy, box: Box, method: Method, changes: dict[str, Any]) -> Recipe:
    """The fastest recipe of ``method`` that fits ``box``, with ``changes`` kept as they are; the smallest one where none fits."""
    recipe = starting_recipe(anatomy, method, changes)
    rows = [recipe.micro_batch_tokens] if "micro_batch_tokens" in changes else [row for row in ROWS if row >= recipe.max_length] or [recipe.max_length]
    fitting: list[tuple[float, Recipe]] = []
    for row in rows:
        candidate = _checkpointed(recipe.replace(micro_batch_tokens=row), anatomy, box, "checkpoint_layers" in changes)
        if candidate is None:
            break  # longer rows never need less
        seconds = cost(Ledger(anatomy, candidate, box)).seconds[1] / row
        fitting.append((seconds, candidate))
    if not fitting:
        smallest = recipe.replace(micro_batch_tokens=rows[0])
        return smallest if "checkpoint_layers" in changes else smallest.replace(checkpoint_layers="all")
    fastest = min((seconds for seconds, _ in fitting if not is_na(seconds)), default=None)
    if fastest is None:
        return fitting[0][1]
    return next(candidate for seconds, candidate in fitting if seconds <= fastest * GOOD_ENOUGH)


def starting_recipe(anatomy: Anatomy, method: Method, changes: dict[str, Any]) -> Recipe:
    """A complete recipe before it is sized: learning rate by method and size, documents no longer than the model can read or a row is."""
    sound: dict[str, Any] = {"learning_rate": FULL_RATE if method == "full" else LARGE_ADAPTER_RATE if anatomy.parameters >= LARGE_MODEL else ADAPTER_RATE}
    longest = Recipe.max_length
    if anatomy.max_positions:
        longest = min(longest, anatomy.max_positions)
    row = changes.get("micro_batch_tokens")
    if isinstance(row, int) and row > 0:
        longest = min(longest, row)
    sound["max_length"] = longest
    row = max(ROWS[-1], changes["max_length"]) if isinstance(changes.get("max_length"), int) else ROWS[-1]
    return Recipe.from_dict({"model": anatomy.source, "data": "data.jsonl", "micro_batch_tokens": row, **sound, **changes, "method": method})


def _checkpointed(recipe: Recipe, anatomy: Anatomy, box: Box, fixed: bool) -> Recipe | None:
    """The recipe with as few checkpointed layers as fit; None where it does not fit at all."""

    def peak(layers: int) -> float:
        return Ledger(anatomy, recipe.replace(checkpoint_layers=layers), box).peak_bytes

    usable = box.usable_bytes
    if is_na(usable):
        return recipe
    if fixed:
        return recipe if Ledger(anatomy, recipe, box).peak_bytes <= usable else None
    layers = least_checkpointing(peak, anatomy.layers, usable)
    if layers is None:
        return None
    return recipe.replace(checkpoint_layers=checkpoint_setting(layers, anatomy.layers))


def _forecast(recipe: Recipe, anatomy: Anatomy, box: Box, tokens: float | None) -> Plan:
    planned = Plan(recipe, anatomy, box, tokens)
    assert planned.peak_bytes > 0  # made now, so that a recipe that does not go with its model says so here and not when it is looked at
    return planned
