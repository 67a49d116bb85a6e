"""Causal attention with sliding windows, soft-capped scores and sinks, a block of queries at a time: nothing quadratic is kept.

Shapes: H query heads in K groups of G (H = K * G), S tokens of one document, D numbers a head, R query rows at once, W keys they can see.

As in flash attention, the forward pass keeps its inputs, its output and one log-sum-exp a row, and the backward pass computes the scores again
(Dao et al. 2022, https://arxiv.org/abs/2205.14135, section 3.1): with P the weights, dS = P * (dP - rowsum(dO * O)). A sink is one more score
a head that takes its share of the weights and gives nothing: it only enters the log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparklab.planner.kernels import ATTENTION_ROWS


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None, cap: float | None, sinks: Tensor | None) -> Tensor:
    """[1, H, S, D] attention of one document on [1, K, S, D] keys and values.

    A token sees itself and the ``window - 1`` tokens before it (None: all); scores s become ``cap * tanh(s / cap)``; ``sinks`` are [H].
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    out: Tensor = _Blockwise.apply(query, key, value, sinks, scale, window, cap)  # type: ignore[no-untyped-call]
    return out


def _blocks(tokens: int, window: int | None) -> Iterator[tuple[slice, slice]]:
    """(rows of queries, the keys that any of them sees)."""
    for start in range(0, tokens, ATTENTION_ROWS):
        end = min(tokens, start + ATTENTION_ROWS)
        yield slice(start, end), slice(0 if window is None else max(0, start - window + 1), end)


def _grouped(rows: Tensor, groups: int) -> Tensor:
    """[1, H, R, D] as [1, K, G * R, D]: the heads that share a key stand one after the other."""
    return rows.reshape(1, groups, -1, rows.shape[-1])


def _scores(query: Tensor, key: Tensor, rows: slice, keys: slice, scale: float, window: int | None, cap: float | None) -> Tensor:
    """fp32 scores [1, K, G * R, W] of a block, minus infinity where a token must not look."""
    groups = key.shape[1]
    scores = (_grouped(query[:, :, rows], groups) @ key[:, :, keys].transpose(2, 3)).float().mul_(scale)
    if cap is not None:
        scores = scores.div_(cap).tanh_().mul_(cap)
    places = torch.arange(rows.start, rows.stop, device=query.device)[:, None] - torch.arange(keys.start, keys.stop, device=query.device)
    unseen = places < 0 if window is None else (places < 0) | (places >= window)
    return scores.masked_fill_(unseen.repeat(scores.shape[2] // unseen.shape[0], 1), -torch.inf)


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, scale: float, window: int | None, cap: float | None) -> Tensor:
        groups, tokens = key.shape[1], query.shape[2]
        out = torch.empty_like(query)
        lse = query.new_empty(query.shape[:3], dtype=torch.float32)
        for rows, keys in _blocks(tokens, window):
            scores = _scores(query, key, rows, keys, scale, window, cap)
            total = scores.logsumexp(-1).view_as(lse[:, :, rows])
            if sinks is not None:
                total = torch.logaddexp(total, sinks.float()[None, :, None])
            lse[:, :, rows] = total
            weights = scores.sub_(_grouped(total[..., None], groups)).exp_().to(value.dtype)
            out[:, :, rows] = (weights @ value[:, :, keys]).view_as(out[:, :, rows])
        ctx.save_for_backward(query, key, value, out, lse, sinks)
        ctx.scale, ctx.window, ctx.cap = scale, window, cap
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None, None, None, None]:
        query, key, value, out, lse, sinks = ctx.saved_tensors
        groups = key.shape[1]
        d_query = torch.empty_like(query)
        d_key, d_value = torch.zeros_like(key, dtype=torch.float32), torch.zeros_like(value, dtype=torch.float32)
        share = (grad.float() * out).sum(-1)  # rowsum(dO * O), [1, H, S]
        for rows, keys in _blocks(query.shape[2], ctx.window):
            scores = _scores(query, key, rows, keys, ctx.scale, ctx.window, ctx.cap)
            weights = (scores - _grouped(lse[:, :, rows, None], groups)).exp_()
            d_out = _grouped(grad[:, :, rows], groups)
            d_value[:, :, keys] += weights.to(value.dtype).transpose(2, 3) @ d_out
            d_scores = (d_out @ value[:, :, keys].transpose(2, 3)).float().sub_(_grouped(share[:, :, rows, None], groups)).mul_(weights)
            if ctx.cap is not None:  # tanh' = 1 - tanh^2; hidden scores have no weight, and minus infinity would make a NaN of it
                d_scores.mul_(scores.nan_to_num_(neginf=0.0).div_(ctx.cap).square_().neg_().add_(1))
            d_scores = d_scores.mul_(ctx.scale).to(key.dtype)
            d_query[:, :, rows] = (d_scores @ key[:, :, keys]).view_as(d_query[:, :, rows])
            d_key[:, :, keys] += d_scores.transpose(2, 3) @ _grouped(query[:, :, rows], groups)
        d_sinks = None
        if sinks is not None and ctx.needs_input_grad[3]:
            d_sinks = -((sinks.float()[None, :, None] - lse).exp() * share).sum((0, 2)).to(sinks.dtype)
        return d_query, d_key.to(key.dtype), d_value.to(value.dtype), d_sinks, None, None, None
