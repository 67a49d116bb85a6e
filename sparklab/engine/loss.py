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
            logits_CV = (hidden_CH @ head_VH.t()).float()
            if scale != 1:
                logits_CV.mul_(scale)
            if cap is not None:
                logits_CV.div_(cap).tanh_().mul_(cap)
            lse_C = logits_CV.logsumexp(-1)
            total += (lse_C - logits_CV.gather(1, labels_C[:, None])[:, 0]).sum()
            if not (wants_hidden or wants_head):
                del logits_CV  # or this tile would live on while the next one is made
                continue
            slope_CV = None if cap is None else logits_CV.div(cap).square_().neg_().add_(1)  # of the tanh
            grad_CV = logits_CV.sub_(lse_C[:, None]).exp_()  # softmax, in the logits' own memory
            grad_CV[torch.arange(len(labels_C), device=labels_C.device), labels_C] -= 1
            if slope_CV is not None:
                grad_CV.mul_(slope_CV)
                del slope_CV
            grad_CV = grad_CV.mul_(scale / count).to(head_VH.dtype)
            if grad_hidden_SH is not None:
                torch.mm(grad_CV, head_VH, out=grad_hidden_SH[start : start + chunk])
            if grad_head_VH is not None:
                grad_head_VH.addmm_(grad_CV.t(), hidden_CH)
            del logits_CV, grad_CV
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
