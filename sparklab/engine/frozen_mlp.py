"""The gated MLP ``down(act(gate(x)) * up(x))`` without adapters, as one autograd function that keeps gate and up alone.

Shapes as in :mod:`sparklab.engine.mlp`. Where adapters sit on attention only, and in a mixture's dense MLPs and shared experts, these layers only hand a
gradient through: no weight has one, so x is not kept, and neither is what the activation makes of the gate nor its product with up. The backward
pass makes the activation once more and writes both gradients over tensors that are at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sparklab.engine.lora import KINDS, Buffer, Frozen, mixed
from sparklab.engine.mlp import Gate, gate_of

NAMES = ("gate_proj", "up_proj", "down_proj")


class _FrozenMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bases: Sequence[Frozen], act: Gate) -> Tensor:
        gate_base, up_base, down_base = bases
        flat_TI = x.reshape(-1, x.shape[-1])
        gate_TF, up_TF = gate_base(flat_TI), up_base(flat_TI)
        out = down_base(act.product(gate_TF, up_TF))
        ctx.save_for_backward(gate_TF, up_TF)
        ctx.bases, ctx.act = bases, act
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        gate_TF, up_TF = ctx.saved_tensors
        gate_base, up_base, down_base = ctx.bases
        d_inner = grad.reshape(-1, grad.shape[-1]) @ down_base.weight
        d_gate, d_up = ctx.act.gradients_(d_inner, gate_TF, up_TF)
        d_x = (d_gate @ gate_base.weight).addmm_(d_up, up_base.weight)
        return d_x.view(grad.shape), None, None


class FrozenMLP:
    """Mixed into the class of a transformers MLP whose forward pass is the one above."""

    fast_act: Gate
    fast_bases: tuple[Frozen, ...]

    def forward(self: Any, x: Tensor) -> Tensor:
        if not all(_is_plain(base, getattr(self, name), x) for base, name in zip(self.fast_bases, NAMES, strict=True)):
            slow: Tensor = super().forward(x)  # type: ignore[misc]
            return slow
        out: Tensor = _FrozenMLP.apply(x, self.fast_bases, self.fast_act)  # type: ignore[no-untyped-call]
        return out


def _is_plain(base: Frozen, layer: Any, x: Tensor) -> bool:
    """Whether the layer still is the one that was taken over, without adapters, learns nothing, and computes in x's type."""
    trained = layer.weight.requires_grad or (layer.bias is not None and layer.bias.requires_grad) if base.linear is layer else True
    return not trained and base.dtype == x.dtype and not torch.is_autocast_enabled(x.device.type)


def take_over(block: Any, buffer: Buffer) -> bool:
    """Puts the fast path into an MLP that computes what is said above; whether its layers and its activation are such that it can."""
    layers: list[nn.Module] = [getattr(block, name) for name in NAMES]
    if any(type(layer).__name__ not in KINDS or hasattr(layer, "lora_A") for layer in layers) or (act := gate_of(block.act_fn)) is None:
        return False
    block.fast_act, block.fast_bases = act, tuple(Frozen(layer, buffer) for layer in layers)
    block.__class__ = mixed(type(block), FrozenMLP)  # type: ignore[arg-type]
    return True
