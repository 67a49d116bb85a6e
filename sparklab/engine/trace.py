"""The trace: the real training step on tensors that have a shape and a type but no memory, so that a model of any size takes seconds.

Everything runs as the worker runs it: the modules of transformers and PEFT, sparklab's attention, loss and checkpointing, the fused AdamW. Only
the tensors are fake (torch's FakeTensorMode), and the books of :mod:`sparklab.engine.books` follow their storages. What a row is made of (ids,
positions, labels, the borders of documents) stays real, so that code which looks at numbers finds them.

Equal layers hold equal bytes, so of each stretch of equal layers a few are traced, and the others counted as the one in their middle: exactly,
since nothing but that layer repeats there.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Final

import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sparklab.box import Box
from sparklab.engine.books import Books, Moment, follow, longest_row
from sparklab.engine.device import traced_for
from sparklab.engine.fast import ready_model
from sparklab.errors import ModelError
from sparklab.model.blank import on_meta
from sparklab.model.load import causal_lm, decoder_layers, keep_trainable, set_checkpointing
from sparklab.planner.items import runtime, slack
from sparklab.planner.recipe import Recipe
from sparklab.planner.traced import Traced, TracedLine
from sparklab.text import first_line

CPU: Final = torch.device("cpu")  # fake tensors on a device that is not there end the process; the CPU's operations keep the same tensors
TRACED: Final = 5  # layers of each stretch that are traced: the middle one touches neither the first nor the last
BLOCK_OF_CONSTANTS: Final = 256  # scales that bitsandbytes quantises together
STAYS: Final = ("weights", "quantisation constants", "adapters", "optimizer")
"""What is held the whole time; everything else comes and goes."""


@dataclass(frozen=True)
class Stretch:
    """Consecutive equal layers: ``count`` of them from ``start`` on, the first of which is number ``place`` among the traced ones."""

    start: int
    count: int
    place: int
    checkpointed: bool

    @property
    def traced(self) -> int:
        return min(self.count, TRACED)

    @property
    def left_out(self) -> int:
        return self.count - self.traced

    @property
    def middle(self) -> int:
        """The traced layer that those left out are like."""
        return self.place + TRACED // 2


def trace(recipe: Recipe, box: Box) -> Traced:
    """What the training step of ``recipe`` holds on ``box`` at its highest moment, from the model's config.json alone.

    Raises :class:`ModelError` where transformers cannot make a language model of the config, and what :func:`load_model` raises.
    """
    began = time.perf_counter()
    moments, layers = _moments(recipe, box)
    highest = max(moments, key=lambda moment: moment.size_bytes)
    kinds: Counter[str] = Counter()
    for (_, kind), size in highest.held.items():
        kinds[kind] += size
    lines = [TracedLine(kind, float(size), "followed storage by storage") for kind, size in kinds.items() if size]
    unseen = (runtime(box), *slack(box, float(sum(size for kind, size in kinds.items() if kind not in STAYS))))
    lines += [TracedLine(item.name, item.size_bytes, item.explain()) for item in unseen if item.size_bytes]
    return Traced(lines=tuple(lines), moment=str(highest), layers=layers, seconds=time.perf_counter() - began)


def _moments(recipe: Recipe, box: Box) -> tuple[list[Moment], int]:
    """The moments of the whole model's step, and how many layers were traced for them."""
    stretches: list[Stretch] = []

    def thin_base(recipe: Recipe, dtype: torch.dtype, _: torch.device, implementation: str) -> nn.Module:
        model, quantizer = on_meta(recipe, dtype, implementation)
        if not hasattr(model.get_decoder(), "layers"):
            raise ModelError(f"transformers' model of {recipe.model!r} keeps its layers where sparklab does not look", "use a model of another family")
        model.tie_weights()
        stretches.extend(_thin(model, recipe.checkpoint_layers))
        if quantizer is not None:
            quantizer.postprocess_model(model)
        return keep_trainable(model, recipe)

    model = ready_model(recipe, box, thin_base)
    set_checkpointing(model, sum(stretch.traced for stretch in stretches if stretch.checkpointed))  # of the traced layers, not of all
    row = longest_row(recipe)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), traced_for(box.is_gpu):
            _materialise(model)
            if box.is_gpu:
                _use_fused_dropout(model)
            moments = follow(model, recipe, row, Books())
    except RuntimeError as error:  # all that torch cannot do without numbers, and what its shapes alone do not allow, is one
        reason = first_line(error)
        raise ModelError(f"{recipe.model!r} cannot be traced with this recipe: {reason}", "plan without the trace, or rehearse") from error
    return whole(moments, stretches), len(decoder_layers(model))


