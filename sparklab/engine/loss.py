"""Cross-entropy that never holds the [tokens, vocabulary] logits.

Shapes: T tokens of one packed row, S <= T of them supervised, H hidden size, V vocabulary, C tokens per chunk.

The logits of C tokens are made, used and dropped. Their gradient is (softmax - onehot) / count, known in the forward pass, so dHidden
(and, for a trained head, dHead) is finished there and the backward pass only hands it on: nothing is recomputed. Tokens without a label
are dropped before the first product.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparklab.planner.items import CHUNK_TOKENS

IGNORE = -100


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_SH: Tensor, head_VH: Tensor, labels_S: Tensor, count: float, chunk: int, scale: float, cap: float | None) -> Tensor:
        wants_hidden, wants_head = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        grad_hidden_SH = torch.empty_like(hidden_SH) if wants_hidden else None
        grad_head_VH = torch.zeros_like(head_VH) if wants_head else None
        total = torch.zeros((), dtype=torch.float32, device=hidden_SH.device)
        for start in range(0, len(labels_S), chunk):
            hidden_CH, labels_C = hidden_SH[start : start + chunk], labels_S[start : start + chunk]
            tile_CV, slope_CV = _logits(hidden_CH, head_VH, scale, cap, wants_hidden or wants_head)
            own_C, top_C = tile_CV.gather(1, labels_C[:, None])[:, 0], tile_CV.amax(-1)
            torch.softmax(tile_CV, -1, out=tile_CV)
            # The largest weight is 1 over the sum of exp(logit - top), so the sum need not be made a second time: lse = top - log(largest).
            loss_C = top_C - own_C - tile_CV.amax(-1).log_()
            total += loss_C.sum()
            if not (wants_hidden or wants_head):
                del tile_CV  # or this tile would live on while the next one is made
                continue
            tile_CV[torch.arange(len(labels_C), device=labels_C.device), labels_C] = (-loss_C).expm1_()  # softmax - 1, exact where that is small
            if slope_CV is not None:
                tile_CV.mul_(slope_CV)
                del slope_CV
            grad_CV = tile_CV.to(head_VH.dtype)
            del tile_CV
            if grad_hidden_SH is not None:
                out = grad_hidden_SH[start : start + chunk]
                torch.addmm(out, grad_CV, head_VH, beta=0, alpha=scale / count, out=out)
            if grad_head_VH is not None:
                grad_head_VH.addmm_(grad_CV.t(), hidden_CH, alpha=scale / count)
            del grad_CV
        ctx.save_for_backward(grad_hidden_SH, grad_head_VH)
        return total / count

    @staticmethod
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


def _logits(hidden_CH: Tensor, head_VH: Tensor, scale: float, cap: float | None, wants_slope: bool) -> tuple[Tensor, Tensor | None]:
    """The logits of a chunk in fp32, and for capped ones how much each follows what it was before the cap."""
    tile_CV = (hidden_CH @ head_VH.t()).float()
    if scale != 1:
        tile_CV.mul_(scale)
    if cap is None:
        return tile_CV, None
    tile_CV.div_(cap).tanh_()
    slope_CV = tile_CV.square().neg_().add_(1) if wants_slope else None
    return tile_CV.mul_(cap), slope_CV


def chunked_cross_entropy(
    hidden_TH: Tensor, head_VH: Tensor, labels_T: Tensor, count: float, chunk: int = CHUNK_TOKENS, scale: float = 1.0, cap: float | None = None
) -> Tensor:
    """Sum of the cross-entropies of the supervised tokens, divided by ``count``; a scalar in fp32.

    ``labels_T`` is already shifted: position t holds the token that follows t, or -100. ``count`` is the number of supervised tokens of the
    whole update, so that micro-batches (and ranks) add up to one mean over all of them. Logits are multiplied by ``scale`` (Granite), and
    become ``cap * tanh(logits / cap)`` (Gemma 2).
    """
    supervised = (labels_T != IGNORE).nonzero()[:, 0]
    loss: Tensor = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_TH[supervised], head_VH, labels_T[supervised], float(count), chunk, scale, cap
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
