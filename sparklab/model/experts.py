"""LoRA on the experts of a mixture, without ever making the changed weights of a layer.

PEFT targets a 3-D parameter by adding ``scaling * B @ A`` to the whole stack in every forward pass, and keeps the sum for the backward pass: one
more copy of all experts, layer by layer. Here the low-rank products run beside the base's, on the tokens sent to each expert:
``y = x W^T + scaling (x A^T) B^T``, as grouped products over the tokens sorted by expert.

PEFT stays the owner: :class:`ParamWrapper` is its own wrapper, put in at its seam for custom modules, with its parameters, names and files. Only
``forward`` differs, so a saved adapter loads in plain PEFT and merges to the same weights.

Shapes: T tokens, k experts each, S = k * T rows sorted by expert, E experts, H hidden, I inside an expert, R the rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora import ParamWrapper as StockWrapper
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sparklab.model import expert_kernels

PROJECTIONS = ("gate_up_proj", "down_proj")
BYTE: Final = 256  # experts that one byte can number


@dataclass(frozen=True)
class Stack:
    """The weights of one projection of all experts, as products need them. Held in 4 bits they would be another class with these two methods."""

    weight: Tensor
    """[E, out, in], or [E, in, out] where the model keeps them ``transposed``."""
    bias: Tensor | None
    """[E, out]"""
    transposed: bool

    def forward(self, rows: Tensor, ends_E: Tensor) -> Tensor:
        """[S, in] to [S, out], without the bias."""
        return F.grouped_mm(rows, self.weight if self.transposed else self.weight.transpose(1, 2), offs=ends_E)

    def backward(self, grads: Tensor, ends_E: Tensor) -> Tensor:
        """[S, out] to [S, in]."""
        return F.grouped_mm(grads, self.weight.transpose(1, 2) if self.transposed else self.weight, offs=ends_E)


@dataclass(frozen=True)
class LowRank:
    """One projection's adapters in the type that computes. The rank is filled up with zeros to what grouped products on CUDA ask for."""

    a_ERI: Tensor  # noqa: N815
    b_EOR: Tensor  # noqa: N815
    scaling: float
    rank: int

    @classmethod
    def of(cls, a: Tensor, b: Tensor, experts: int, scaling: float, dtype: torch.dtype) -> LowRank:
        """From PEFT's two matrices: A [E * R, in], expert after expert, and B [out, R * E], rank after rank."""
        a_ERI = a.to(dtype).view(experts, -1, a.shape[1])
        rank = a_ERI.shape[1]
        b_EOR = b.to(dtype).view(b.shape[0], rank, experts).permute(2, 0, 1)
        fill = -rank % (16 // dtype.itemsize)  # rows of 16 bytes
        return cls(F.pad(a_ERI, (0, 0, 0, fill)) if fill else a_ERI, F.pad(b_EOR, (0, fill)) if fill else b_EOR.contiguous(), scaling, rank)

    def down(self, rows: Tensor, ends_E: Tensor) -> Tensor:
        """[S, in] to [S, R]."""
        return F.grouped_mm(rows, self.a_ERI.transpose(1, 2), offs=ends_E)

    def add_up(self, low: Tensor, ends_E: Tensor, out: Tensor) -> Tensor:
        """``out`` [S, out] plus the scaled product of [S, R] with B, in its place."""
        return out.add_(F.grouped_mm(low, self.b_EOR.transpose(1, 2), offs=ends_E), alpha=self.scaling)

    def up_backward(self, grads: Tensor, ends_E: Tensor) -> Tensor:
        """[S, out] to [S, R], not scaled."""
        return F.grouped_mm(grads, self.b_EOR, offs=ends_E)

    def add_down_backward(self, low: Tensor, ends_E: Tensor, out: Tensor) -> Tensor:
        """``out`` [S, in] plus the scaled product of [S, R] with A, in its place."""
        return out.add_(F.grouped_mm(low, self.a_ERI, offs=ends_E), alpha=self.scaling)

    def gradients(self, rows: Tensor, low: Tensor, grads: Tensor, d_low: Tensor, ends_E: Tensor) -> tuple[Tensor, Tensor]:
        """Of A and of B, in PEFT's shapes, from [S, in], [S, R], [S, out] and [S, R]."""
        d_a = F.grouped_mm(d_low.t(), rows, offs=ends_E).mul_(self.scaling)[:, : self.rank]
        d_b = F.grouped_mm(grads.t(), low, offs=ends_E).mul_(self.scaling)[:, :, : self.rank]
        return d_a.reshape(-1, d_a.shape[-1]), d_b.permute(1, 2, 0).reshape(d_b.shape[1], -1)


@dataclass(frozen=True)
class Route:
    """Which rows go where."""

    token_S: Tensor  # noqa: N815 - of each sorted row
    place_TK: Tensor  # noqa: N815 - of each token's choices among the sorted rows
    ends_E: Tensor  # noqa: N815 - after the last row of each expert
    expert_S: Tensor | None  # noqa: N815 - of each sorted row, where there are biases

    @classmethod
    def of(cls, index_TK: Tensor, experts: int, biased: bool) -> Route:
        """Sorts the choices by expert; a token's stay in their order. Sorting passes over every byte of a key, so keys are as short as can be."""
        key, device = torch.uint8 if experts <= BYTE else torch.int16, index_TK.device
        expert_S, order = torch.sort(index_TK.reshape(-1).to(key), stable=True)
        ends = torch.searchsorted(expert_S, torch.arange(experts, dtype=key, device=device), right=True, out_int32=True)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=device))
        return cls(order // index_TK.shape[1], place.view(index_TK.shape), ends, expert_S.int() if biased else None)

    def gather_sum(self, rows: Tensor, shares_TK: Tensor | None) -> Tensor:
        """[S, H] rows summed by token in fp32, each times its share: [T, H], in one kernel that makes no second [S, H].

        torch's takes shares in the rows' own type: wider ones are two narrow numbers, of which the second is what the first leaves.
        """
        if (summed := expert_kernels.gather_sum(rows, self.place_TK, shares_TK)) is not None:
            return summed
        places, shares = self.place_TK, shares_TK
        if shares is not None and shares.dtype != rows.dtype:
            near = shares.to(rows.dtype)
            places, shares = torch.cat((places, places), 1), torch.cat((near, (shares - near).to(rows.dtype)), 1)
        flat, each = places.reshape(-1), places.shape[1]
        starts = torch.arange(0, len(flat), each, device=rows.device)
        weights = None if shares is None else shares.reshape(-1)
        total: Tensor = torch.ops.aten._embedding_bag_forward_only(rows, flat, starts, False, 0, False, weights)[0]
        return total


class _Experts(torch.autograd.Function):
    """Keeps the input and gate_up [S, 2I] with the low-rank rows [S, R]; makes the rest again, with the share's gradient from the small side:
    ``<dy, W h> = <W^T dy, h>``, so the output [S, H] is not kept either."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shares: Tensor, index: Tensor, a_up: Tensor, b_up: Tensor, a_down: Tensor, b_down: Tensor,
                module: Any, scalings: tuple[float, float]) -> Tensor:  # fmt: skip
        up, down, experts = stack_of(module, PROJECTIONS[0]), stack_of(module, PROJECTIONS[1]), module.num_experts
        route = Route.of(index, experts, up.bias is not None)
        low_up = LowRank.of(a_up, b_up, experts, scalings[0], x.dtype)
        rows = x[route.token_S]
        gate_up = up.forward(rows, route.ends_E)
        low_1 = low_up.down(rows, route.ends_E)
        del rows
        low_up.add_up(low_1, route.ends_E, gate_up)
        del low_up
        if up.bias is not None:
            gate_up.add_(up.bias[route.expert_S])
        inner = module._apply_gate(gate_up)
        low_down = LowRank.of(a_down, b_down, experts, scalings[1], x.dtype)
        low_2 = low_down.down(inner, route.ends_E)
        out = down.forward(inner, route.ends_E)
        del inner
        low_down.add_up(low_2, route.ends_E, out)
        if down.bias is not None:
            out.add_(down.bias[route.expert_S])
        result = route.gather_sum(out, shares)
        ctx.save_for_backward(x, shares, a_up, b_up, a_down, b_down, gate_up, low_1, low_2, route.token_S, route.place_TK, route.ends_E, route.expert_S)
        ctx.module, ctx.scalings = module, scalings
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Any, ...]:
        x, shares, a_up, b_up, a_down, b_down, gate_up, low_1, low_2, *places = ctx.saved_tensors
        route, module = Route(*places), ctx.module
        up, down, experts = stack_of(module, PROJECTIONS[0]), stack_of(module, PROJECTIONS[1]), module.num_experts
        ends, share_S = route.ends_E, torch.empty(len(route.token_S), dtype=x.dtype, device=x.device)
        share_S[route.place_TK.reshape(-1)] = shares.reshape(-1).to(x.dtype)
        with torch.enable_grad():  # the gate as the model has it, whatever it is
            leaf = gate_up.detach().requires_grad_()
            inner = module._apply_gate(leaf)
        low = LowRank.of(a_down, b_down, experts, ctx.scalings[1], x.dtype)
        d_rows = d_out[route.token_S]
        d_low = low.up_backward(d_rows, ends)
        d_inner = low.add_down_backward(d_low, ends, down.backward(d_rows, ends))
        d_share_S = (d_inner * inner.detach()).sum(-1, dtype=torch.float32)
        if down.bias is not None:
            d_share_S += (d_rows * down.bias[route.expert_S]).sum(-1, dtype=torch.float32)
        d_share = d_share_S[route.place_TK].to(shares.dtype)
        d_a_down, d_b_down = low.gradients(inner.detach(), low_2.mul(share_S[:, None]), d_rows, d_low.mul_(share_S[:, None]), ends)
        del d_rows, low
        (d_gate_up,) = torch.autograd.grad(inner, leaf, d_inner.mul_(share_S[:, None]))
        del inner, leaf, d_inner
        low = LowRank.of(a_up, b_up, experts, ctx.scalings[0], x.dtype)
        d_low = low.up_backward(d_gate_up, ends)
        d_a_up, d_b_up = low.gradients(x[route.token_S], low_1, d_gate_up, d_low, ends)
        d_x = None
        if ctx.needs_input_grad[0]:
            d_rows = low.add_down_backward(d_low, ends, up.backward(d_gate_up, ends))
            del d_gate_up
            d_x = route.gather_sum(d_rows, None)
        given = (d_a_up, d_b_up, d_a_down, d_b_down)
        return d_x, d_share, None, *(gradient.to(a.dtype) for gradient, a in zip(given, (a_up, b_up, a_down, b_down), strict=True)), None, None


def stack_of(module: Any, name: str) -> Stack:
    """One projection of a module of experts, however it is held."""
    return Stack(getattr(module, name), getattr(module, f"{name}_bias") if module.has_bias else None, module.is_transposed)


class ParamWrapper(StockWrapper):  # type: ignore[misc]  # peft is not typed
    """PEFT's wrapper of one 3-D parameter, whose forward pass never adds to it. Its name is PEFT's, which knows such wrappers by it.

    The wrapper of one projection stands in that of the other; the outer one sees both. What is not one adapter on both, in use and not merged,
    runs as PEFT has it.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[T, H] to [T, H]; ``args``: experts chosen [T, k], their shares [T, k]."""
        inner, active = self.base_layer, list(self.active_adapters)
        plain = len(active) == 1 and not self.disable_adapters and not kwargs and len(args) == len(("index", "shares"))
        if not plain or not isinstance(inner, ParamWrapper) or any(wrapper.merged or active[0] not in wrapper.lora_A for wrapper in (self, inner)):
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        (adapter,) = active
        by_name = {wrapper.parameter_name: wrapper for wrapper in (self, inner)}
        up, down = (by_name[name] for name in PROJECTIONS)
        factors = [part[adapter].weight for wrapper in (up, down) for part in (wrapper.lora_A, wrapper.lora_B)]
        out: Tensor = _Experts.apply(x, args[1], args[0], *factors, self.get_base_layer(), (up.scaling[adapter], down.scaling[adapter]))  # type: ignore[no-untyped-call]
        return out


def expert_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, module) of each layer's experts: those that hold the two projections as 3-D parameters."""
    for name, module in model.named_modules():
        held = [parameter for projection in PROJECTIONS if isinstance(parameter := getattr(module, projection, None), nn.Parameter)]
        if len(held) == len(PROJECTIONS) and all(parameter.dim() == 3 for parameter in held):
            yield name, module


def why_stock(module: Any) -> str:
    """Why these experts cannot run without making the changed weights; empty where they can."""
    if not hasattr(module, "_apply_gate") or not getattr(module, "has_gate", False):
        return "their gate is not where transformers' experts have it"
    if getattr(module, "has_post_expert_norm", False):
        return "they end in a norm of their own"
    return ""


def target_experts(config: LoraConfig, model: nn.Module, fast: bool) -> None:
    """Puts the experts of all layers among what ``config`` adapts; ``fast``: with our forward pass, where it knows them."""
    config.target_parameters = [f"experts.{projection}" for projection in PROJECTIONS]
    known = {type(module) for _, module in expert_modules(model) if not why_stock(module)}
    if fast and known:
        config._register_custom_module(dict.fromkeys(known, ParamWrapper))


def left_to_stock(model: nn.Module) -> tuple[str, ...]:
    """Why adapters on experts run on PEFT's own, slower way; nothing where they do not."""
    wrappers: list[Any] = [module for module in model.modules() if type(module) is StockWrapper]
    reasons = {why_stock(wrapper.get_base_layer()) for wrapper in wrappers} - {""}
    return tuple(f"adapters on the experts make all changed weights of a layer in every pass, as PEFT does: {reason}" for reason in sorted(reasons))
