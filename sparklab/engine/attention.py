"""Attention for packed rows: each document attends to itself alone, and no mask is ever built.

A packed row is [1, T] with documents back to back; ``cu_seq_lens_q`` holds their borders (0, ..., T), the keyword that transformers hands
through to every attention function. One causal SDPA call per document costs the sum of the squares of their lengths, where one call with a
mask would cost the square of the sum and keep a [T, T] mask alive. What SDPA cannot do without a mask or at all (sliding windows shorter than
the document, soft-capped scores, sinks) is done block by block in :mod:`sparklab.engine.blockwise`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparklab.engine.blockwise import attend
from sparklab.errors import ModelError

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
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,  # [heads]: gpt-oss' sinks
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each document; returns [1, T, heads, head_dim] and no weights, as transformers expects."""
    assert attention_mask is None, "packed rows carry no mask"
    assert cu_seq_lens_q is not None, "packed rows carry their borders in cu_seq_lens_q"
    lengths = cu_seq_lens_q.diff().tolist()
    width = value.shape[-1]
    if width < query.shape[-1]:  # DeepSeek's values are narrower; kernels that hold nothing quadratic want all three alike
        value = F.pad(value, (0, query.shape[-1] - width))
    blockwise = softcap is not None or s_aux is not None
    if blockwise and dropout and module.training:
        raise ModelError(f"attention_dropout is {dropout}, with soft-capped scores or sinks", "set attention_dropout to 0 in config.json")
    parts = []
    # split, not slices: the backward pass of a slice fills a tensor as long as the row, that of a split joins its parts once
    for q, k, v in zip(*(torch.split(tensor, lengths, 2) for tensor in (query, key, value)), strict=True):
        window = sliding_window if sliding_window is not None and sliding_window < q.shape[2] else None
        if blockwise or window is not None:
            out = attend(q, k, v, scaling, window, softcap, s_aux)
        else:
            out = F.scaled_dot_product_attention(
                q, k, v, dropout_p=dropout if module.training else 0.0, is_causal=True, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
            )
        parts.append(out[..., :width])
    return torch.cat(parts, 2).transpose(1, 2), None


def _no_mask(*_: Any, **__: Any) -> None:
    """What transformers asks for a mask: packed rows need none."""


def register() -> None:
    """Makes ``attn_implementation="sparklab_packed"`` known to transformers, through its own registry; safe to call again."""
    from transformers import AttentionInterface, AttentionMaskInterface  # noqa: PLC0415 - heavy, and only the worker needs it

    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, _no_mask)
