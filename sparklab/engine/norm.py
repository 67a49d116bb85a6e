"""RMSNorm in its three spellings, as one autograd function that keeps its input and one fp32 number a row.

Shapes: N rows of W numbers, n = x / sqrt(mean(x^2) + eps). Llama: ``w * n`` with n rounded to x's type first; OLMo: ``w * n`` rounded last; Gemma:
``(1 + w) * n`` rounded last. transformers keeps x in fp32 and more; here the backward pass is
``dx = r * (g - x * r^2 * mean(g * x))`` with r = 1 / sqrt(...) and g the output's gradient times the weight. On a CPU rows go through in blocks, so that
few numbers are in fp32 at once; on CUDA Liger's kernel does the same where it is to be had.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparklab.engine import liger
from sparklab.engine.device import on_gpu, to_do
from sparklab.planner.fused import NORM_BLOCK

_HEAD: Final = (
    "input_dtype=hidden_states.dtypehidden_states=hidden_states.to(torch.float32)variance=hidden_states.pow(2).mean(-1,keepdim=True)"
    "hidden_states=hidden_states*torch.rsqrt(variance+self.variance_epsilon)return"
)
SPELLINGS: Final = {
    _HEAD + "self.weight*hidden_states.to(input_dtype)": "llama",
    _HEAD + "(self.weight*hidden_states).to(input_dtype)": "olmo",
    "output=self._norm(x.float())output=output*(1.0+self.weight.float())returnoutput.type_as(x)": "gemma",
}
"""The bodies of transformers' forward passes, without blanks and comments, and what to call them."""
_GEMMA_NORM: Final = "returnx*torch.rsqrt(x.pow(2).mean(-1,keepdim=True)+self.eps)"


@cache
def spelling(kind: Any) -> str | None:
    """Which RMSNorm a class of transformers computes, by its own text; None where it is something else."""
    found = SPELLINGS.get(_body(kind.forward))
    return None if found == "gemma" and _body(getattr(kind, "_norm", None)) != _GEMMA_NORM else found


def _body(function: Any) -> str:
    """The text of a function below its signature, without comments and blanks; empty where there is none to read."""
    try:
        text = re.sub(r"#.*", "", inspect.getsource(inspect.unwrap(function)))
    except (OSError, TypeError):
        return ""
    return re.sub(r"\s+", "", re.sub(r"^.*?\)\s*(->[^:]*)?:\s*\n", "", text, count=1, flags=re.DOTALL))


def _blocks(x_NW: Tensor) -> Sequence[slice]:
    rows = len(x_NW) if on_gpu(x_NW) else max(1, NORM_BLOCK // x_NW.shape[1])
    return to_do([slice(start, start + rows) for start in range(0, len(x_NW), rows)])


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, kind: str) -> Tensor:
        x_NW = x.reshape(-1, x.shape[-1])
        out = torch.empty_like(x, memory_format=torch.contiguous_format)  # no view: some blocks write over what a norm gives them
        out_NW = out.view(x_NW.shape)
        root_N1 = x_NW.new_empty((len(x_NW), 1), dtype=torch.float32)
        factor = 1.0 + weight.float() if kind == "gemma" else weight
        for rows in _blocks(x_NW):
            wide, root, place = x_NW[rows].to(torch.float32, copy=True), root_N1[rows], out_NW[rows]
            torch.linalg.vector_norm(wide, dim=-1, keepdim=True, out=root).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
            wide.mul_(root)
            if kind == "llama":
                place.copy_(wide).mul_(factor)
            else:
                place.copy_(wide.mul_(factor))
        ctx.save_for_backward(x, weight, root_N1)
        ctx.kind = kind
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight, root_N1 = ctx.saved_tensors
        wants_x, wants_weight = ctx.needs_input_grad[:2]
        x_NW, grad_NW = x.reshape(-1, x.shape[-1]), grad.reshape(-1, x.shape[-1])
        d_x = torch.empty_like(x_NW) if wants_x else None
        d_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if wants_weight else None
        factor = 1.0 + weight.float() if ctx.kind == "gemma" else weight.float()
        for rows in _blocks(x_NW):
            wide, root = x_NW[rows].float(), root_N1[rows]
            slope = grad_NW[rows].to(torch.float32, copy=True)  # a product of two types would make a third tensor
            if d_weight is not None:
                d_weight += (slope * wide).mul_(root).sum(0)
            if d_x is not None:
                mean = (slope.mul_(factor) * wide).sum(-1, keepdim=True).mul_(root).mul_(root).div_(-x.shape[-1])
                d_x[rows] = slope.addcmul_(wide, mean).mul_(root)
        return None if d_x is None else d_x.view(x.shape), None if d_weight is None else d_weight.to(weight.dtype), None, None


class RMSNorm:
    """Mixed into the class of a transformers norm whose spelling is known."""

    fast_kind: str
    fast_eps: float

    def forward(self: Any, x: Tensor) -> Tensor:
        if self.weight.dtype != x.dtype:  # transformers' type promotion is its own
            slow: Tensor = super().forward(x)  # type: ignore[misc]
            return slow
        fused = liger.norm(x, self.weight, self.fast_eps, self.fast_kind)
        if fused is not None:
            return fused
        out: Tensor = _RMSNorm.apply(x, self.weight, self.fast_eps, self.fast_kind)  # type: ignore[no-untyped-call]
        return out
