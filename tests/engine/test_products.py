"""Attention's backward pass as products against the same in fp64, beside flash attention's own in bf16."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparklab.engine import products
from sparklab.planner.products import MULTIPLE, NUMBERS, ROWS, held_bytes, sizes

_aten = torch.ops.aten


def case(length: int, heads: int, groups: int, width: int, loud: float) -> tuple[Tensor, ...]:
    torch.manual_seed(length)
    query, grad = (torch.randn(1, heads, length, width) for _ in range(2))
    key, value = (torch.randn(1, groups, length, width) for _ in range(2))
    return tuple(tensor.bfloat16() for tensor in (query * loud, key, value, grad))


def in_fp64(query: Tensor, key: Tensor, value: Tensor, grad: Tensor, scale: float) -> tuple[Tensor, ...]:
    q, k, v = (tensor.double().requires_grad_() for tensor in (query, key, value))
    shared, length = q.shape[1] // k.shape[1], q.shape[2]
    scores = q @ k.repeat_interleave(shared, 1).transpose(-1, -2) * scale
    weights = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf).softmax(-1)
    (weights @ v.repeat_interleave(shared, 1)).backward(grad.double())
    return q.grad, k.grad, v.grad  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("length", "heads", "groups", "width", "scale", "loud"),
    [
        (1, 2, 2, 16, 0.25, 1.0),
        (31, 4, 2, 64, 0.125, 1.0),
        (MULTIPLE, 4, 1, 80, 80**-0.5, 1.0),  # a scale that bf16 does not have
        (33, 3, 3, 32, 0.3, 8.0),  # scores up to 60: rounded to bf16 as they are, they would be off by an eighth
        (ROWS + 5, 4, 2, 64, 0.125, 4.0),
        (3 * ROWS - 1, 8, 4, 64, 0.125, 2.0),
    ],
)
def test_as_true_as_flash_attention(length: int, heads: int, groups: int, width: int, scale: float, loud: float) -> None:
    query, key, value, grad = case(length, heads, groups, width, loud)
    out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, True, scale=scale)
    ours = products.backward(grad, query, key, value, out, lse, scale)
    flash = _aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, query, key, value, out, lse, 0.0, True, scale=scale)
    for mine, theirs, true in zip(ours, flash, in_fp64(query, key, value, grad, scale), strict=True):
        assert mine.shape == true.shape
        assert (mine - true).norm() <= 2.5 * (theirs - true).norm() + 1e-3 * true.norm()


def test_sizes_keep_to_their_bounds() -> None:
    for heads in (1, 8, 64):
        for length in (1, 32, 33, 700, 8192, 100_000):
            padded, rows = sizes(length, heads)
            assert length <= padded < length + MULTIPLE
            assert padded % MULTIPLE == rows % MULTIPLE == 0
            assert 0 < rows <= min(ROWS, padded)
            assert rows == MULTIPLE or heads * rows * padded <= NUMBERS
    assert held_bytes(8192, 32, 8, 128) < 4 * 32 * 8192 * 8192 / 16  # a sixteenth of one matrix of weights in fp32