def _thin(model: nn.Module, checkpoint_layers: int | str) -> list[Stretch]:
    """Leaves no more than :data:`TRACED` layers of each stretch of equal ones in the model."""
    decoder = causal_lm(model).get_decoder()
    layers = list(decoder.layers)
    checkpointed = len(layers) if checkpoint_layers == "all" else 0 if checkpoint_layers == "none" else int(checkpoint_layers)
    stretches: list[Stretch] = []
    kept: list[int] = []
    for (again, _), group in groupby(range(len(layers)), key=lambda index: (index < checkpointed, _anatomy(layers[index]))):
        indices = list(group)
        stretches.append(Stretch(indices[0], len(indices), len(kept), again))
        kept += indices if len(indices) <= TRACED else [*indices[: TRACED - 1], indices[-1]]
    decoder.layers = nn.ModuleList(layers[index] for index in kept)
    kinds = getattr(decoder.config, "layer_types", None)
    if kinds is not None:  # the decoder looks up by place what kind of attention a layer has
        decoder.config.layer_types = [kinds[index] for index in kept]
    return stretches


def _anatomy(layer: nn.Module) -> tuple[Any, ...]:
    """What makes two layers hold the same bytes: their modules, with the shapes of their parameters and whatever is set on them."""
    return tuple(
        (
            name,
            type(module).__name__,
            tuple(tuple(parameter.shape) for parameter in module.parameters(recurse=False)),
            tuple(sorted((key, value) for key, value in vars(module).items() if isinstance(value, (int, float, str)) and key != "layer_idx")),
        )
        for name, module in layer.named_modules()
    )


def whole(moments: list[Moment], stretches: list[Stretch]) -> list[Moment]:
    """The moments of the whole model from those of its traced layers."""
    return [_with_left_out(moments, index, stretches) for index in range(len(moments))]


def _with_left_out(moments: list[Moment], index: int, stretches: list[Stretch]) -> Moment:
    """One moment with what the layers left out hold then. While a layer beside them is at work they stand on its far side, where they hold more."""
    moment = moments[index]
    held, number = moment.held.copy(), moment.layer
    for stretch in stretches:
        sides: list[tuple[Moment, int | None]] = [(moment, number)]
        if moment.layer is not None and 0 <= (place := moment.layer - stretch.place) < stretch.traced:
            inner = 0 < place < stretch.traced - 1
            step = (moments[index + 1].layer or 0) - moment.layer if inner else 0  # -1 in a backward pass
            low: tuple[Moment, int | None] = (moments[index - step * place], stretch.start + place)
            high: tuple[Moment, int | None] = (moments[index + step * (stretch.traced - 1 - place)], stretch.start + place + stretch.left_out)
            sides = [low] * (moment.layer <= stretch.middle) + [high] * (moment.layer >= stretch.middle)
        alike = [({kind: size for (layer, kind), size in side.held.items() if layer == stretch.middle}, real) for side, real in sides]
        extra, number = max(alike, key=lambda side: sum(side[0].values()))
        for kind, size in extra.items():
            held[None, kind] += stretch.left_out * size
    return Moment(moment.name, number, held)


def _materialise(model: nn.Module) -> None:
    """Gives every tensor of a model on the meta device its place: a fake one. Those that modules share stay shared."""
    made: dict[int, tuple[Tensor, Tensor]] = {}  # the old ones are held, so that no id comes twice

    def fake(old: Tensor) -> Tensor:
        if id(old) not in made:
            new = torch.empty(old.shape, dtype=old.dtype, device=CPU)
            made[id(old)] = (old, nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new)
        return made[id(old)][1]

    for module in model.modules():
        tensors: Any
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = _packed(module) if name == "weight" and isinstance(module, Linear4bit) else fake(tensor)


def _packed(linear: Any) -> nn.Parameter:
    """A 4-bit weight with the constants that bitsandbytes keeps beside it; its own class cannot be fake."""

    def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=CPU)

    numbers, old = linear.in_features * linear.out_features, linear.weight
    blocks, nested = -(-numbers // old.blocksize), None
    if old.compress_statistics:
        nested = QuantState(make(-(-blocks // BLOCK_OF_CONSTANTS)), code=make(256), blocksize=BLOCK_OF_CONSTANTS, dtype=torch.float32)
    weight = nn.Parameter(make(-(-numbers // 2), 1, dtype=torch.uint8), requires_grad=False)
    weight.quant_state = QuantState(  # type: ignore[attr-defined]
        make(blocks, dtype=torch.uint8 if nested else torch.float32), shape=torch.Size((linear.out_features, linear.in_features)), code=make(16),
        blocksize=old.blocksize, quant_type=old.quant_type, dtype=linear.compute_dtype, offset=make() if nested else None, state2=nested,
    )  # fmt: skip
    return weight


class _FusedDropout(nn.Dropout):
    """Dropout as CUDA runs it, whose mask is one byte a number; a CPU's is as wide as its input."""

    def forward(self, numbers: Tensor) -> Tensor:
        dropped: Tensor = torch.native_dropout(numbers, self.p, self.training)[0]
        return dropped


def _use_fused_dropout(model: nn.Module) -> None:
    for module in model.modules():
        for name, child in module.named_children():
            if type(child) is nn.Dropout and child.p:
                module._modules[name] = _FusedDropout(child.p)
