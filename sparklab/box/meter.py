"""The live meter: what the one pool of memory holds right now, read from /proc in well under a millisecond.

``MemAvailable`` is the figure to plan and guard by: page cache counts as free there, unlike in what CUDA and NVML report on a
unified box. Every field is ``NA`` where the system does not tell (macOS, a container without PSI).
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sparklab.box.watchdog import read_group, read_pressure, read_sizes
from sparklab.units import NA, format_bytes, is_na, jsonable


@dataclass(frozen=True, kw_only=True)
class MemorySnapshot:
    """One look at the memory; sizes in bytes, ``NA`` where the system does not tell."""

    total_bytes: float = NA
    """All memory the system sees."""
    available_bytes: float = NA
    """What programs can still get without swapping (MemAvailable: free memory and page cache that can go)."""
    free_bytes: float = NA
    """What nobody uses, not even as page cache."""
    cached_bytes: float = NA
    """Page cache and slabs that the kernel gives back when asked."""
    swap_used_bytes: float = NA
    """What was pushed out to disk."""
    pressure_percent: float = NA
    """Share of the last ten seconds in which some task waited for memory (PSI some avg10), in percent."""
    stalled_percent: float = NA
    """Share in which all of them waited (PSI full avg10), in percent."""
    limit_bytes: float = NA
    """The most this container may have, where that is less than the system has."""
    room_bytes: float = NA
    """What is left of that limit, page cache that can go counted as left."""
    limit_free_bytes: float = NA
    """What is left of it without that."""
    rss_bytes: float = NA
    """What the process holds in memory."""
    rss_peak_bytes: float = NA
    """The most it ever held (VmHWM)."""
    own_bytes: float = NA
    """Of what it holds now, anonymous and shared memory: files it has mapped can go."""

    def within_limit(self) -> MemorySnapshot:
        """The pool as far as this container may have it: the same where it has no limit of its own."""
        if is_na(self.limit_bytes):
            return self
        free = min(self.free_bytes, self.limit_free_bytes)
        return replace(self, total_bytes=self.limit_bytes, available_bytes=min(self.available_bytes, self.room_bytes), free_bytes=free,
                       cached_bytes=min(self.cached_bytes, self.room_bytes - self.limit_free_bytes))  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Field names to values for JSON; unknown is None."""
        values: dict[str, Any] = jsonable(asdict(self))
        return values

    def __repr__(self) -> str:
        return (
            f"MemorySnapshot({format_bytes(self.available_bytes)} available of {format_bytes(self.total_bytes)}, "
            f"process {format_bytes(self.rss_bytes)}, peak {format_bytes(self.rss_peak_bytes)})"
        )


def read_memory(proc: Path = Path("/proc"), pid: int | None = None) -> MemorySnapshot:
    """What the memory holds now, and what process ``pid`` (default: this one) holds of it. Never raises: what cannot be read is ``NA``."""
    memory = read_sizes(proc / "meminfo")
    group = read_group(proc, memory.get("MemTotal", NA))
    pressure = read_pressure(proc / "pressure" / "memory")
    process = read_sizes(proc / str(os.getpid() if pid is None else pid) / "status")
    swap_used = memory.get("SwapTotal", NA) - memory.get("SwapFree", NA)
    # Shmem (tmpfs) is counted inside Cached but cannot be dropped.
    cached = memory.get("Cached", NA) + memory.get("Buffers", 0.0) + memory.get("SReclaimable", 0.0) - memory.get("Shmem", 0.0)
    return MemorySnapshot(
        total_bytes=memory.get("MemTotal", NA),
        available_bytes=memory.get("MemAvailable", NA),
        free_bytes=memory.get("MemFree", NA),
        cached_bytes=cached if is_na(cached) else max(0.0, cached),
        swap_used_bytes=swap_used,
        pressure_percent=pressure["some"],
        stalled_percent=pressure["full"],
        limit_bytes=group.get("limit_bytes", NA),
        room_bytes=group.get("available_bytes", NA),
        limit_free_bytes=group.get("free_bytes", NA),
        rss_bytes=process.get("VmRSS", NA),
        rss_peak_bytes=process.get("VmHWM", NA),
        own_bytes=process.get("RssAnon", NA) + process.get("RssShmem", 0.0),
    )


def read_usable(proc: Path = Path("/proc"), *, unified: bool) -> MemorySnapshot:
    """As :func:`read_memory`, within the limit of the container unless the box is ``unified``: there the limit does not hold what CUDA takes."""
    memory = read_memory(proc)
    return memory if unified else memory.within_limit()
