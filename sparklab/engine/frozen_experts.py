"""The experts of one layer without adapters, as one autograd function that keeps gate_up [S, 2I] and the order of the rows.

Shapes as in :mod:`sparklab.model.experts`. Adapters on attention alone leave a mixture's experts as they are: these only hand a gradient through, to
the input and to the shares of the router. transformers' way keeps the sorted rows' inner tensors and their outputs [S, H], masks what no expert got,
and sums the gradient of the rows chosen by adding them up one by one.

All that follows the gate is linear, so a token's share is applied where its rows are summed, forward and backward, and a row's gradient with respect
to its share is taken on the small side: ``<dy, W h> = <W^T dy, h>``. Nothing here looks at a number or waits for the device.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparklab.engine.lora import mixed
from sparklab.engine.mlp import Gate, gate_of
from sparklab.model.experts import PROJECTIONS, Route, stack_of, why_stock

OLDEST: Final = (8, 0)
"""The compute capability from which on CUDA has grouped products."""


class _FrozenExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shares: Tensor, index: Tensor, module: Any, act: Gate | None) -> Tensor:
        up, down = (stack_of(module, name) for name in PROJECTIONS)
        route = Route.of(index, module.num_experts, up.bias is not None)
        gate_up = up.forward(x[route.token_S], route.ends_E)
        if up.bias is not None:
            gate_up.add_(up.bias[route.expert_S])
        inner = module._apply_gate(gate_up) if act is None else act.halves_product(gate_up)
        out = down.forward(inner, route.ends_E)
        del inner
        if down.bias is not None:
            out.add_(down.bias[route.expert_S])
        ctx.save_for_backward(shares, gate_up, route.token_S, route.place_TK, route.ends_E, route.expert_S)
        ctx.module, ctx.act = module, act
        return route.gather_sum(out, shares)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        shares, gate_up, *places = ctx.saved_tensors
        route, module = Route(*places), ctx.module
        up, down = (stack_of(module, name) for name in PROJECTIONS)
        d_rows = d_out[route.token_S]
        d_inner = down.backward(d_rows, route.ends_E)
        along = None if down.bias is None else (d_rows * down.bias[route.expert_S]).sum(-1, dtype=torch.float32)
        del d_rows
        d_gate_up, d_share_S = _through_the_gate(module, ctx.act, gate_up, d_inner)
        del d_inner, gate_up
        if along is not None:
            d_share_S += along
        d_x = route.gather_sum(up.backward(d_gate_up, route.ends_E), shares) if ctx.needs_input_grad[0] else None
        return d_x, d_share_S[route.place_TK].to(shares.dtype), None, None, None


def _through_the_gate(module: Any, act: Gate | None, gate_up: Tensor, d_inner: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of gate_up before shares, and each row's of its share, without biases."""
    if act is not None:
        along = act.halves_gradients_(d_inner, gate_up)
        return gate_up, along
    with torch.enable_grad():  # the gate as the model has it, whatever it is
        leaf = gate_up.detach().requires_grad_()
        inner = module._apply_gate(leaf)
    along = (d_inner * inner.detach()).sum(-1, dtype=torch.float32)
    (d_gate_up,) = torch.autograd.grad(inner, leaf, d_inner)
    return d_gate_up, along


class FrozenExperts:
    """Mixed into the class of a transformers module of experts."""

    fast_act: Gate | None

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs or len(args) != len(("index", "shares")) or not _is_plain(self, hidden_states):
            slow: Tensor = super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
            return slow
        index, shares = args
        out: Tensor = _FrozenExperts.apply(hidden_states, shares, index, self, self.fast_act)  # type: ignore[no-untyped-call]
        return out


def _is_plain(module: Any, x: Tensor) -> bool:
    """Whether the experts learn nothing, have no adapters (whose sum with the weights learns), are all here, and compute in x's type."""
    stacks = [stack_of(module, name) for name in PROJECTIONS]
    parts = [part for stack in stacks for part in (stack.weight, stack.bias) if part is not None]
    ours = all(not part.requires_grad and part.dtype == x.dtype for part in parts)
    return ours and not getattr(module, "_is_expert_parallel", False) and not torch.is_autocast_enabled(x.device.type)


def _plain_gate(module: Any) -> Gate | None:
    """What is known of the gate, by what it does to numbers large and small; None where it is another one, which then computes as the model has it."""
    if (act := gate_of(module.act_fn) if hasattr(module, "act_fn") else None) is None:
        return None
    some = torch.cat((torch.linspace(-6, 6, 101), torch.logspace(1, 12, 12), -torch.logspace(1, 12, 12)))
    probe = torch.cat((some, some.roll(7)))[None]
    gate, up = probe.chunk(2, -1)
    with torch.no_grad():
        return act if torch.equal(module._apply_gate(probe), act.value(gate) * up) else None


def take_over(module: Any) -> bool:
    """Puts the fast path into experts that it knows; whether it does. An old GPU has no grouped products."""
    device = getattr(module, PROJECTIONS[0]).device
    if why_stock(module) or (device.type == "cuda" and torch.cuda.get_device_capability(device) < OLDEST):
        return False
    module.fast_act = _plain_gate(module)
    module.__class__ = mixed(type(module), FrozenExperts)  # type: ignore[arg-type]
    return True
