"""Who else holds memory: the largest other processes, swap and page cache, so that a plan can name what stands in its way."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from sparklab.box.meter import MemorySnapshot, read_sizes
from sparklab.units import GIB, MIB

LEAST_BYTES: Final = 0.5 * GIB  # smaller holders are not worth a line
MOST_NAMED: Final = 4
SWAP, CACHE = "swap", "page cache"


def held_by_others(proc: Path, memory: MemorySnapshot) -> dict[str, float]:
    """Name to bytes, largest process first: processes other than this one, then what lies in swap and in the page cache, from 0.5 GiB on.

    A process is counted by what only it holds (anonymous and shared memory; files it has mapped can go). Never raises.
    """
    held = _named(proc, process_sizes(proc))
    for name, size in ((SWAP, memory.swap_used_bytes), (CACHE, memory.cached_bytes)):
        if size >= LEAST_BYTES:  # NA compares false
            held[name] = size
    return held


def held_on_gpus(proc: Path, run: Callable[[Sequence[str]], str]) -> dict[str, float]:
    """Name to bytes of GPU memory, largest first: processes other than this one, as nvidia-smi tells. Never raises."""
    return _named(proc, device_sizes(run))


def device_sizes(run: Callable[[Sequence[str]], str]) -> dict[int, float]:
    """What each process holds on the NVIDIA devices, in bytes by its id; on a unified box that is part of the one pool. Never raises."""
    sizes: dict[int, float] = {}
    for line in run(("nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits")).splitlines():
        pid, _, size = (word.strip() for word in line.partition(","))
        if pid.isdigit() and size.isdigit():
            sizes[int(pid)] = sizes.get(int(pid), 0.0) + int(size) * MIB
    return sizes


def _named(proc: Path, sizes: dict[int, float]) -> dict[str, float]:
    """The largest processes by name."""
    others = ((size, pid) for pid, size in sizes.items() if size >= LEAST_BYTES and pid != os.getpid())
    return {f"{process_name(proc, pid)} (process {pid})": size for size, pid in sorted(others, reverse=True)[:MOST_NAMED]}


def process_sizes(proc: Path) -> dict[int, float]:
    """What each process holds, by its id."""
    sizes = {}
    try:
        found = [entry.name for entry in os.scandir(proc) if entry.name.isdigit()]
    except OSError:
        return {}
    for name in found:
        fields = read_sizes(proc / name / "status")
        sizes[int(name)] = fields.get("RssAnon", 0.0) + fields.get("RssShmem", 0.0)
    return sizes


def process_name(proc: Path, pid: int) -> str:
    """The program's name as it may stand in a line of text."""
    try:
        text = (proc / str(pid) / "comm").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "unknown"
    return "".join(letter for letter in text.strip() if letter.isprintable())[:40] or "unknown"
