"""Which recipes' rows may be recorded as CUDA graphs (:mod:`sparklab.engine.graphs`): the engine asks, and the plan counts what a recording holds."""

from __future__ import annotations

from sparklab.model.anatomy import Anatomy
from sparklab.model.parts import Attention
from sparklab.planner.recipe import Recipe


def why_not_recorded(recipe: Recipe, on_cuda: bool) -> str:
    """The reason in words, or "" where rows may be."""
    reasons = {
        "there is no CUDA device": not on_cuda,
        "the engine is stock": recipe.engine != "fast",
        "all weights learn, and a second copy of their gradients would be held": recipe.method == "full",
        "layers are checkpointed": recipe.checkpoint_layers not in ("none", 0),
        "dropout draws random numbers": recipe.dropout > 0,
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def attention_is_recorded(anatomy: Anatomy) -> bool:
    """Whether a kernel takes the model's attention that reads on the device where documents end: none does with soft-capped scores or sinks."""
    parts = (part for block in anatomy.blocks for part in block.parts)
    return not any(isinstance(part, Attention) and (part.capped or part.sinks) for part in parts)
