"""Who else holds memory: the largest other processes, swap and page cache, so that a plan can name what stands in its way."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from sparklab.box.meter import MemorySnapshot
from sparklab.box.watchdog import LEAST_BYTES, named_largest, process_sizes
from sparklab.units import MIB

SWAP, CACHE = "swap", "page cache"


def held_by_others(proc: Path, memory: MemorySnapshot) -> dict[str, float]:
    """Name to bytes, largest process first: processes other than this one, then what lies in swap and in the page cache, from 0.5 GiB on.

    A process is counted by what only it holds (anonymous and shared memory; files it has mapped can go). Never raises.
    """
    held = named_largest(proc, process_sizes(proc), (os.getpid(),))
    for name, size in ((SWAP, memory.swap_used_bytes), (CACHE, memory.cached_bytes)):
        if size >= LEAST_BYTES:  # NA compares false
            held[name] = size
    return held


def held_on_gpus(proc: Path, run: Callable[[Sequence[str]], str]) -> dict[str, float]:
    """Name to bytes of GPU memory, largest first: processes other than this one, as nvidia-smi tells. Never raises."""
    return named_largest(proc, device_sizes(run), (os.getpid(),))


def device_sizes(run: Callable[[Sequence[str]], str]) -> dict[int, float]:
    """What each process holds on the NVIDIA devices, in bytes by its id; on a unified box that is part of the one pool. Never raises."""
    sizes: dict[int, float] = {}
    for line in run(("nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits")).splitlines():
        pid, _, size = (word.strip() for word in line.partition(","))
        if pid.isdigit() and size.isdigit():
            sizes[int(pid)] = sizes.get(int(pid), 0.0) + int(size) * MIB
    return sizes
