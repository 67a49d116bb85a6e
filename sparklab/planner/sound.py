"""All that is wrong at once: with a model's config, with the fields of a recipe, and with the two together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparklab.errors import ModelError, RecipeError, SparklabError
from sparklab.model.anatomy import Anatomy, width_of
from sparklab.planner.recipe import Recipe


def sound(sources: Sequence[str | Path | Anatomy], changes: Mapping[str, Any], tokens: float | None) -> list[Anatomy]:
    """The anatomies of the models that ``sources`` name. ``changes`` are fields of a recipe, ``tokens`` the size of the data.

    Raises one error for everything that is wrong with any of them: of the type of the first, the others' words below.
    """
    errors: list[SparklabError] = []
    anatomies: list[Anatomy] = []
    rank = changes.get("rank", Recipe.rank)
    for source in sources:
        width: int | None = None
        try:
            anatomies.append(source if isinstance(source, Anatomy) else Anatomy.read(source))
            width = anatomies[-1].hidden
            _check_targets(anatomies[-1], changes)
        except ModelError as error:
            errors.append(error)
            width = width or (None if isinstance(source, Anatomy) else width_of(str(source)))
        if width is not None and changes.get("method") != "full" and isinstance(rank, int) and rank > width:
            errors.append(too_high(rank, width, source.source if isinstance(source, Anatomy) else str(source)))
    try:
        Recipe.from_dict({"model": "model", "data": "data.jsonl", **_fitting_length(changes), **changes})
    except RecipeError as error:
        errors.append(error)
    if tokens is not None and not tokens > 0:
        errors.append(RecipeError(f"tokens is {tokens!r}; it must be a number above 0", "say how many tokens the training data has"))
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise type(errors[0])("\n".join(error.fact for error in errors), "; ".join(dict.fromkeys(error.fix for error in errors)))
    return anatomies


def too_high(rank: int, width: int, source: str) -> RecipeError:
    """A rank above the model's width adds nothing but memory."""
    return RecipeError(f"rank is {rank}, above the width {width} of {source}", "use a rank of 8 to 256")


def _check_targets(anatomy: Anatomy, changes: Mapping[str, Any]) -> None:
    targets = changes.get("targets", Recipe.targets)
    if changes.get("method") != "full" and (isinstance(targets, str) or (isinstance(targets, (tuple, list)) and all(isinstance(one, str) for one in targets))):
        anatomy.targeted(targets if isinstance(targets, str) else tuple(targets))


def _fitting_length(changes: Mapping[str, Any]) -> dict[str, Any]:
    """What the planner chooses where only one of the longest document and the row is said: that they fit."""
    row, longest = changes.get("micro_batch_tokens"), changes.get("max_length")
    if row is None and isinstance(longest, int):
        return {"micro_batch_tokens": max(longest, Recipe.micro_batch_tokens)}
    return {"max_length": min(row, Recipe.max_length)} if isinstance(row, int) and row > 0 else {}
