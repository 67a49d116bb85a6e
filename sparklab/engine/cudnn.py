"""Long documents on CUDA by cuDNN's attention, which an H200 does in 0.5 to 0.65 of the time that flash attention takes (benchmarks/LOG.md).

cuDNN takes one document at a time and prepares each length once, some 90 ms forward and backward. So only documents of :data:`LEAST` tokens go this way, each
filled up to a multiple of :data:`STEP`, with what follows it in the row or, at the row's end, with zeros: a causal document sees nothing behind itself,
and gradients of the filling are cut off. Those between them go through flash attention, a stretch at a time. A row that is one document of such a
length is not copied.

Kept for the backward pass are q, k, v, the row's output and one log-sum-exp a row and head, as flash attention keeps. Whether cuDNN is used is
decided once for each :class:`Kind`: it must run, give flash attention's numbers, and be faster; else flash attention does it all.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from itertools import accumulate, groupby
from statistics import median
from typing import Any, Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparklab.engine.flex import apart
from sparklab.planner.items import LONG_DOCUMENT
from sparklab.text import said

DEVICE = "cuda"
"""The kind of device it runs on. (No Final: tests split and join on a CPU, with its kernel in both places.)"""
LEAST = LONG_DOCUMENT
STEP: Final = 256
LONG: Final = 4096  # tokens from which on a document has a trial of its own
GAIN: Final = 1.05  # how much faster it must be
WIDEST: Final = 256  # the widest head that both take
BOUND = {torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""How far a trial may be from flash attention, in the size of each tensor, and the types that both take."""


class Kind(NamedTuple):
    """What a trial holds for."""

    heads: int
    kv_heads: int
    width: int
    dtype: torch.dtype
    long: bool


class Stretch(NamedTuple):
    """Consecutive tokens of a row that one call takes."""

    start: int
    tokens: int
    filled: int
    borders: Tensor | None = None
    """On the device, of short documents; None: one long document."""
    longest: int = 0


class Verdict(NamedTuple):
    """What a trial found."""

    used: bool
    said: str


Plain = Callable[..., Tensor]  # attention._varlen
decided: dict[Kind, Verdict] = {}


def attend(query: Tensor, key: Tensor, value: Tensor, borders: Tensor, lengths: list[int], scale: float, plain: Plain) -> Tensor | None:
    """Causal attention inside each document of a row [1, heads, T, D]; [1, T, heads, D], or None where flash attention is to do it all.

    ``borders`` are (0, ..., T) and ``lengths`` their differences, both on the CPU; ``plain`` is flash attention.
    """
    if query.device.type != DEVICE or not takes(query) or max(lengths) < LEAST:
        return None
    rows: dict[Any, Any] = getattr(borders, "sparklab_stretches", {})
    form = (query.shape[1], key.shape[1], query.shape[3], query.dtype)
    if form not in rows:
        chosen, start = [], 0
        for length in lengths:
            span = slice(start, start := start + length)
            chosen.append(length >= LEAST and _is_used(Kind(*form, length >= LONG), [tensor[:, :, span] for tensor in (query, key, value)], scale, plain))
        rows[form] = stretches(lengths, chosen, query.device) if any(chosen) else ()
        borders.sparklab_stretches = rows  # type: ignore[attr-defined]
    out: Tensor | None = _Row.apply(query, key, value, rows[form], scale) if rows[form] else None  # type: ignore[no-untyped-call]
    return out


def takes(query: Tensor) -> bool:
    """Whether cuDNN and flash attention have kernels for heads of this type and width."""
    return query.dtype in BOUND and query.shape[-1] <= WIDEST and not query.shape[-1] % 8


