"""Traces in a process of its own: ``python -m sparklab.run.tracing``.

Whoever asks for them need not load torch (:mod:`sparklab.run.process`). Of the model, config.json alone is read, here, and handed over.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, overload

from sparklab.box import Box
from sparklab.errors import ModelError, RecipeError
from sparklab.model.hub import load_config
from sparklab.planner.forecast import Plan, PlanTable
from sparklab.planner.recipe import Recipe
from sparklab.planner.traced import Traced, TracedPlan
from sparklab.run.launch import child_environment
from sparklab.run.process import answer_process, ask_process


@overload
def traced(made: Plan) -> Plan: ...
@overload
def traced(made: PlanTable) -> PlanTable: ...
def traced(made: Any) -> Any:
    """The plan, or the plans of a table, with the training step of each traced. Raises what :func:`trace` raises."""
    if isinstance(made, Plan):
        return replace(made, traced=trace([made.recipe], made.box)[0])
    if not isinstance(made, PlanTable):
        raise RecipeError("the plans of several models are not traced together", "trace one model, or one recipe")
    found = trace([plan.recipe for plan in made], made.best().box)
    return PlanTable(tuple(replace(plan, traced=one) for plan, one in zip(made, found, strict=True)))


def traced_alone(recipe: Recipe, box: Box, sized: bool) -> TracedPlan:
    """The plan of a model whose family nobody itemised. Where the recipe is not yet ``sized``, all layers are checkpointed if it does not fit else."""
    plan = TracedPlan(recipe=recipe, box=box, traced=trace([recipe], box)[0])
    if plan.fits or sized:
        return plan
    recipe = recipe.replace(checkpoint_layers="all")
    return TracedPlan(recipe=recipe, box=box, traced=trace([recipe], box)[0])


def trace(recipes: Sequence[Recipe], box: Box) -> list[Traced]:
    """What the training step of each recipe of one model holds on ``box``. Takes seconds and no memory to speak of, whatever the model's size.

    Raises :class:`ModelNotFound` where there is no such model, :class:`ModelError` where it cannot be traced, :class:`RunFailed` where the
    process ended without an answer.
    """
    (model,) = {recipe.model for recipe in recipes}
    with tempfile.TemporaryDirectory(prefix="sparklab-") as folder:
        config = Path(folder) / "config.json"
        config.write_text(json.dumps(load_config(model)), encoding="utf-8")
        request = {"recipes": [recipe.replace(model=str(config)).to_dict() for recipe in recipes], "box": asdict(box)}
        found = ask_process("sparklab.run.tracing", request, child_environment(offline=True), "the trace", "plan without the trace")
    if "error" in found:
        raise ModelError(found["fact"].replace(str(config), model), found["fix"])
    return [Traced.from_dict(one) for one in found["traced"]]


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The trace of each recipe of the request."""
    from sparklab.engine.trace import trace as trace_here  # noqa: PLC0415 - torch

    box = Box(**request["box"])
    return {"traced": [trace_here(Recipe.from_dict(recipe), box).to_dict() for recipe in request["recipes"]]}


if __name__ == "__main__":
    sys.exit(answer_process(answer))
