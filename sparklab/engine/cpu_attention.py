"""Attention of a packed row on a CPU: flash attention's kernels; in bf16 the backward pass is plain matrix products, which take half of that kernel's time.

Shapes: T tokens a row, S of one document (padded to P), H heads in G groups that share a key, N = H / G, D numbers a head, R queries at once.

With the weights p = exp(s q k' - lse) and their gradients g v', the textbook's five products: ``dV = p' g``, ``dS = p (g v' - delta)``, ``dQ = s dS k``,
``dK = s dS' q``, where delta = sum(g out) (FlashAttention, arXiv 2205.14135, algorithm 4). A product's result is rounded to bf16, which would ruin both
differences: so lse and delta go *into* the products, as further columns beside q and g that meet -1 beside k and v, each split into three bf16 numbers
that add up to its fp32 value. What is rounded then is the difference itself: small wherever the weight is not.

All is laid out for products once a row, a group's queries side by side, [G, T N, D]. A document is a piece of that, and what it is padded with are the
tokens that follow it: their weights are 0, and what is written at their places the next document writes over.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparklab.engine.device import to_do
from sparklab.planner.cpu_attention import COLUMNS, MULTIPLE, padded, rows_at_once

_aten: Final = torch.ops.aten


class PerDocument(torch.autograd.Function):
    """Flash attention's kernels, a document at a time: of query [1, H, T, D], key and value [1, G, T, D], the documents' lengths and the scale.

    out is [1, T, H, D], as linears read it; so lie the gradients.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scale: float) -> Tensor:
        out = query.new_empty((1, query.shape[2], query.shape[1], query.shape[3]))
        lse = []
        for place, q, k, v in _documents(lengths, query, key, value):
            done, sums = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale)
            out[:, place] = done.transpose(1, 2)
            lse.append(sums)
            del done
        ctx.save_for_backward(query, key, value, out, *lse)
        ctx.lengths, ctx.scale = lengths, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, *lse = ctx.saved_tensors
        outs = [tensor.new_empty((1, tensor.shape[2], tensor.shape[1], tensor.shape[3])) for tensor in (query, key, value)]
        pieces = _documents(ctx.lengths, query, key, value, out.transpose(1, 2), grad.transpose(1, 2))
        for sums, (place, q, k, v, o, g) in zip(lse, pieces, strict=True):
            parts = _aten._scaled_dot_product_flash_attention_for_cpu_backward(g, q, k, v, o, sums, 0.0, True, scale=ctx.scale)
            for whole, part in zip(outs, parts, strict=True):
                whole[:, place] = part.transpose(1, 2)
            del parts, part
        d_query, d_key, d_value = (whole.transpose(1, 2) for whole in outs)
        return d_query, d_key, d_value, None, None