def stretches(lengths: Sequence[int], chosen: Sequence[bool], device: torch.device) -> tuple[Stretch, ...]:
    """The row in calls: one a chosen document, one for all that stand between two of these."""
    found, start = [], 0
    for key, group in groupby(enumerate(lengths), key=lambda item: item[0] if chosen[item[0]] else -1):
        own = [length for _, length in group]
        tokens = sum(own)
        if key >= 0:
            found.append(Stretch(start, tokens, -(-tokens // STEP) * STEP))
        else:
            there = torch.tensor([0, *accumulate(own)], dtype=torch.int32).to(device, non_blocking=True)
            found.append(Stretch(start, tokens, tokens, there, max(own)))
        start += tokens
    return tuple(found)


class _Row(torch.autograd.Function):
    """All stretches of a row."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, row: tuple[Stretch, ...], scale: float) -> Tensor:
        whole = len(row) == 1 and row[0].filled == query.shape[2]
        out = query.new_empty(0 if whole else (1, query.shape[2], query.shape[1], query.shape[3]))
        kept: list[Tensor | None] = []
        for part in row:
            q, k, v = (_cut(tensor.transpose(1, 2), part) for tensor in (query, key, value))
            made, *told = forward_of(q, k, v, part, scale)
            kept += told
            if whole:
                out = made.contiguous()
            else:
                out[:, part.start : part.start + part.tokens] = made[:, : part.tokens]
        ctx.save_for_backward(query, key, value, out, *kept)
        ctx.row, ctx.scale, ctx.whole = row, scale, whole
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        query, key, value, out, *told = ctx.saved_tensors  # once: a checkpointed layer gives it no second time
        given, each = [tensor.transpose(1, 2) for tensor in (query, key, value)], len(told) // len(ctx.row)
        grads = [] if ctx.whole else [tensor.new_empty(tensor.shape) for tensor in given]
        for place, part in enumerate(ctx.row):
            above = _filled(grad[0, part.start : part.start + part.tokens], part).contiguous()
            inputs = (_cut(tensor, part) for tensor in (*given, out))
            made = backward_of(above, *inputs, *told[each * place : each * (place + 1)], part, ctx.scale)
            if ctx.whole:
                grads = list(made)
                break
            for whole, own in zip(grads, made, strict=True):
                whole[:, part.start : part.start + part.tokens] = own[:, : part.tokens]
        return (*(tensor.transpose(1, 2) for tensor in grads), None, None)


def _cut(tensor: Tensor, part: Stretch) -> Tensor:
    """A stretch of [1, T, heads, D] and its filling, as a view unless the row ends before."""
    return _filled(tensor[0, part.start : part.start + part.filled], part)


def _filled(cut: Tensor, part: Stretch) -> Tensor:
    """[tokens, heads, D] as [1, filled, heads, D], with zeros where it is shorter. Strides do not tell how long the row is: cuDNN would prepare each anew."""
    short = part.filled - cut.shape[0]
    return (F.pad(cut, (0, 0, 0, 0, 0, short)) if short else cut)[None]


def forward_of(q: Tensor, k: Tensor, v: Tensor, part: Stretch, scale: float) -> tuple[Any, ...]:
    """The output, [1, tokens, heads, D], and what the backward pass is told: five tensors, or None."""
    if part.borders is None:
        turned = (tensor.transpose(1, 2) for tensor in (q, k, v))
        out, lse, of_q, of_k, _, _, seed, offset, _ = torch.ops.aten._scaled_dot_product_cudnn_attention(*turned, None, True, 0.0, True, False, scale=scale)
        return out.transpose(1, 2), lse, of_q, of_k, seed, offset
    ends = (part.borders, part.borders, part.longest, part.longest)
    out, lse, state, unused, _ = torch.ops.aten._flash_attention_forward(q[0], k[0], v[0], *ends, 0.0, True, False, scale=scale)
    return out[None], lse, state, unused, None, None


def backward_of(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, *told: Any) -> tuple[Tensor, ...]:
    """The gradients of q, k and v, from what :func:`forward_of` told, the stretch and the scale."""
    *told, part, scale = told  # type: ignore[assignment]
    if part.borders is None:
        lse, of_q, of_k, seed, offset = told
        turned = (tensor.transpose(1, 2) for tensor in (grad, q, k, v, out))
        words = (lse, seed, offset, None, of_q, of_k, part.filled, part.filled, 0.0, True)
        return tuple(made.transpose(1, 2) for made in torch.ops.aten._scaled_dot_product_cudnn_attention_backward(*turned, *words, scale=scale))
    lse, state, unused, *_ = told
    ends = (part.borders, part.borders, part.longest, part.longest)
    made = torch.ops.aten._flash_attention_backward(*(tensor[0] for tensor in (grad, q, k, v, out)), lse, *ends, 0.0, True, state, unused, scale=scale)
    return tuple(tensor[None] for tensor in made)


def _is_used(kind: Kind, document: list[Tensor], scale: float, plain: Plain) -> bool:
    if kind not in decided:
        if DEVICE == "cuda" and torch.cuda.is_current_stream_capturing():
            return False
        decided[kind] = _trial(kind, document, scale, plain)
        logging.getLogger(__name__).debug("%s: %s", kind, decided[kind].said)
    return decided[kind].used


def _trial(kind: Kind, document: list[Tensor], scale: float, plain: Plain) -> Verdict:
    """Runs a document alone, and cut in two behind a short one, beside flash attention; alone it is timed. Leaves no trace in the graph being built."""
    # hooks of our own: those of a checkpointed layer count what is kept, and must not see this
    with torch.inference_mode(False), torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        leaves = [tensor.detach().clone().requires_grad_() for tensor in document]
        tokens, grad = leaves[0].shape[2], leaves[0].detach().transpose(1, 2).clone()
        try:
            for lengths in ((tokens // 16 + 1, tokens - tokens // 16 - 1), (tokens,)):
                row = stretches(lengths, [length == max(lengths) for length in lengths], leaves[0].device)
                borders = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)

                def ours(row: tuple[Stretch, ...] = row) -> list[Tensor]:
                    out = _Row.apply(*leaves, row, scale)  # type: ignore[no-untyped-call]
                    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

                def theirs(borders: Tensor = borders, longest: int = max(lengths)) -> list[Tensor]:
                    out = plain(*leaves, borders, longest, scale, None)
                    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

                off = apart(ours(), theirs())
                if not off <= BOUND[kind.dtype]:
                    return Verdict(False, f"other numbers than flash attention, {off:.2g} of their size apart")
            mine, flash = timed(ours), timed(theirs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - a driver's, another version's: whatever it is, there is another way
            return Verdict(False, f"does not run here ({said(error)})")
    figures = f"{tokens:,} tokens forward and backward: cuDNN {mine:.3f} ms, flash attention {flash:.3f} ms; {off:.1e} of their size apart"
    return Verdict(flash >= GAIN * mine, figures)


def timed(function: Callable[[], Any]) -> float:
    """Milliseconds of the device's for one call; calls wait behind others, so that what Python takes between kernels is not counted."""
    for _ in range(2):
        function()
    found = []
    cuda: Any = torch.cuda  # whose events are not typed
    for _ in range(3):
        begin, end = (cuda.Event(enable_timing=True) for _ in range(2))
        cuda._sleep(20_000_000)  # clock ticks, some 10 ms
        begin.record()
        for _ in range(4):
            function()
        end.record()
        end.synchronize()
        found.append(float(begin.elapsed_time(end)) / 4)
    return median(found)
