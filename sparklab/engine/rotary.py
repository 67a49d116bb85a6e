"""Rotary positions: ``x * cos + rotate_half(x) * sin`` without the halves turned and joined, and nothing kept but the tables.

With the two halves of a head called a and b and a table whose halves are alike: ``(a cos - b sin, b cos + a sin)``; the gradient is the same turn
the other way. transformers calls it by a name in its own module, so a block's forward pass is run with that one name bound to this function: the same
code, another dictionary of globals, for one instance.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparklab.engine import liger
from sparklab.engine.norm import _body

NAME: Final = "apply_rotary_pos_emb"
_TURN: Final = "cos=cos.unsqueeze(unsqueeze_dim)sin=sin.unsqueeze(unsqueeze_dim)q_embed=(q*cos)+(rotate_half(q)*sin)k_embed=(k*cos)+(rotate_half(k)*sin)"
_HALVES: Final = "x1=x[...,:x.shape[-1]//2]x2=x[...,x.shape[-1]//2:]returntorch.cat((-x2,x1),dim=-1)"


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, sin, -1), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """x [1, heads, T, D] turned; in memory as [1, T, heads, D], the order in which projections write and read."""
    out = torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
    half = x.shape[-1] // 2
    cos, sin = cos[..., :half], sin[..., :half]
    (a, b), (out_a, out_b) = torch.split(x, half, -1), torch.split(out, half, -1)
    torch.mul(a, cos, out=out_a).addcmul_(b, sin, value=-sign)
    torch.mul(b, cos, out=out_b).addcmul_(a, sin, value=sign)
    return out


def apply(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """As transformers' function of that name; on CUDA by Liger's kernel where it is to be had."""
    if unsqueeze_dim == 1 and q.dim() == 4 and cos.dim() == 3 and (fused := liger.turn(q, k, cos, sin)) is not None:
        return fused
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return _Turn.apply(q, cos, sin), _Turn.apply(k, cos, sin)  # type: ignore[no-untyped-call]


@cache
def with_our_turn(forward: Callable[..., Any]) -> Callable[..., Any] | None:
    """A block's forward pass that turns by :func:`apply`; None where its module turns in another way, or the pass is wrapped in something."""
    if not isinstance(forward, types.FunctionType) or NAME not in forward.__code__.co_names:
        return None
    stock = forward.__globals__.get(NAME)
    if not isinstance(stock, types.FunctionType):
        return None
    body = _body(stock).split('"""')[-1]
    if not body.startswith(_TURN) or body != _TURN + "returnq_embed,k_embed" or _body(stock.__globals__.get("rotate_half")).split('"""')[-1] != _HALVES:
        return None
    ours = types.FunctionType(forward.__code__, {**forward.__globals__, NAME: apply}, forward.__name__, forward.__defaults__, forward.__closure__)
    ours.__kwdefaults__ = forward.__kwdefaults__
    return ours
