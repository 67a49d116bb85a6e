"""Named recipes: functions that return a complete :class:`Recipe`, sized to the box at hand.

Each takes the model, the data, and any field of the recipe to set otherwise; tokens per micro-batch and layers to checkpoint are solved for
unless given, and the learning rate is that of the method: 2e-5 for every weight, 2e-4 for adapters, 1e-4 for those of models from 30B on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparklab.box import Box
from sparklab.model.anatomy import Anatomy
from sparklab.planner.recipe import Method, Recipe
from sparklab.planner.solver import solve


def full(model: str | Path, data: str | Path, *, box: Box | None = None, **changes: Any) -> Recipe:
    """Every weight is trained. Raises ModelNotFound, ModelError, RecipeError."""
    return _recipe("full", model, data, box, changes)


def lora(model: str | Path, data: str | Path, *, box: Box | None = None, **changes: Any) -> Recipe:
    """Low-rank adapters on every linear layer of a frozen base. Raises ModelNotFound, ModelError, RecipeError."""
    return _recipe("lora", model, data, box, changes)


def qlora(model: str | Path, data: str | Path, *, box: Box | None = None, **changes: Any) -> Recipe:
    """Low-rank adapters on a base held in 4 bits. Raises ModelNotFound, ModelError, RecipeError."""
    return _recipe("qlora", model, data, box, changes)


def _recipe(method: Method, model: str | Path, data: str | Path, box: Box | None, changes: dict[str, Any]) -> Recipe:
    anatomy = Anatomy.read(model)
    return solve(anatomy, box or Box.detect(), method, {**changes, "model": str(model), "data": str(data)})
