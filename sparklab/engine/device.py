"""What a tensor's arithmetic runs on: its own device, or, while a step is traced without one, the kind of device that the trace is for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_gpu: ContextVar[bool] = ContextVar("traced_for_a_gpu", default=False)


def on_gpu(tensor: Tensor) -> bool:
    """Whether sizes and kernels are those of a GPU."""
    return tensor.is_cuda or _gpu.get()


@contextmanager
def traced_for(gpu: bool) -> Iterator[None]:
    """Tensors without memory lie on a CPU whatever they stand for: inside, they are taken as a GPU's."""
    token = _gpu.set(gpu)
    try:
        yield
    finally:
        _gpu.reset(token)
