"""What flash attention's kernels cannot do, on CUDA, by torch's flex_attention: soft-capped scores, sinks, heads wider than 256, numbers in fp32.

A packed row [1, heads, T, D] goes through one compiled kernel under a mask of blocks, made once a row from the documents' borders, so that blocks
nobody looks at cost nothing. Kept for the backward pass are q, k, v, the output and one log-sum-exp a row and head, as block by block
(:mod:`sparklab.engine.blockwise`), which computes wherever this cannot.

A sink s only enters the sum of the weights: with lse the log-sum-exp of a row's scores, its result is ``out * sigmoid(lse - s)``.

Compiled code is made for one shape and grows in number with them, so rows are filled up to few lengths, and each *variant* (shape, window, cap ...) is
tried once, forward and backward, against block by block code on the very tensors that asked for it. One that does not compile (a chip with little
shared memory, no C compiler), gives other numbers, or would be one too many for torch's compiler is left to block by block code, and the log says
why. A plan counts block by block code.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparklab.engine import blockwise
from sparklab.text import said

DEVICE = "cuda"
"""The kind of device it runs on. (No Final: tests run torch's uncompiled reference on a CPU.)"""
BLOCK: Final = 128  # tokens that a block of the mask is wide, flex_attention's own default
STEP: Final = 1024
"""Rows are filled up to a multiple of it: packed rows are nearly full, so a run meets one or two lengths."""
MOST: Final = 8
"""Variants that torch's compiler holds of one function before it gives up (``torch._dynamo.config.recompile_limit``)."""
_MANY: Final = "flex_attention is compiled for"
BOUND: Final = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""How far a trial may be from block by block code, in the size of each tensor: TF32 and the order of sums in fp32, three digits in bf16."""


class Variant(NamedTuple):
    """What a kernel is compiled for."""

    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    scale: float
    window: int | None
    cap: float | None
    sinks: bool
    learns: tuple[bool, ...]
    """Whether q, k and v carry gradients."""
    mode: tuple[bool, bool]
    """Whether gradients are recorded at all, and torch's inference mode: torch compiles anew for each."""


_decided: dict[Variant, str] = {}  # "" where it is used, else why not


def attend(
    query: Tensor, key: Tensor, value: Tensor, borders: Tensor, scale: float | None, window: int | None, cap: float | None, sinks: Tensor | None
) -> Tensor | None:
    """Causal attention inside each document of a row; [1, T, heads, D], or None where it is not to be had.

    ``borders``: (0, ..., T), on the CPU; a token sees itself and the ``window - 1`` tokens before it (None: all its document); scores s become
    ``cap * tanh(s / cap)``; ``sinks`` are [heads].
    """
    if query.device.type != DEVICE or query.dtype not in BOUND:
        return None
    tokens, length = query.shape[2], -(-query.shape[2] // STEP) * STEP
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    window = None if window is None or window >= length else window
    mode = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    learns = tuple(mode[0] and tensor.requires_grad for tensor in (query, key, value))
    shapes = tuple((*tensor.shape[:2], length, tensor.shape[3]) for tensor in (query, key, value))
    variant = Variant(shapes, query.dtype, scale, window, cap, sinks is not None, learns, mode)
    if variant not in _decided:
        _decided[variant] = _trial(variant, query, key, value, borders, sinks)
        if _decided[variant]:
            logging.getLogger(__name__).warning("%s; it runs block by block", _decided[variant])
    if _decided[variant]:
        return None
    return _run(variant, query, key, value, _mask(borders, length, window, query.device), sinks)[:, :, :tokens].transpose(1, 2)


def _run(variant: Variant, query: Tensor, key: Tensor, value: Tensor, mask: Any, sinks: Tensor | None) -> Tensor:
    """[1, heads, length, D], what was filled up included."""
    from torch.nn.attention.flex_attention import AuxRequest  # noqa: PLC0415 - a second to load, and only CUDA needs it

    short = variant.shapes[0][2] - query.shape[2]
    # as projections write them, [1, T, heads, D] in memory, whether filled up or not: another order is another kernel
    q, k, v = (_filled(tensor.transpose(1, 2), short).transpose(1, 2) for tensor in (query, key, value))
    grouped = q.shape[1] != k.shape[1]
    aux = AuxRequest(lse=True) if sinks is not None else None
    found = compiled()(q, k, v, score_mod=capping(variant.cap), block_mask=mask, scale=variant.scale, enable_gqa=grouped, return_aux=aux)
    if sinks is None:
        plain: Tensor = found
        return plain
    out, told = found
    share: Tensor = torch.sigmoid(told.lse - sinks.float()[None, :, None])
    shared: Tensor = out * share[..., None].to(out.dtype)
    return shared


def _filled(tensor: Tensor, short: int) -> Tensor:
    return F.pad(tensor, (0, 0, 0, 0, 0, short)) if short else tensor.contiguous()


@cache
def compiled() -> Callable[..., Any]:
    """flex_attention, compiled: where that fails it fails, rather than make the whole table of scores."""
    from torch.nn.attention.flex_attention import flex_attention  # noqa: PLC0415

    function: Callable[..., Any] = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    return function


@cache
def capping(cap: float | None) -> Callable[..., Tensor] | None:
    """Soft-capping as flex_attention takes it. One function a cap: another one would be compiled anew."""
    if cap is None:
        return None

    def capped(score: Tensor, batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return capped


def _mask(borders: Tensor, length: int, window: int | None, device: torch.device) -> Any:
    """The row's mask of blocks, made by the first layer that asks and kept with the borders."""
    kept: dict[Any, Any] = getattr(borders, "sparklab_masks", None) or {}
    if (length, window) not in kept:
        kept[length, window] = block_mask(borders, length, window, device)
        borders.sparklab_masks = kept  # type: ignore[attr-defined]
    return kept[length, window]


def block_mask(borders: Tensor, length: int, window: int | None, device: torch.device) -> Any:
    """Which blocks of keys each block of queries looks at, whole or in part, for a row filled up to ``length``; each block of the filling is a document."""
    from torch.nn.attention.flex_attention import BlockMask  # noqa: PLC0415

    tokens = int(borders[-1])
    documents = torch.bucketize(torch.arange(length), borders[1:].long(), right=True)
    documents[tokens:] += torch.arange(length - tokens) // BLOCK
    of_blocks = documents.view(-1, BLOCK)
    first, last = of_blocks[:, 0], of_blocks[:, -1]
    blocks = torch.arange(len(of_blocks))
    apart = blocks[:, None] - blocks  # queries below, keys across
    seen = (apart >= 0) & (last >= first[:, None])
    whole = (apart > 0) & (first == last[:, None])  # the key block's first token is in the document of the query block's last
    if window is not None:
        seen &= (apart - 1) * BLOCK + 1 < window  # the nearest pair
        whole &= (apart + 1) * BLOCK - 1 < window  # the farthest
    there = documents.to(torch.int32).to(device, non_blocking=True)

    def allowed(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        same = (row >= column) & (there[row] == there[column])
        return same if window is None else same & (row - column < window)

    return BlockMask.from_kv_blocks(*_listed(seen & ~whole, device), *_listed(whole, device), BLOCK_SIZE=BLOCK, mask_mod=allowed)


def _listed(chosen: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """As BlockMask wants it: how many are chosen in each row, and which, those first; [1, 1, blocks] and [1, 1, blocks, blocks]."""
    counts = chosen.sum(1, dtype=torch.int32)
    places = torch.argsort(chosen.to(torch.int8), dim=1, descending=True, stable=True).to(torch.int32)
    return counts[None, None].to(device, non_blocking=True), places[None, None].contiguous().to(device, non_blocking=True)


def _trial(variant: Variant, query: Tensor, key: Tensor, value: Tensor, borders: Tensor, sinks: Tensor | None) -> str:
    """Runs a variant beside block by block code; "" where they agree, else what is wrong. Leaves no trace in the graph that is being built."""
    if sum(not reason.startswith(_MANY) for reason in _decided.values()) >= MOST:
        return f"{_MANY} {MOST} shapes already, and rows of {variant.shapes[0][2]:,} tokens would be one more"
    asked = (*variant.learns, any(variant.learns))
    given = [tensor.detach().clone().requires_grad_(learns) for tensor, learns in zip((query, key, value, sinks), asked, strict=True) if tensor is not None]
    leaves = [tensor for tensor in given if tensor.requires_grad]
    # hooks of our own: those of a checkpointed layer count what is kept, and must not see this
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        try:
            mask = _mask(borders, variant.shapes[0][2], variant.window, query.device)
            ours = _run(variant, given[0], given[1], given[2], mask, given[3] if sinks is not None else None)[:, :, : query.shape[2]]
            found = [ours, *(torch.autograd.grad(ours, leaves, query.detach()) if leaves else ())]
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - a compiler's, a driver's: whatever it is, there is another way
            return f"flex_attention does not run here ({said(error)})"
        wanted = _block_by_block(variant, given, borders)
        checked = [wanted, *(torch.autograd.grad(wanted, leaves, query.detach()) if leaves else ())]
    with torch.no_grad():
        off = apart(found, checked)
    return "" if off <= BOUND[variant.dtype] else f"flex_attention gives other numbers here than block by block code, {off:.2g} of their size apart"


def apart(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """How far tensors are from what they should be, in the size of each; the farthest."""
    return max(float((one.float() - other.float()).norm() / other.float().norm().clamp_min(1e-20)) for one, other in zip(found, wanted, strict=True))


def _block_by_block(variant: Variant, given: list[Tensor], borders: Tensor) -> Tensor:
    def documents() -> Iterator[Tensor]:
        lengths = borders.diff().tolist()
        for q, k, v in zip(*(torch.split(tensor, lengths, 2) for tensor in given[:3]), strict=True):
            yield blockwise.attend(q, k, v, variant.scale, variant.window, variant.cap, given[3] if variant.sinks else None)

    return torch.cat(list(documents()), 2)
