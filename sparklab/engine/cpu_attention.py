"""Attention of a packed row on a CPU: flash attention's kernels, or, in bf16, plain matrix products, which take half of those kernels' time or less.

Shapes: T tokens a row, P of one document and what it is padded with, n documents of one P, H heads in G groups that share a key, N = H / G, D numbers a
head, R queries at once.

With the weights p = exp(s q k' - lse) and their gradients g v', the textbook's five products: ``dV = p' g``, ``dS = p (g v' - delta)``, ``dQ = s dS k``,
``dK = s dS' q``, where delta = sum(g out) (FlashAttention, arXiv 2205.14135, algorithm 4). A product's result is rounded to bf16, which would ruin both
differences: so lse and delta go *into* the products, as further columns beside q and g that meet -1 beside k and v, each split into three bf16 numbers
that add up to its fp32 value. What is rounded then is the difference itself: small wherever the weight is not. Forward, where no lse is known yet, the
scores are products in fp32.

A group's queries lie side by side. Documents of one padded length are worked on together, and R rows of each at a time, so that a call has enough to do for
every core and what is between the calls stays in their caches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparklab.engine.device import to_do
from sparklab.planner.cpu_attention import COLUMNS, PRODUCTS, ROWS, documents_at_once, padded, rows_at_once

_aten: Final = torch.ops.aten


class AttentionPerDocument(torch.autograd.Function):
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


class Row:
    """Where the documents of a row lie: those of one padded length together, as many as are worked on at once.

    Each of ``pieces`` is [G, n, P]: numbers of (token, group). What a document is padded with has those of a token behind the last.
    """

    def __init__(self, lengths: list[int], heads: int, groups: int) -> None:
        self.tokens, self.groups, self.shared = sum(lengths), groups, heads // groups
        alike: dict[int, list[tuple[int, int]]] = {}
        start = 0
        for length in lengths:
            alike.setdefault(padded(length), []).append((start, length))
            start += length
        group_G11 = torch.arange(groups, dtype=torch.int32)[:, None, None]
        self.pieces: list[Tensor] = []
        for end, documents in alike.items():
            step_P, many = torch.arange(end, dtype=torch.int32), documents_at_once(end, heads)
            for first in range(0, len(documents), many):
                starts_n, lengths_n = torch.tensor(documents[first : first + many], dtype=torch.int32).t()
                token_nP = torch.where(step_P < lengths_n[:, None], starts_n[:, None] + step_P, self.tokens)
                self.pieces.append(token_nP * groups + group_G11)
        numbers = torch.cat([piece.flatten() for piece in self.pieces])
        back = numbers.new_empty((self.tokens + 1) * groups)
        back[numbers.long()] = torch.arange(len(numbers), dtype=torch.int32)
        self.count, self._back = len(numbers), back[: self.tokens * groups]

    def blocks(self, piece: Tensor) -> list[tuple[int, int]]:
        """First and last of the rows of each document that have their weights made at once."""
        end = piece.shape[2]
        rows = rows_at_once(end, self.groups * self.shared)
        return [(first, min(first + rows, end)) for first in range(0, end, rows)]

    def parts(self, *made: Tensor) -> Iterator[tuple[Any, ...]]:
        """(piece, where its rows are in each tensor of them) of one piece after the other."""
        start = 0
        for piece in self.pieces:
            yield (piece, *(tensor[start : start + piece.numel()] for tensor in made))
            start += piece.numel()

    def in_order(self, made: Tensor, width: int) -> Tensor:
        """What was made of all pieces, [numbers, W] or [numbers, N W], as [1, T, G or H, W]."""
        return made.index_select(0, self._back).view(1, self.tokens, -1, width)


class AttentionByProducts(torch.autograd.Function):
    """The same by products, for bf16: of query [1, H, T, D], key and value [1, G, T, D], where the row's documents lie, and the scale."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, row: Row, scale: float) -> Tensor:
        q, k, v = (_numbered(tensor, row) for tensor in (query, key, value))
        outs, sums = q.new_empty((row.count, q.shape[1])), q.new_empty((row.count, row.shared), dtype=torch.float32)
        future = q.new_full((ROWS, ROWS), -math.inf, dtype=torch.float32).triu_(1)[:, None]
        for piece, out, lse in row.parts(outs, sums):
            read = piece.clamp(max=len(q) - 1)  # any token does for what follows a document: no query of the document looks there
            if piece.shape[2] > PRODUCTS:
                _by_flash(q, k, v, row, read, out, lse, scale)
            else:
                _by_products(q, k, v, row, read, future, out, lse, scale)
        del future
        out, lse = row.in_order(outs, value.shape[3]), row.in_order(sums, 1)[0, ..., 0]
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.row, ctx.scale = row, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        row, scale = ctx.row, ctx.scale
        delta = grad.float().mul_(out)[0].sum(-1)
        q, g = _beside(query, lse / scale, row), _beside(grad.transpose(1, 2), delta, row)
        laid = (q, g, _beside(key, None, row), _beside(value, None, row))
        width = query.shape[3]
        gradients = [q.new_empty((row.count, many * width)) for many in (row.shared, 1, 1)]
        # a column for each head: numbers that lie apart copy slowly
        future = q.new_full((ROWS, ROWS), -math.inf).tril_(-1).repeat_interleave(row.shared, 1)
        for piece, *places in row.parts(*gradients):
            _backward(laid, row, piece, future, places, scale)
        del q, g, laid, future, piece, places
        d_q, d_k, d_v = (row.in_order(gradients.pop(0), width).transpose(1, 2) for _ in range(3))
        return d_q.mul_(scale), d_k.mul_(scale), d_v, None, None


