"""What the reader of a plan must know of model and recipe beside the figures."""

from __future__ import annotations

from sparklab.model.anatomy import Anatomy
from sparklab.planner.recipe import Recipe
from sparklab.units import GIB


def notes_of(anatomy: Anatomy, recipe: Recipe, dtype: str, width: int) -> tuple[str, ...]:
    """A sentence each; ``width`` is the bytes of a number of ``dtype``."""
    experts, notes = anatomy.expert_parameters, list(anatomy.notes)
    if experts and recipe.method == "qlora":
        notes.append(f"the experts ({experts * width / GIB:.3g} GiB) stay in {dtype}: they are 3-D parameters, only linear layers become 4-bit")
    if experts and recipe.method != "full" and not recipe.expert_adapters:
        notes.append("adapters go on the attention's linear layers; the experts, which are no linear layers, are not adapted (expert_adapters does)")
    if recipe.method != "full" and recipe.engine == "stock" and recipe.expert_adapters:
        notes.append(
            "engine is 'stock': PEFT makes all changed experts of a layer in every pass and keeps them for the backward pass, which is not counted here"
        )
    if recipe.method != "full" and recipe.engine == "fast":
        for name, given in (("dropout", recipe.dropout > 0), ("dora", recipe.dora)):
            if given:
                notes.append(f"{name} runs on PEFT's own linear layers: sparklab's kernels know plain LoRA alone")
    return tuple(notes)
