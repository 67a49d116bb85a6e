"""Attention's backward pass on a CPU against the same in fp64, beside flash attention's own in bf16."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparklab.engine.cpu_attention import AttentionByProducts, Row
from sparklab.engine.storages import StorageTracker
from sparklab.planner.cpu_attention import (
    MULTIPLE,
    NUMBERS,
    PRODUCTS,
    ROWS,
    TOGETHER,
    backward_bytes,
    documents_at_once,
    forward_bytes,
    kept_bytes,
    padded,
    rows_at_once,
)

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


def gradients(query: Tensor, key: Tensor, value: Tensor, grad: Tensor, lengths: list[int], scale: float) -> tuple[Tensor, ...]:
    leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    out: Tensor = AttentionByProducts.apply(*leaves, Row(lengths, query.shape[1], key.shape[1]), scale)
    out.backward(grad.transpose(1, 2))
    return tuple(leaf.grad for leaf in leaves)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("lengths", "heads", "groups", "width", "scale", "loud"),
    [
        ([1], 2, 2, 16, 0.25, 1.0),
        ([31, 1, 64, 2], 4, 2, 64, 0.125, 1.0),
        ([MULTIPLE, 33], 4, 1, 80, 80**-0.5, 1.0),  # a scale that bf16 does not have
        ([33], 3, 3, 32, 0.3, 8.0),  # scores up to 60: rounded to bf16 as they are, they would be off by an eighth
        ([ROWS + 5, 7, 3 * ROWS - 1], 8, 4, 64, 0.125, 2.0),
    ],
)
def test_as_true_as_flash_attention(lengths: list[int], heads: int, groups: int, width: int, scale: float, loud: float) -> None:
    query, key, value, grad = case(sum(lengths), heads, groups, width, loud)
    ours = gradients(query, key, value, grad, lengths, scale)
    start = 0
    for length in lengths:
        place = slice(start, start + length)
        q, k, v, g = (tensor[:, :, place] for tensor in (query, key, value, grad))
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale)
        flash = _aten._scaled_dot_product_flash_attention_for_cpu_backward(g, q, k, v, out, lse, 0.0, True, scale=scale)
        for mine, theirs, true in zip(ours, flash, in_fp64(q, k, v, g, scale), strict=True):
            assert (mine[:, :, place] - true).norm() <= 2.5 * (theirs - true).norm() + 1e-3 * true.norm() + 1e-6 * g.norm()
        start += length
    assert [tensor.shape for tensor in ours] == [query.shape, key.shape, value.shape]


def test_what_follows_a_document_changes_nothing_in_it() -> None:
    """What a document is padded with is nothing that counts, and documents that are worked on together do not meet."""
    query, key, value, grad = case(100, 4, 2, 32, 1.0)
    alone = gradients(*(tensor[:, :, :40] for tensor in (query, key, value, grad)), [40], 0.2)
    for tensor in (query, key, value, grad):
        tensor[:, :, 40:] *= 1000
    for mine, theirs in zip(gradients(query, key, value, grad, [40, 60], 0.2), alone, strict=True):
        assert torch.equal(mine[:, :, :40], theirs)


def test_heads_that_lie_in_one_projection() -> None:
    """As GPT-NeoX' do, in documents that go through products and in one that goes through flash attention."""
    torch.manual_seed(0)
    lengths = [40, PRODUCTS + 50, 41]
    apart = torch.randn(1, sum(lengths), 2, 3, 16).bfloat16().unbind(3)
    row = Row(lengths, 2, 2)
    ours, laid = (
        AttentionByProducts.apply(*(tensor.transpose(1, 2) for tensor in some), row, 0.25) for some in (apart, [tensor.contiguous() for tensor in apart])
    )
    assert torch.equal(ours, laid)


@pytest.mark.parametrize(("lengths", "heads", "groups"), [([2048], 8, 4), ([300, 1748], 16, 2), ([256] * 8, 8, 8), ([64] * 32, 4, 1), ([600], 8, 1)])
def test_holds_what_the_planner_says(lengths: list[int], heads: int, groups: int) -> None:
    query, key, value, grad = (tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in case(sum(lengths), heads, groups, 64, 1.0))  # as linears write
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    with StorageTracker() as forward:  # type: ignore[no-untyped-call]
        out: Tensor = AttentionByProducts.apply(*leaves, Row(lengths, heads, groups), 0.125)
    given, made = 2 * 64 * sum(lengths) * (heads + 2 * groups), (2 * 64 + 4) * heads * sum(lengths)  # they come by as they are used
    sizes = sum(lengths), max(lengths), heads, groups, 64
    held, kept = max(forward_bytes(*sizes), made), kept_bytes(*sizes[:4])
    assert 0.97 <= (forward.peak_bytes - given) / (held + kept) <= 1.03, (forward.peak_bytes - given, held, kept)
    with StorageTracker() as backward:  # type: ignore[no-untyped-call]
        out.backward(grad.transpose(1, 2))
    known, held = given + made + 2 * 64 * sum(lengths) * heads, backward_bytes(*sizes)
    assert 0.97 <= (backward.peak_bytes - known) / (held + kept) <= 1.03, (backward.peak_bytes - known, held, kept)


def test_sizes_keep_to_their_bounds() -> None:
    for heads in (1, 8, 64):
        for length in (1, 32, 33, 700, 8192, 100_000):
            end = padded(length)
            rows = rows_at_once(end, heads)
            assert length <= end < length + MULTIPLE
            assert end % MULTIPLE == rows % MULTIPLE == 0
            assert 0 < rows <= min(ROWS, end)
            assert rows == MULTIPLE or heads * rows * end <= NUMBERS
            many = documents_at_once(end, heads)
            assert many == 1 or heads * rows * end * many <= TOGETHER < heads * rows * end * (many + 1)