def _by_products(q: Tensor, k: Tensor, v: Tensor, row: Row, piece: Tensor, future: Tensor, out: Tensor, lse: Tensor, scale: float) -> None:
    """Writes one piece's part of out and lse, from scores in fp32 and weights in bf16. The weights are [n G, R N, keys]."""
    width, many = k.shape[1], piece.shape[0] * piece.shape[1]
    out, lse = out.view(many, -1, width), lse.view(many, -1)
    for first, last in to_do(row.blocks(piece)[::-1]):
        mine = slice(first * row.shared, last * row.shared)
        queries = _taken(q, piece[..., first:last], width).float()
        keys, values = (_taken(tensor, piece[..., :last], width) for tensor in (k, v))
        weights = queries.new_empty((many, last - first, row.shared, last))
        weights[..., :first], weights[..., first:] = 0, future[: last - first, :, : last - first]
        weights = weights.flatten(1, 2).baddbmm_(queries, keys.float().transpose(1, 2), alpha=scale)
        top = weights.amax(-1)
        torch.softmax(weights, -1, out=weights)
        lse[:, mine] = top.sub_(weights.amax(-1).log_())  # the largest weight is exp(top - lse)
        out[:, mine] = torch.bmm(weights.to(q.dtype), values)
        del weights, queries, keys, values


def _by_flash(q: Tensor, k: Tensor, v: Tensor, row: Row, piece: Tensor, out: Tensor, lse: Tensor, scale: float) -> None:
    """The same by flash attention's kernel."""
    (groups, many, end), width = piece.shape, k.shape[1]
    numbers = piece.permute(1, 2, 0).flatten()
    queries, keys, values = (tensor.index_select(0, numbers).view(many, end, -1, width).transpose(1, 2) for tensor in (q, k, v))
    done, sums = _aten._scaled_dot_product_flash_attention_for_cpu(queries, keys, values, 0.0, True, scale=scale)
    out.view(groups, many, end, row.shared, width)[:] = done.view(many, groups, row.shared, end, width).permute(1, 0, 3, 2, 4)
    lse.view(groups, many, end, row.shared)[:] = sums.view(many, groups, row.shared, end).permute(1, 0, 3, 2)


