"""The backward pass of one document's attention in bf16 on a CPU, as plain matrix products; flash attention's own takes up to three times as long there.

Shapes: S tokens (padded to P), H heads in G groups that share a key, N = H / G, D numbers a head.

With the weights p = exp(s q k' - lse) and their gradients g v', the textbook's five products: ``dV = p' g``, ``dS = p (g v' - delta)``, ``dQ = s dS k``,
``dK = s dS' q``, where delta = sum(g out) (FlashAttention, arXiv 2205.14135, algorithm 4). A product's result is rounded to bf16, which would ruin both
differences: so lse and delta go *into* the products, as further columns beside q and g that meet -1 beside k and v, each split into three bf16 numbers
that add up to its fp32 value. What is rounded then is the difference itself: small wherever the weight is not.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparklab.engine.device import to_do
from sparklab.planner.products import COLUMNS, sizes


def backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query [1, H, S, D], key and value [1, G, S, D], from that of out [1, H, S, D]; lse [1, H, S] in fp32."""
    (_, groups, length, width), shared = key.shape, query.shape[1] // key.shape[1]
    padded, rows = sizes(length, query.shape[1])
    q = _beside(query, lse[0] / scale, groups, padded)
    g = _beside(grad, grad.float().mul_(out)[0].sum(-1), groups, padded)
    k, v = (_beside_ones(tensor, padded) for tensor in (key, value))
    d_q = query.new_empty((groups, padded * shared, width))
    d_k: Tensor | None = None
    d_v: Tensor | None = None
    for start in to_do(range(0, padded, rows)[::-1]):  # the last rows meet all keys: theirs are the sums that others are added to
        end = min(start + rows, padded)
        here = slice(start * shared, end * shared)
        q_here, g_here, k_seen, v_seen = q[:, here], g[:, here], k[:, :end], v[:, :end]
        weights = _hidden_from(start, end, length, shared, q).baddbmm_(q_here, k_seen.transpose(1, 2), alpha=scale).exp_()
        d_v = _added(d_v, torch.bmm(weights.transpose(1, 2), g_here[..., :width]), rows < padded)
        weights.mul_(torch.bmm(g_here, v_seen.transpose(1, 2)))
        torch.baddbmm(d_q[:, here], weights, k_seen[..., :width], beta=0, alpha=scale, out=d_q[:, here])
        d_k = _added(d_k, torch.bmm(weights.transpose(1, 2), q_here[..., :width]), rows < padded)
    assert d_k is not None and d_v is not None
    d_query = d_q.view(groups, padded, shared, width)[:, :length].transpose(1, 2).reshape(1, groups * shared, length, width)
    return d_query, d_k[None, :, :length].mul_(scale), d_v[None, :, :length]


def _added(total: Tensor | None, part: Tensor, many: bool) -> Tensor:
    """The sum over blocks of rows, in fp32 where there are several."""
    if total is None:
        return part.float() if many else part
    total[:, : part.shape[1]] += part
    return total


def _beside(rows: Tensor, number: Tensor, groups: int, padded: int) -> Tensor:
    """rows [1, H, S, D] as [G, P N, D + COLUMNS], with number [H, S] beside them, in parts."""
    _, heads, length, width = rows.shape
    whole = rows.new_zeros((groups, padded, heads // groups, width + COLUMNS))
    place, number = whole[:, :length].transpose(1, 2), number.reshape(groups, -1, length)
    place[..., :width] = rows[0].view(groups, -1, length, width)
    for column in range(width, width + COLUMNS - 1):
        part = number.to(rows.dtype)
        place[..., column] = part
        number = number - part
    return whole.flatten(1, 2)


def _beside_ones(rows: Tensor, padded: int) -> Tensor:
    """rows [1, G, S, D] as [G, P, D + COLUMNS], with -1 beside them."""
    _, groups, length, width = rows.shape
    whole = rows.new_zeros((groups, padded, width + COLUMNS))
    whole[:, :length, :width] = rows[0]
    whole[..., width:] = -1
    return whole


def _hidden_from(start: int, end: int, length: int, shared: int, like: Tensor) -> Tensor:
    """[G, (end - start) N, end] for the logarithms of weights: -inf where a query must not look, 0 elsewhere."""
    rows = end - start
    weights = like.new_empty((len(like), rows, shared, end))
    weights[..., :start] = 0
    weights[..., start:] = like.new_full((rows, rows), -math.inf).triu_(1)[:, None]
    if end > length:
        weights[:, length - start :] = -math.inf  # no query at all
    return weights.flatten(1, 2)