class ByProducts(PerDocument):
    """The same with a backward pass of plain products, for bf16."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, *lse = ctx.saved_tensors
        groups = key.shape[1]
        delta = grad.float().mul_(out)[0].sum(-1).t()
        q, g = _beside(query, torch.cat(lse, 2)[0] / ctx.scale, groups), _beside(grad.transpose(1, 2), delta, groups)
        row = _Row(q, g, _beside(key, None, groups), _beside(value, None, groups), ctx.scale)
        del q, g
        for (place,) in _documents(ctx.lengths):
            row.document(place.start, place.stop - place.start)
        d_q, d_k, d_v = row.gradients
        del row
        tokens = query.shape[2]
        return _laid_out(d_q, tokens, ctx.scale), _laid_out(d_k, tokens, ctx.scale), _laid_out(d_v, tokens, 1.0), None, None


class _Row:
    """q and g [G, T', N, D + COLUMNS], k and v [G, T', 1, D + COLUMNS] of a row and a bit more, and the gradients of q, k and v without the columns."""

    def __init__(self, q: Tensor, g: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
        self.q, self.g, self.k, self.v = (tensor.flatten(1, 2) for tensor in (q, g, k, v))
        self.scale, self.shared, self.width = scale, q.shape[2], q.shape[3] - COLUMNS
        self.gradients = tuple(tensor.new_empty((*tensor.shape[:3], self.width)) for tensor in (q, k, v))
        self._future: dict[int, Tensor] = {}

    def document(self, start: int, length: int) -> None:
        """Writes the gradients of one document, and anything behind them, up to its padded length."""
        end = padded(length)
        rows = rows_at_once(end, len(self.q) * self.shared)
        blocks = [(first, min(first + rows, end)) for first in range(0, end, rows)][::-1]  # the last rows meet all keys: the others' sums fit into theirs
        totals: tuple[Tensor, ...] = ()
        for first, last in to_do(blocks):
            totals = _added(totals, self._block(start, first, last, length), len(blocks) > 1)
        for whole, total in zip(self.gradients[1:], totals, strict=True):
            whole[:, start : start + end, 0] = total

    def _block(self, start: int, first: int, last: int, length: int) -> tuple[Tensor, Tensor]:
        """Rows ``first`` to ``last`` of a document: writes their gradients, and returns the part that they have in those of the keys and values they meet.

        The weights are [G, keys, rows N], for so the products are fastest.
        """
        mine, seen = slice((start + first) * self.shared, (start + last) * self.shared), slice(start, start + last)
        q, g, k, v = (tensor.contiguous() for tensor in (self.q[:, mine], self.g[:, mine], self.k[:, seen], self.v[:, seen]))
        weights = self._hidden(first, last, length).baddbmm_(k, q.transpose(1, 2), alpha=self.scale).exp_()
        d_v = torch.bmm(weights, g[..., : self.width])
        weights.mul_(torch.bmm(v, g.transpose(1, 2)))
        self.gradients[0].flatten(1, 2)[:, mine] = torch.bmm(weights.transpose(1, 2), k[..., : self.width])
        return torch.bmm(weights, q[..., : self.width]), d_v

    def _hidden(self, first: int, last: int, length: int) -> Tensor:
        """[G, last, (last - first) N] for the logarithms of weights: -inf where a query must not look, 0 elsewhere."""
        rows = last - first
        weights = self.q.new_empty((len(self.q), last, rows, self.shared))
        weights[:, :first] = 0
        if rows not in self._future:
            self._future[rows] = self.q.new_full((rows, rows), -math.inf).tril_(-1)[..., None].expand(rows, rows, self.shared).contiguous()
        weights[:, first:] = self._future[rows]
        if last > length:
            weights[:, :, length - first :] = -math.inf  # no query of this document
        return weights.flatten(2)


def _documents(lengths: list[int], *tensors: Tensor) -> Iterator[tuple[Any, ...]]:
    """(where in the row, each tensor's part of it) of one document after the other."""
    start = 0
    for length in lengths:
        place = slice(start, start + length)
        yield (place, *(tensor[:, :, place] for tensor in tensors))
        start += length


def _added(totals: tuple[Tensor, ...], parts: tuple[Tensor, ...], many: bool) -> tuple[Tensor, ...]:
    """The sums over blocks of rows, in fp32 where there are several; the first block is the largest."""
    if not totals:
        return tuple(part.float() for part in parts) if many else parts
    for total, part in zip(totals, parts, strict=True):
        total[:, : part.shape[1]] += part
    return totals


def _beside(rows: Tensor, number: Tensor | None, groups: int) -> Tensor:
    """rows [1, H, T, D] as [G, T', N, D + COLUMNS], with number [H, T] beside them, in parts; or with -1."""
    _, heads, tokens, width = rows.shape
    whole = rows.new_empty((groups, tokens + MULTIPLE, heads // groups, width + COLUMNS))
    whole[:, tokens:] = 0
    place = whole[:, :tokens].transpose(1, 2)
    place[..., :width] = rows[0].view(groups, -1, tokens, width)
    if number is None:
        place[..., width:] = -1
        return whole
    number = number.reshape(groups, -1, tokens)
    for column in range(width, width + COLUMNS - 1):
        part = number.to(rows.dtype)
        place[..., column] = part
        number = number - part
    place[..., -1] = 0
    return whole


def _laid_out(rows: Tensor, tokens: int, factor: float) -> Tensor:
    """rows [G, T', N, D] times a factor as [1, H, T, D], in memory as [1, T, H, D]."""
    groups, _, shared, width = rows.shape
    out = rows.new_empty((tokens, groups, shared, width))
    torch.mul(rows[:, :tokens].transpose(0, 1), factor, out=out)
    return out.view(1, tokens, groups * shared, width).transpose(1, 2)
