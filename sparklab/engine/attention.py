"""Attention for packed rows: each document attends to itself alone, and no mask is ever built.

A packed row is [1, T] with documents back to back; ``cu_seq_lens_q`` holds their borders (0, ..., T), the keyword that transformers hands
through to every attention function. One causal SDPA call per document costs the sum of the squares of their lengths, where one call with a
mask would cost the square of the sum and keep a [T, T] mask alive.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NAME = "sparklab_packed"


def packed_attention(
    module: nn.Module,
    query: Tensor,  # [1, heads, T, head_dim]
    key: Tensor,  # [1, kv_heads, T, head_dim]
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: Tensor | None = None,  # int32 [documents + 1], on the CPU
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each document; returns [1, T, heads, head_dim] and no weights, as transformers expects."""
    assert attention_mask is None, "packed rows carry no mask"
    assert cu_seq_lens_q is not None, "packed rows carry their borders in cu_seq_lens_q"
    borders = cu_seq_lens_q.tolist()
    grouped = query.shape[1] != key.shape[1]
    parts = [
        F.scaled_dot_product_attention(
            query[:, :, start:end],
            key[:, :, start:end],
            value[:, :, start:end],
            dropout_p=dropout if module.training else 0.0,
            is_causal=True,
            scale=scaling,
            enable_gqa=grouped,
        )
        for start, end in pairwise(borders)
    ]
    return torch.cat(parts, 2).transpose(1, 2), None


def _no_mask(*_: Any, **__: Any) -> None:
    """What transformers asks for a mask: packed rows need none."""


def register() -> None:
    """Makes ``attn_implementation="sparklab_packed"`` known to transformers, through its own registry; safe to call again."""
    from transformers import AttentionInterface, AttentionMaskInterface  # noqa: PLC0415 - heavy, and only the worker needs it

    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, _no_mask)
