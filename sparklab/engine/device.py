"""What a tensor's arithmetic runs on: its own device, or, while a step is traced without one, the kind of device that the trace is for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from torch import Tensor

_Piece = TypeVar("_Piece")
_traced_for_gpu: ContextVar[bool | None] = ContextVar("traced_for_gpu", default=None)  # None: nothing is traced, numbers are wanted


def on_gpu(tensor: Tensor) -> bool:
    """Whether sizes and kernels are those of a GPU."""
    return tensor.is_cuda or bool(_traced_for_gpu.get())


def is_traced() -> bool:
    """Whether a step is traced: tensors have no numbers to look at."""
    return _traced_for_gpu.get() is not None


def to_do(pieces: Sequence[_Piece]) -> Sequence[_Piece]:
    """Of pieces of work that hold no more one after the other than the first two: all of them, or those two where bytes alone are wanted."""
    return pieces[:2] if is_traced() else pieces


@contextmanager
def traced_for(gpu: bool) -> Iterator[None]:
    """Tensors without memory lie on a CPU whatever they stand for: inside, they are taken as a GPU's."""
    token = _traced_for_gpu.set(gpu)
    try:
        yield
    finally:
        _traced_for_gpu.reset(token)
