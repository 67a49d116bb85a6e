"""sparklab: fine-tune language models in a notebook on a 128 GB unified-memory box.

A *recipe* and a *box* make a *plan*. A plan and *data* make a *run*. A run is a directory: a *worker* process advances it, *panels* watch it,
*commands* steer it.

    >>> import sparklab as sl
    >>> sl.plan("path/to/config.json")                              # will it fit, and how long will it take?
    >>> run = sl.train(sl.recipes.lora("tiny", "chats.jsonl"), "runs/first")
    >>> run.compare(["Please send 3 red lamps to Nora in Oslo by Friday."])

Importing does nothing but make these names available; each loads what it needs when it is used, and none loads torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparklab import errors as errors
    from sparklab.api import Run, doctor, plan, quickstart, rehearse, runs, train
    from sparklab.box import Box
    from sparklab.data.lesson import lesson
    from sparklab.model.anatomy import Anatomy
    from sparklab.panels.box_panel import monitor
    from sparklab.panels.data_panel import inspect
    from sparklab.panels.plan_panel import explore
    from sparklab.planner import ModelTable, Plan, PlanTable
    from sparklab.planner import recipes as recipes
    from sparklab.planner.recipe import Recipe

__version__ = "0.1.0"

_HOMES = {
    "Anatomy": "sparklab.model.anatomy",
    "Box": "sparklab.box",
    "ModelTable": "sparklab.planner",
    "Plan": "sparklab.planner",
    "PlanTable": "sparklab.planner",
    "Recipe": "sparklab.planner.recipe",
    "Run": "sparklab.api",
    "doctor": "sparklab.api",
    "errors": "sparklab.errors",
    "explore": "sparklab.panels.plan_panel",
    "inspect": "sparklab.panels.data_panel",
    "lesson": "sparklab.data.lesson",
    "monitor": "sparklab.panels.box_panel",
    "plan": "sparklab.api",
    "quickstart": "sparklab.api",
    "recipes": "sparklab.planner.recipes",
    "rehearse": "sparklab.api",
    "runs": "sparklab.api",
    "train": "sparklab.api",
}

_MODULES = {"errors", "recipes"}

__all__ = [
    "Anatomy", "Box", "ModelTable", "Plan", "PlanTable", "Recipe", "Run",
    "doctor", "errors", "explore", "inspect", "lesson", "monitor", "plan", "quickstart", "recipes", "rehearse", "runs", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'sparklab' has no attribute {name!r}")
    module = importlib.import_module(home)
    value = module if name in _MODULES else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