def _backward(laid: tuple[Tensor, ...], row: Row, piece: Tensor, future: Tensor, made: tuple[Tensor, ...], scale: float) -> None:
    """Writes one piece's part of dQ / scale, dK / scale and dV. The weights are [n G, keys, R N], for so the products are fastest."""
    many, width = piece.shape[0] * piece.shape[1], made[1].shape[1]
    d_q = made[0].view(many, -1, width)
    blocks = row.blocks(piece)
    totals: tuple[Tensor, ...] = ()
    for first, last in to_do(blocks[::-1]):  # the last rows meet all keys: the others' sums fit into theirs
        q, g = (_taken(rows, piece[..., first:last], width + COLUMNS) for rows in laid[:2])
        k, v = (_taken(rows, piece[..., :last], width + COLUMNS) for rows in laid[2:])
        weights = q.new_empty((many, last, q.shape[1]))
        weights[:, :first], weights[:, first:] = 0, future[: last - first, : q.shape[1]]
        weights.baddbmm_(k, q.transpose(1, 2), alpha=scale).exp_()
        part_v = torch.bmm(weights, g[..., :width])
        weights.mul_(torch.bmm(v, g.transpose(1, 2)))
        d_q[:, first * row.shared : last * row.shared] = torch.bmm(weights.transpose(1, 2), k[..., :width])
        parts = (torch.bmm(weights, q[..., :width]), part_v)
        del weights, part_v, q, g, k, v  # each block begins with what the last one left: sums
        totals = _added(totals, parts, len(blocks) > 1)
        del parts
    for whole, total in zip(made[1:], totals, strict=True):
        whole.view(total.shape)[:] = total


def _numbered(rows: Tensor, row: Row) -> Tensor:
    """[1, H, T, D] as [T G, N D]: as it lies, if it lies as linears write it."""
    return rows[0].transpose(0, 1).reshape(row.tokens * row.groups, -1)


def _taken(rows: Tensor, numbers: Tensor, width: int) -> Tensor:
    """Of rows [.., N W] those with the numbers [G, n, R], as [G n, R N, W]."""
    return rows.index_select(0, numbers.flatten()).view(numbers.shape[0] * numbers.shape[1], -1, width)


def _added(totals: tuple[Tensor, ...], parts: tuple[Tensor, ...], many: bool) -> tuple[Tensor, ...]:
    """The sums over blocks of rows, in fp32 where there are several; the first block is the largest."""
    if not totals:
        return tuple(part.float() for part in parts) if many else parts
    for total, part in zip(totals, parts, strict=True):
        total[:, : part.shape[1]] += part
    return totals


def _beside(rows: Tensor, number_TH: Tensor | None, row: Row) -> Tensor:
    """[1, H, T, D] as [(T + 1) G, N (D + COLUMNS)], with a number beside each head's, in parts, or with -1; behind the last token all is 0."""
    _, heads, tokens, width = rows.shape
    whole = rows.new_empty((tokens + 1, heads, width + COLUMNS))
    whole[tokens] = 0
    place = whole[:tokens]
    place[..., :width] = rows[0].transpose(0, 1)
    if number_TH is None:
        place[..., width:] = -1
    else:
        for column in range(width, width + COLUMNS - 1):
            part = number_TH.to(rows.dtype)
            place[..., column] = part
            number_TH = number_TH - part
        place[..., -1] = 0
    return whole.view((tokens + 1) * row.groups, -1)


def _documents(lengths: list[int], *tensors: Tensor) -> Iterator[tuple[Any, ...]]:
    """(where in the row, each tensor's part of it) of one document after the other."""
    start = 0
    for length in lengths:
        place = slice(start, start + length)
        yield (place, *(tensor[:, :, place] for tensor in tensors))
        start += length
