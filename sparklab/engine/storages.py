"""Measuring what a real step holds: every storage that an operation returns is followed from its birth to its end."""

from __future__ import annotations

import sys
import weakref
from typing import Any, Final

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ADD: Final = torch.ops.aten.add.Tensor
ADD_IN_PLACE: Final = torch.ops.aten.add_.Tensor
HELD_BY_ENGINE: Final = 4  # references to a tensor in a dispatch mode's arguments that autograd alone holds (torch 2.13; tests/engine/test_storages.py)
OWN_FRAMES: Final = ("__torch_dispatch__", "run", "_fn", "inner")  # of this module and of torch, between an operation and whoever asked for it


class StorageTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch does not annotate it
    """Inside ``with tracker:`` it counts the bytes of all living storages it has seen; ``watch`` tells it of those born before.

    What a kernel allocates inside itself and frees before it returns is not seen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now_bytes = 0
        self.peak_bytes = 0
        self._alive: dict[int, int] = {}

    def watch(self, tensor: torch.Tensor) -> None:
        """Counts the tensor's storage, if it is not counted yet; a meta tensor has none."""
        if tensor.is_meta:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        self._alive[key] = storage.nbytes()
        self._count(key, storage.nbytes())
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self._count(key, -self._alive.pop(key))

    def _count(self, key: int, size: int) -> None:
        """A storage comes (``size`` bytes), or goes (as many less)."""
        self.now_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.now_bytes)

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(operation, args, kwargs or {})

    def run(self, operation: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Does what was asked for, and counts what comes of it."""
        if operation is ADD and torch._C._current_graph_task_id() != -1 and _is_accumulation(*args[:2]):
            operation = ADD_IN_PLACE
        result = operation(*args, **kwargs)
        if isinstance(result, torch.Tensor):
            self.watch(result)
        elif result is not None:
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor):
                    self.watch(leaf)
        return result


def _is_accumulation(held: Any, added: Any) -> bool:
    """Whether autograd adds up two contributions to one gradient, which it does in place but for the presence of a dispatch mode.

    ``can_accumulate_inplace`` in torch's autograd/input_buffer.cpp: nobody else holds the first contribution, nor a view of it.
    """
    if not isinstance(added, torch.Tensor) or held._use_count() > HELD_BY_ENGINE or held.shape != added.shape or held.dtype != added.dtype:
        return False
    frame = sys._getframe(1)
    while frame.f_code.co_name in OWN_FRAMES or frame.f_code is _is_accumulation.__code__:
        assert frame.f_back is not None, "somebody asks for every operation"
        frame = frame.f_back
    if frame.f_code.co_name != "_engine_run_backward":  # an addition in a backward pass written in Python
        return False
    storage = held.untyped_storage()
    dense = held.nbytes == storage.nbytes() or held.is_contiguous()
    alone = torch._C._storage_Use_Count(storage._cdata) == 2  # the tensor's own reference, and the one just asked for
    return dense and alone
