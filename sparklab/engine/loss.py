"""Cross-entropy that never holds the [tokens, vocabulary] logits.

Shapes: T tokens of one packed row, S <= T of them supervised, H hidden size, V vocabulary, C tokens per chunk, R of its rows.

The logits of C tokens are made, used and dropped. Their gradient is (softmax - onehot) / count, known in the forward pass, so dHidden
(and, for a trained head, dHead) is finished there and the backward pass only hands it on: nothing is recomputed. Tokens without a label
are dropped before the first product. Products like many tokens, what comes between them likes few: R rows at a time go through fp32, which stay in a
CPU's cache, and the gradient takes the logits' place.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparklab.engine.device import on_gpu, to_do
from sparklab.planner.items import LossTile, filled, loss_tile

IGNORE = -100


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The states may be more than the labels: those after the last label take part in the products alone."""

    @staticmethod
    def forward(ctx: Any, hidden_SH: Tensor, head_VH: Tensor, labels_S: Tensor, count: float, sizes: LossTile, scale: float, cap: float | None) -> Tensor:
        wants_hidden, wants_head = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        grad_hidden_SH = torch.empty_like(hidden_SH) if wants_hidden else None
        grad_head_VH = torch.zeros_like(head_VH) if wants_head else None
        total = torch.zeros((), dtype=torch.float32, device=hidden_SH.device)
        made_CV = hidden_SH.new_empty((min(sizes.tokens, len(hidden_SH)), len(head_VH)))  # one for all chunks: fresh memory costs a CPU as much as a product
        for start in range(0, len(hidden_SH), sizes.tokens):
            hidden_CH, labels_C = hidden_SH[start : start + sizes.tokens], labels_S[start : start + sizes.tokens]
            tile_CV = torch.mm(hidden_CH, head_VH.t(), out=made_CV[: len(hidden_CH)])
            rows = zip(torch.split(tile_CV[: len(labels_C)], sizes.rows), torch.split(labels_C, sizes.rows), strict=True)
            for tile_RV, labels_R in to_do(tuple(rows)):
                total += _in_place(tile_RV, labels_R, scale, cap, wants_hidden or wants_head)
            tile_CV[len(labels_C) :].zero_()
            if grad_hidden_SH is not None:
                out = grad_hidden_SH[start : start + sizes.tokens]
                torch.addmm(out, tile_CV, head_VH, beta=0, alpha=scale / count, out=out)
            if grad_head_VH is not None:
                grad_head_VH.addmm_(tile_CV.t(), hidden_CH, alpha=scale / count)
        ctx.save_for_backward(grad_hidden_SH, grad_head_VH)
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None, None]:
        grad_hidden_SH, grad_head_VH = ctx.saved_tensors
        return (
            None if grad_hidden_SH is None else grad_hidden_SH.mul_(grad),
            None if grad_head_VH is None else grad_head_VH.mul_(grad),
            None,
            None,
            None,
            None,
            None,
        )


def _in_place(logits_RV: Tensor, labels_R: Tensor, scale: float, cap: float | None, wants_gradient: bool) -> Tensor:
    """The summed loss of some rows, worked out in fp32; where a gradient is wanted, that of the logits, softmax - onehot, is written over them."""
    wide_RV, slope_RV = _scaled(logits_RV, scale, cap, wants_gradient)
    own_R, top_R = wide_RV.gather(1, labels_R[:, None])[:, 0], wide_RV.amax(-1)
    torch.softmax(wide_RV, -1, out=wide_RV)
    # The largest weight is 1 over the sum of exp(logit - top), so the sum need not be made a second time: lse = top - log(largest).
    loss_R = top_R - own_R - wide_RV.amax(-1).log_()
    if wants_gradient:
        wide_RV.scatter_(1, labels_R[:, None], (-loss_R).expm1_()[:, None])  # softmax - 1, exact where that is small
        if slope_RV is not None:
            wide_RV.mul_(slope_RV)
        if wide_RV is not logits_RV:
            logits_RV.copy_(wide_RV)
    return loss_R.sum()


def _scaled(logits_RV: Tensor, scale: float, cap: float | None, wants_slope: bool) -> tuple[Tensor, Tensor | None]:
    """Logits in fp32, and for capped ones how much each follows what it was before the cap."""
    wide_RV = logits_RV.float()
    if scale != 1:
        wide_RV.mul_(scale)
    if cap is None:
        return wide_RV, None
    wide_RV.div_(cap).tanh_()
    slope_RV = wide_RV.square().neg_().add_(1) if wants_slope else None
    return wide_RV.mul_(cap), slope_RV


def chunked_cross_entropy(
    hidden_TH: Tensor, head_VH: Tensor, labels_T: Tensor, count: float, sizes: LossTile | None = None, scale: float = 1.0, cap: float | None = None
) -> Tensor:
    """Sum of the cross-entropies of the supervised tokens, divided by ``count``; a scalar in fp32.

    ``labels_T`` is already shifted: position t holds the token that follows t, or -100. ``count`` is the number of supervised tokens of the
    whole update, so that micro-batches (and ranks) add up to one mean over all of them. Logits are multiplied by ``scale`` (Granite), and
    become ``cap * tanh(logits / cap)`` (Gemma 2). ``sizes``: how much at once, if not what suits the device.
    """
    supervised = (labels_T != IGNORE).nonzero()[:, 0]
    labels_S = labels_T[supervised]
    gpu = on_gpu(head_VH)
    supervised = F.pad(supervised, (0, filled(len(supervised), gpu) - len(supervised)))  # by the first token, once more
    loss: Tensor = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_TH.index_select(0, supervised), head_VH, labels_S, float(count), sizes or loss_tile(gpu), scale, cap
    )
    return loss


def full_cross_entropy(hidden_TH: Tensor, head_VH: Tensor, labels_T: Tensor, count: float, scale: float = 1.0, cap: float | None = None) -> Tensor:
    """The same number the plain way, with all logits at once: the reference, and what stock transformers holds in memory."""
    logits_TV = (hidden_TH @ head_VH.t()).float()
    if scale != 1:
        logits_TV = logits_TV * scale
    if cap is not None:
        logits_TV = torch.tanh(logits_TV / cap) * cap
    return F.cross_entropy(logits_TV, labels_T, ignore_index=IGNORE, reduction="sum") / count
