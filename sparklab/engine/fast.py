"""The fast path: sparklab's own kernels put into a model of transformers and PEFT, one instance at a time.

No class of theirs is changed: parameters, names and saved files stay, and whatever a kernel does not know is left to the library's own code,
which :func:`fit` says once. With ``engine="stock"`` nothing is put in at all: that is the reference, and the way out.

What a block of transformers does is read from its own forward pass (its source), not from its name: a family that nobody thought of gets the kernels
whose arithmetic it states, and one that states something else keeps its own.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any, Final

from torch import nn

from sparklab.box import Box
from sparklab.engine import attention, frozen_experts, frozen_mlp, liger, lora, mlp, norm, rotary, rotary_tables
from sparklab.model import expert_kernels, experts
from sparklab.model.load import BaseMaker, load_model
from sparklab.planner.recipe import Recipe

_LEFT: Final = "sparklab_left_to_stock"


def ready_model(recipe: Recipe, box: Box, make_base: BaseMaker | None = None) -> nn.Module:
    """As :func:`sparklab.model.load.load_model`, with our attention and, unless the recipe says ``stock``, our kernels.

    :func:`left_to_stock` says what stays on the libraries' own code all the same; a run tells it as warnings.
    """
    attention.register()
    model = load_model(recipe, box, attention.NAME, make_base)
    rotary_tables.by_document(model)
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
    stays: Counter[str] = Counter()
    if recipe.method != "full":
        buffer = lora.Buffer()
        _fit_adapters(model, buffer, stays)
        _fit_frozen(model, buffer)
    for block in list(model.modules()):
        _fit_block(block)
    sentences = [f"{count} linear layers have {reason} and train on PEFT's own code" for reason, count in stays.items()]
    device, mixture = next(model.parameters()).device, any(True for _ in experts.expert_modules(model))
    refused = (liger.refusal(device), expert_kernels.refusal(device) if mixture else "")
    sentences += [f"{each}; sparklab's own PyTorch computes instead" for each in refused if each]
    return tuple(sentences)


def _fit_adapters(model: nn.Module, buffer: lora.Buffer, stays: Counter[str]) -> None:
    for layer in list(model.modules()):
        if hasattr(layer, "lora_A") and hasattr(layer, "get_base_layer"):
            reason = lora.take_over(layer, buffer)
            stays.update([reason] if reason else [])
    for block in list(model.modules()):
        ours = {name for name, child in block.named_children() if isinstance(child, lora.Lora)}
        if not ours:
            continue
        for names in read_together(type(block).forward):
            if len(members := [getattr(block, name) for name in names if name in ours]) > 1:
                lora.together(members)
        if {"gate_proj", "up_proj", "down_proj"} <= ours and _is_gated(type(block).forward) and (act := mlp.gate_of(block.act_fn)) is not None:  # type: ignore[arg-type]
            block.fast_act = act  # type: ignore[assignment]
            block.__class__ = lora.mixed(type(block), mlp.GatedMLP)  # type: ignore[arg-type]


def _fit_frozen(model: nn.Module, buffer: lora.Buffer) -> None:
    """Gated MLPs and experts without adapters."""
    for block in list(model.modules()):
        if {*frozen_mlp.NAMES} <= {name for name, _ in block.named_children()} and _is_gated(type(block).forward):
            frozen_mlp.take_over(block, buffer)
    for _, module in list(experts.expert_modules(model)):
        frozen_experts.take_over(module)


def _fit_block(block: Any) -> None:
    """Norms and rotary positions whose text is known."""
    kind: Any = type(block)
    if (kind_of_norm := norm.spelling(kind)) is not None:
        block.fast_kind, block.fast_eps = kind_of_norm, block.variance_epsilon if hasattr(block, "variance_epsilon") else block.eps
        block.__class__ = lora.mixed(kind, norm.RMSNorm)
    elif not hasattr(block, "kv_b_proj") and (forward := rotary.with_our_turn(kind.forward)) is not None:  # a latent's heads turn in part
        block.__class__ = _with_forward(kind, forward)


@cache
def _with_forward(kind: Callable[..., Any], forward: Callable[..., Any]) -> Any:
    assert isinstance(kind, type)
    return type(kind.__name__, (kind,), {"__module__": kind.__module__, "forward": forward})


@cache
def read_together(forward: Callable[..., Any]) -> tuple[tuple[str, ...], ...]:
    """Names of the submodules that a block's forward pass calls with one and the same value of a variable, in that order: ``self.q_proj(hidden_states)`` ..."""
    reader = _Calls()
    reader.visit(ast.parse(textwrap.dedent(_source(forward))))
    often = Counter(name for names in reader.by_value.values() for name in names)
    groups = (tuple(name for name in names if often[name] == 1) for names in reader.by_value.values())
    return tuple(group for group in groups if len(group) > 1)


class _Calls(ast.NodeVisitor):
    """Collects ``self.name(variable)`` by the variable and how often it was assigned before."""

    def __init__(self) -> None:
        self.assigned: Counter[str] = Counter()
        self.by_value: dict[tuple[str, int], list[str]] = {}

    def visit_Assign(self, node: ast.Assign) -> None:
        self.visit(node.value)
        self.assigned.update(name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name))

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id="self"), attr=name), args=[ast.Name(id=variable)], keywords=[]):
                self.by_value.setdefault((variable, self.assigned[variable]), []).append(name)


def _is_gated(forward: Callable[..., Any]) -> bool:
    """Whether the block's forward pass is ``down_proj(act_fn(gate_proj(x)) * up_proj(x))`` and nothing else."""
    body = re.sub(r"\s+", "", _source(forward).split(":", 1)[-1])
    product = "self.down_proj(self.act_fn(self.gate_proj(x))*self.up_proj(x))"
    return re.sub(r"^.*?(down_proj=|return)", r"\1", body) in (f"down_proj={product}returndown_proj", f"return{product}")


def _source(forward: Callable[..., Any]) -> str:
    """The text of a forward pass without comments; empty where there is none to read."""
    try:
        text = inspect.getsource(inspect.unwrap(forward))
    except (OSError, TypeError):
        return ""
    return re.sub(r"#.*", "", text)
