"""Attention for packed rows: each document attends to itself alone, and no mask is ever built.

A packed row is [1, T] with documents back to back; ``cu_seq_lens_q`` holds their borders (0, ..., T), the keyword that transformers hands
through to every attention function. On CUDA one kernel takes all documents (``torch.nn.attention.varlen``, which every torch that sparklab
installs with has) but long ones, where cuDNN is faster (:mod:`sparklab.engine.cudnn`); on a CPU there is one causal call per document. Either costs
the sum of the squares of their lengths, where one call with a mask would cost the square of the sum and keep a [T, T] mask alive. What flash attention
cannot do (on a CPU sliding windows shorter than the document, anywhere soft-capped scores and sinks) is done by :mod:`sparklab.engine.flex` on CUDA where
that runs, and else block by block in :mod:`sparklab.engine.blockwise`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparklab.engine import cudnn, flex
from sparklab.engine.blockwise import attend
from sparklab.engine.cpu_attention import AttentionByProducts, AttentionPerDocument, Row
from sparklab.engine.device import on_gpu
from sparklab.errors import ModelError

NAME = "sparklab_packed"
RECORDED: Final = "sparklab_recorded"
"""Of borders that stand for any row's, while a CUDA graph is recorded: where on the device the row's own will lie, int32 [documents + 1]."""
_THERE: Final = "sparklab_on_the_device"
_PLACES: Final = "sparklab_places"


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
    width = value.shape[-1]
    if width < query.shape[-1]:  # DeepSeek's values are narrower; kernels that hold nothing quadratic want all three alike
        value = F.pad(value, (0, query.shape[-1] - width))
    lengths = cu_seq_lens_q.diff().tolist()
    windowed = sliding_window is not None and sliding_window < max(lengths)
    blockwise = softcap is not None or s_aux is not None
    dropped = dropout if module.training else 0.0
    if not blockwise and not dropped:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        known = not (windowed or hasattr(cu_seq_lens_q, RECORDED))
        long = cudnn.attend(query, key, value, cu_seq_lens_q, lengths, scale, _varlen) if known else None
        if long is not None:
            return long[..., :width], None
        if query.device.type == "cuda" and cudnn.takes(query):
            return _varlen(query, key, value, cu_seq_lens_q, max(lengths), scale, sliding_window)[..., :width], None
        if query.device.type == "cpu" and not windowed:
            products = query.dtype == torch.bfloat16 and not on_gpu(query)
            places = _places(cu_seq_lens_q, lengths, query.shape[1], key.shape[1]) if products else lengths
            out: Tensor = (AttentionByProducts if products else AttentionPerDocument).apply(query, key, value, places, scale)  # type: ignore[no-untyped-call]
            return out[..., :width], None
    _refuse_to_record(cu_seq_lens_q)
    if (blockwise or windowed or query.shape[-1] > cudnn.WIDEST) and not dropped:
        together = flex.attend(query, key, value, cu_seq_lens_q, scaling, sliding_window, softcap, s_aux)
        if together is not None:
            return together[..., :width], None
    if blockwise and dropout and module.training:
        raise ModelError(f"attention_dropout is {dropout}, with soft-capped scores or sinks", "set attention_dropout to 0 in config.json")
    parts = []
    # split, not slices: the backward pass of a slice fills a tensor as long as the row, that of a split joins its parts once
    for q, k, v in zip(*(torch.split(tensor, lengths, 2) for tensor in (query, key, value)), strict=True):
        window = sliding_window if sliding_window is not None and sliding_window < q.shape[2] else None
        if blockwise or window is not None:
            out = attend(q, k, v, scaling, window, softcap, s_aux)
        else:
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropped, is_causal=True, scale=scaling, enable_gqa=query.shape[1] != key.shape[1])
        parts.append(out[..., :width])
    return torch.cat(parts, 2).transpose(1, 2), None


def _places(borders: Tensor, lengths: list[int], heads: int, groups: int) -> Row:
    """Where the documents lie, for products on a CPU: worked out once a row, not once a layer."""
    known: dict[tuple[int, int], Row] = getattr(borders, _PLACES, {})
    if (heads, groups) not in known:
        known[heads, groups] = Row(lengths, heads, groups)
        setattr(borders, _PLACES, known)
    return known[heads, groups]


def _refuse_to_record(borders: Tensor) -> None:
    """Raises RuntimeError, as CUDA does for what it cannot record, where the borders are known on the device alone."""
    if hasattr(borders, RECORDED):
        raise RuntimeError("only flash attention's kernel for rows of documents reads on the device where they end")


def _varlen(query: Tensor, key: Tensor, value: Tensor, borders: Tensor, longest: int, scale: float, window: int | None) -> Tensor:
    """All documents in one kernel of CUDA's, flash attention over rows of unequal length; [1, T, heads, head_dim]."""
    from torch.nn.attention.varlen import varlen_attn  # noqa: PLC0415 - asks for kernels that only CUDA has

    there: Any = getattr(borders, RECORDED, getattr(borders, _THERE, None))
    if there is None:  # once a row, not once a layer
        there = borders.to(query.device, non_blocking=True)
        setattr(borders, _THERE, there)
    q, k, v = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))  # a view back too, where [0] lays the gradient into zeros
    seen = (-1 if window is None else window - 1, 0)
    grouped: dict[str, Any] = {"enable_gqa": True} if q.shape[1] != k.shape[1] and _asks_for_groups(varlen_attn) else {}
    out: Any = varlen_attn(q, k, v, there, there, longest, longest, scale=scale, window_size=seen, **grouped)
    joined: Tensor = out.unsqueeze(0)
    return joined


@cache
def _asks_for_groups(function: Callable[..., Any]) -> bool:
    """Whether it must be told that heads share keys: torch 2.11's kernel takes them so without a word, and refuses the word."""
    return "enable_gqa" in inspect.signature(function).parameters


def register() -> None:
    """Makes ``attn_implementation="sparklab_packed"`` known to transformers, through its own registry; safe to call again.

    No mask is registered beside it: for attention that has none transformers makes none, and looks for no documents in the row's positions, which would
    wait for the device.
    """
    from transformers import AttentionInterface  # noqa: PLC0415 - heavy, and only the worker needs it

    AttentionInterface.register(NAME, packed_attention)
