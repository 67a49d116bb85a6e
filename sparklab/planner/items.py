"""What ledgers are written in: items, moments, and the figures that more than one of them needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from sparklab.box import Box
from sparklab.model.anatomy import Anatomy
from sparklab.units import GIB, MIB, is_na

ANSWERS_AT_ONCE: Final = 64  # most prompts answered together
CPU_MULTIPLE: Final = 64  # tokens that go through a model on a CPU are filled up to one: oneDNN makes, and keeps, kernels for every shape that it meets
CACHE_BYTES: Final = 1.0 * GIB  # most keys and values held while answering, unless a single answer needs more
CUBLAS_BYTES: Final = 32.0 * MIB
"""A workspace of cuBLAS on sm_9x, 10x and 12x, inside the allocator. torch keeps one for each handle, and the thread that runs backward passes has a
handle of its own: two from the first update on, as measured on an H200 with torch 2.11 (benchmarks/cuda_parity.py, its cases of memory)."""
LONG_DOCUMENT: Final = 1024  # tokens from which on a document goes through attention alone on a GPU (sparklab.engine.cudnn)
BESIDE_RECORDING: Final = "loss beside CUDA graphs"
SLACK_SHARE: Final = 0.03  # reserved but not allocated, of what comes and goes; assumed until a rehearsal measures it


def filled(tokens: int, on_gpu: bool) -> int:
    """Tokens that go through the model for so many of a row.

    >>> filled(600, on_gpu=False)
    640
    """
    return tokens if on_gpu else -(-tokens // CPU_MULTIPLE) * CPU_MULTIPLE


def cache_bytes_per_token(anatomy: Anatomy, width: int) -> int:
    """Bytes of a token's keys and values in all layers, at ``width`` bytes a number."""
    return anatomy.cached_numbers * width


def answers_at_once(anatomy: Anatomy, length: int, width: int) -> int:
    """How many answers of at most ``length`` tokens, prompt included, are generated together: up to 64, while their cache stays within 1 GiB."""
    return max(1, min(ANSWERS_AT_ONCE, int(CACHE_BYTES / (length * cache_bytes_per_token(anatomy, width)))))


@dataclass(frozen=True)
class LossTile:
    """How much the chunked loss (:mod:`sparklab.engine.loss`) has at once."""

    tokens: int
    """Whose logits are made by one product."""
    rows: int
    """Of these, how many are in fp32."""


def loss_tile(on_gpu: bool) -> LossTile:
    """The fastest sizes measured on a CPU (benchmarks/LOG.md); on a GPU as many tokens as keep the head's product bound by arithmetic, not by reading it."""
    return LossTile(1024, 256) if on_gpu else LossTile(512, 32)


@dataclass(frozen=True)
class Item:
    """One line before it is written out: the formula is only put together when somebody reads it."""

    name: str
    size_bytes: float
    explain: Callable[[], str]


def runtime(box: Box) -> Item:
    """What is there before the first tensor."""
    return Item("runtime", box.runtime_bytes, lambda: f"Python, torch, transformers, the device's context ({box.sources.get('runtime_bytes', 'assumed')})")


def slack(box: Box, moving: float, handles: int = 2) -> tuple[Item, ...]:
    """What libraries take from the allocator, and what it holds beyond what was asked of it; ``moving`` is in bytes, all that comes and goes.

    ``handles``: threads that multiply, or have multiplied: what torch keeps for them stays when they are done.
    """
    measured = not is_na(box.slack_share)
    share = box.slack_share if measured else SLACK_SHARE
    held = Item("allocator slack", share * moving, lambda: f"{share:.1%} of what comes and goes ({'measured' if measured else 'assumed'})")
    if not box.is_gpu:
        return (held,)
    why = f"{CUBLAS_BYTES / MIB:.0f} MiB of cuBLAS, from the allocator" + (", for the forward and for the backward pass" if handles == 2 else "")
    return (Item("library workspace", handles * CUBLAS_BYTES, lambda: why), held)


@dataclass(frozen=True)
class Moment:
    """A point in a phase, with what comes and goes there."""

    name: str
    items: tuple[Item, ...]

    @property
    def size_bytes(self) -> float:
        return sum(item.size_bytes for item in self.items)
