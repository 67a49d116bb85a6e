"""Measuring what a real step holds: every storage that an operation returns is followed from its birth to its end."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


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
        result = operation(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.watch(leaf)
        return result
