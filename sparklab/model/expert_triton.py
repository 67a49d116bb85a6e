"""The kernels of :mod:`sparklab.model.expert_kernels`, in Triton. Loaded on CUDA alone.

Shapes as in :mod:`sparklab.model.experts`. All is computed in fp32 and rounded once, when it is written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST: int = 1024  # numbers that one block takes


@triton.jit  # type: ignore[untyped-decorator]
def _product(gate_up, out, inner, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < inner
    gate = tl.load(gate_up + row * 2 * inner + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * inner + inner + column, mask=inside, other=0.0).to(tl.float32)
    made = gate * tl.sigmoid(gate) * up
    tl.store(out + row * inner + column, made.to(out.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _gradients(grad, gate_up, along, inner, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, inner, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < inner
        gates = gate_up + row * 2 * inner + column
        gate = tl.load(gates, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gates + inner, mask=inside, other=0.0).to(tl.float32)
        given = tl.load(grad + row * inner + column, mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        d_up = given * gate * sigmoid
        total += d_up * up
        d_gate = given * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
        tl.store(gates + inner, d_up.to(gate_up.dtype.element_ty), mask=inside)
        tl.store(gates, d_gate.to(gate_up.dtype.element_ty), mask=inside)
    tl.store(along + row, tl.sum(total, axis=0))


@triton.jit  # type: ignore[untyped-decorator]
def _sum(rows, places, shares, out, width, stride, CHOICES: tl.constexpr, WEIGHED: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for choice in tl.static_range(CHOICES):
        place = tl.load(places + token * CHOICES + choice)
        part = tl.load(rows + place * stride + column, mask=inside, other=0.0).to(tl.float32)
        if WEIGHED:
            part = part * tl.load(shares + token * CHOICES + choice).to(tl.float32)
        total += part
    tl.store(out + token * width + column, total.to(out.dtype.element_ty), mask=inside)


def _block(width: int) -> int:
    return min(MOST, triton.next_power_of_2(width))  # type: ignore[no-any-return]


def product(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of the halves [S, I] of one tensor [S, 2I]."""
    rows, inner = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, inner, dtype=gate_up.dtype, device=gate_up.device)
    block = _block(inner)
    _product[(rows, triton.cdiv(inner, block))](gate_up, out, inner, BLOCK=block)
    return out


def gradients_(grad: Tensor, gate_up: Tensor) -> Tensor:
    """The gradients of both halves over them, from that of their product; returned is each row's product with it, [S] in fp32."""
    rows, inner = grad.shape
    along = torch.empty(rows, dtype=torch.float32, device=grad.device)
    _gradients[(rows,)](grad, gate_up, along, inner, BLOCK=_block(inner))
    return along


def gather_sum(rows: Tensor, places: Tensor, shares: Tensor | None) -> Tensor:
    """[S, H] summed by token, each row times its share; places and shares [T, k]."""
    tokens, width = places.shape[0], rows.shape[1]
    out = torch.empty(tokens, width, dtype=rows.dtype, device=rows.device)
    block = _block(width)
    _sum[(tokens, triton.cdiv(width, block))](
        rows, places, places if shares is None else shares, out, width, rows.stride(0), CHOICES=places.shape[1], WEIGHED=shares is not None, BLOCK=block
    )
    return out
