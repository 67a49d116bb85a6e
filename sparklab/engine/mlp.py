"""The gated MLP ``down(act(gate(x)) * up(x))`` with adapters on all three, as one autograd function.

Shapes as in :mod:`sparklab.engine.lora`; I is the model's width, F the MLP's. Kept for the backward pass: x, gate and up [T, F] and the low-rank tensors
[T, R]; what the activation makes of the gate, and its product with up, are made again there, from tensors that are at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sparklab.engine import liger
from sparklab.engine.lora import Adapters, Lora, adapted, d_b, d_low, gradient_of_input, joined, low_rank
from sparklab.model import expert_kernels

_aten: Final = torch.ops.aten


@dataclass(frozen=True)
class Gate:
    """An activation: its value, and the gradient of its input from that of its value and the input, written where the third says."""

    name: str
    value: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor], Tensor]

    def product(self, gate: Tensor, up: Tensor) -> Tensor:
        """``act(gate) * up``; on CUDA by Liger's kernel where it is to be had."""
        fused = liger.gated(self.name, gate, up)
        return self.value(gate).mul_(up) if fused is None else fused

    def gradients_(self, grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of gate and up from that of their product, written over it, or by Liger's kernel over gate and up: none is good afterwards."""
        fused = liger.gated_backward_(self.name, grad, gate, up)
        if fused is not None:
            return fused
        d_up = self.value(gate).mul_(grad)
        return self.backward(grad.mul_(up), gate, grad), d_up

    def halves_product(self, gate_up: Tensor) -> Tensor:
        """``act(gate) * up`` of the two halves [S, F] of one tensor [S, 2F]."""
        made = expert_kernels.product(gate_up) if self.name == "silu" else None
        if made is not None:
            return made
        gate, up = gate_up.chunk(2, -1)
        return self.value(gate).mul_(up)

    def halves_gradients_(self, grad: Tensor, gate_up: Tensor) -> Tensor:
        """The gradient of both halves from that of their product, written over them; returned is each row's product with its gradient, [S] in fp32."""
        summed = expert_kernels.gradients_(grad, gate_up) if self.name == "silu" else None
        if summed is not None:
            return summed
        gate, up = gate_up.chunk(2, -1)
        act, d_act = self.value(gate), grad * up
        torch.mul(grad, act, out=up)
        along = act.mul_(d_act).sum(-1, dtype=torch.float32)
        self.backward(d_act, gate, gate)
        return along


def _silu_backward(grad: Tensor, x: Tensor, out: Tensor) -> Tensor:
    made: Tensor = _aten.silu_backward.grad_input(grad, x, grad_input=out)
    return made


def _gelu_backward(grad: Tensor, x: Tensor, out: Tensor, approximate: str) -> Tensor:
    made: Tensor = _aten.gelu_backward.grad_input(grad, x, approximate=approximate, grad_input=out)
    return made


_SILU: Final = Gate("silu", F.silu, _silu_backward)
_GELU: Final = Gate("gelu", F.gelu, partial(_gelu_backward, approximate="none"))
_GELU_TANH: Final = Gate("gelu_tanh", partial(F.gelu, approximate="tanh"), partial(_gelu_backward, approximate="tanh"))


def gate_of(activation: nn.Module) -> Gate | None:
    """What is known of an activation, by what it does to numbers; None where it is another one."""
    probe = torch.linspace(-6, 6, 101)
    for known in (_SILU, _GELU, _GELU_TANH):
        with torch.no_grad():
            if torch.equal(activation(probe), known.value(probe)):
                return known
    return None


class _GatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: Sequence[Adapters], act: Gate, *matrices: Tensor) -> Tensor:
        gate_part, up_part, down_part = layers
        flat_TI = x.reshape(-1, x.shape[-1])
        low_TR = low_rank(flat_TI, (gate_part.a, up_part.a))
        low_gate, low_up = torch.split(low_TR, [gate_part.a.shape[0], up_part.a.shape[0]], 1)
        gate_TF = adapted(flat_TI, low_gate, gate_part.base, gate_part.b, gate_part.scaling)
        up_TF = adapted(flat_TI, low_up, up_part.base, up_part.b, up_part.scaling)
        inner_TF = act.product(gate_TF, up_TF)
        low_down = low_rank(inner_TF, (down_part.a,))
        out = adapted(inner_TF, low_down, down_part.base, down_part.b, down_part.scaling)
        ctx.save_for_backward(x, gate_TF, up_TF, low_TR, low_down, *matrices)
        ctx.layers, ctx.act = [(layer.base, layer.scaling) for layer in layers], act
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gate_TF, up_TF, low_TR, low_down, a_gate, a_up, a_down, b_gate, b_up, b_down = ctx.saved_tensors
        (gate_base, s_gate), (up_base, s_up), (down_base, s_down) = ctx.layers
        low_gate, low_up = torch.split(low_TR, [a_gate.shape[0], a_up.shape[0]], 1)
        flat_TI, grad_TI = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])

        d_low_down = d_low(grad_TI, b_down, s_down)
        d_b_down = d_b(grad_TI, low_down, s_down, b_down)
        d_inner = gradient_of_input([(grad_TI, down_base)], d_low_down, a_down.to(grad.dtype))
        act_TF = None if liger.gates(ctx.act.name, gate_TF) else ctx.act.value(gate_TF)
        inner_TF = ctx.act.product(gate_TF, up_TF) if act_TF is None else act_TF * up_TF
        d_a_down = (d_low_down.t() @ inner_TF).to(a_down.dtype)
        if act_TF is None:
            d_gate, d_up = ctx.act.gradients_(d_inner, gate_TF, up_TF)
        else:
            d_gate = ctx.act.backward(torch.mul(d_inner, up_TF, out=inner_TF), gate_TF, inner_TF)
            d_up = d_inner.mul_(act_TF)
        del act_TF, inner_TF, d_inner

        d_low_TR = torch.cat((d_low(d_gate, b_gate, s_gate), d_low(d_up, b_up, s_up)), 1)
        d_b_gate, d_b_up = d_b(d_gate, low_gate, s_gate, b_gate), d_b(d_up, low_up, s_up, b_up)
        d_x = None
        if ctx.needs_input_grad[0]:
            d_x = gradient_of_input([(d_gate, gate_base), (d_up, up_base)], d_low_TR, joined((a_gate, a_up), grad.dtype)).view_as(x)
        d_a_gate, d_a_up = (d_low_TR.t() @ flat_TI).split([a_gate.shape[0], a_up.shape[0]])
        return (d_x, None, None, d_a_gate.to(a_gate.dtype), d_a_up.to(a_up.dtype), d_a_down, d_b_gate, d_b_up, d_b_down)


class GatedMLP:
    """Mixed into the class of a transformers MLP whose forward pass is the one above."""

    fast_act: Gate

    def forward(self: Any, x: Tensor) -> Tensor:
        parts = (self.gate_proj, self.up_proj, self.down_proj)  # linear layers again once the adapters are merged and unloaded
        layers = [own for layer in parts if isinstance(layer, Lora) and (own := layer.plain(x)) is not None]
        if len(layers) < 3:
            slow: Tensor = super().forward(x)  # type: ignore[misc]
            return slow
        out: Tensor = _GatedMLP.apply(x, layers, self.fast_act, *(layer.a for layer in layers), *(layer.b for layer in layers))  # type: ignore[no-untyped-call]
        return out
