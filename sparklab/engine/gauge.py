"""What each phase of the work holds at its highest moment: by the allocator's own books on CUDA, storage by storage on a CPU."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from sparklab.box.meter import read_memory
from sparklab.engine.storages import StorageTracker
from sparklab.units import NA


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The most that was held in one phase, in bytes."""

    tensors_bytes: float
    """Tensors on the device: what was asked of CUDA's allocator, which gives up to 1 MiB more where a block is not worth cutting; on a CPU all living
    storages."""
    reserved_bytes: float
    """What CUDA's allocator held of the device for it; ``NA`` on a CPU."""
    host_bytes: float
    """The process's resident memory at its highest; ``NA`` where the system does not tell."""
    host_growth_bytes: float
    """By how much that is above what it was when the phase began."""
    seconds: float


class Gauge:
    """``with gauge.phase("train"): ...`` writes a :class:`Reading` into ``gauge.readings["train"]``; phases come one after the other.

    On a CPU every tensor must be made inside a phase to be seen, and following them costs time: :meth:`pause` around what is timed.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.readings: dict[str, Reading] = {}
        self._tracker = None if device.type == "cuda" else StorageTracker()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measures what happens inside."""
        self.synchronize()
        _forget_host_peak()
        before, began = read_memory().rss_bytes, time.perf_counter()
        if self._tracker is None:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self._tracker.peak_bytes = self._tracker.now_bytes
        self.resume()
        try:
            yield
        finally:
            self.pause()
        self.synchronize()
        host = read_memory().rss_peak_bytes
        self.readings[name] = Reading(
            tensors_bytes=asked_bytes(self.device, "peak") if self._tracker is None else self._tracker.peak_bytes,
            reserved_bytes=torch.cuda.max_memory_reserved(self.device) if self._tracker is None else NA,
            host_bytes=host,
            host_growth_bytes=max(0.0, host - before),
            seconds=time.perf_counter() - began,
        )

    def pause(self) -> None:
        """Stops following storages; those seen before are still known, and forgotten when they end."""
        if self._tracker is not None:
            self._tracker.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def resume(self) -> None:
        """Follows storages again."""
        if self._tracker is not None:
            self._tracker.__enter__()  # type: ignore[no-untyped-call]

    @property
    def resident_bytes(self) -> float:
        """What the process holds beside living tensors, on a CPU: Python, libraries and what they have set up for themselves."""
        assert self._tracker is not None, "a device's tensors are not resident memory"
        gc.collect()
        if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # glibc keeps freed memory until it is asked for it
            libc.malloc_trim(0)
        return read_memory().rss_bytes - self._tracker.now_bytes

    def synchronize(self) -> None:
        """Waits until the device has done all it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def asked_bytes(device: torch.device, when: str) -> float:
    """What is (``when="current"``) or was at its highest (``"peak"``) asked of CUDA's allocator; what it gave where it does not tell (cudaMallocAsync)."""
    told = torch.cuda.memory_stats(device)
    return float(told.get(f"requested_bytes.all.{when}") or told.get(f"allocated_bytes.all.{when}", 0))


def _forget_host_peak() -> None:
    """Lets the kernel count this process's highest resident memory anew (proc(5), clear_refs); where it cannot, the highest so far stays."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return
