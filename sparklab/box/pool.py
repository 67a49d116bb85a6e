"""The pool of memory right now: who holds it, what can be had back, and how hard it is pressed. The books close: all parts sum to the total."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from sparklab.box.meter import MemorySnapshot, read_usable
from sparklab.box.watchdog import process_name, process_sizes
from sparklab.units import MIB, NA, format_bytes, is_na, jsonable

LEAST_SHARE: Final = 0.01  # of the pool; smaller holders are not worth a line
LEAST_BYTES: Final = 64 * MIB
MOST_NAMED: Final = 6
WORKER: Final = b"sparklab.run.worker"
BUSY_PERCENT: Final = 10.0  # PSI some avg10 from which waiting for memory is felt
STALLED_PERCENT: Final = 40.0

Level = Literal["good", "warn", "bad", "unknown"]


@dataclass(frozen=True)
class Holder:
    """A process and the memory that only it holds."""

    name: str
    """The program's name, or the run that it advances."""
    pid: int
    bytes: float

    @property
    def label(self) -> str:
        """As lists show it."""
        return self.name if self.name.startswith("run ") else f"{self.name} (process {self.pid})"


@dataclass(frozen=True, kw_only=True)
class Pool:
    """One look at the whole pool. Sizes in bytes; ``NA`` where the system does not tell."""

    memory: MemorySnapshot
    holders: tuple[Holder, ...]
    """The largest processes, largest first."""
    rest_bytes: float
    """What smaller processes and the kernel hold, and on a unified box whatever a device holds for nobody in particular."""
    reserve_bytes: float
    """What no plan may touch."""

    @property
    def parts(self) -> list[tuple[str, float]]:
        """(what, bytes) of everything in the pool, in the order of a bar: holders, the rest, page cache that can go, free. They sum to the total."""
        memory = self.memory
        if is_na(self.rest_bytes):
            return []
        held = [(holder.label, holder.bytes) for holder in self.holders]
        return [*held, ("everything else", self.rest_bytes), ("page cache, given back when asked", memory.cached_bytes), ("free", memory.free_bytes)]

    @property
    def pressure(self) -> tuple[Level, str]:
        """How hard the pool is pressed, and why, in words."""
        return pressure(self.memory, self.reserve_bytes)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        level, reason = self.pressure
        holders = [{"name": holder.name, "pid": holder.pid, "bytes": holder.bytes} for holder in self.holders]
        values = {"reserve_bytes": self.reserve_bytes, "rest_bytes": self.rest_bytes, "pressure": level, "reason": reason}
        return {**self.memory.to_dict(), **jsonable(values), "holders": holders}


def read_pool(reserve_bytes: float, proc: Path = Path("/proc"), on_device: Mapping[int, float] | None = None, *, unified: bool = False) -> Pool:
    """Who holds what, now, within the limit of the container unless the box is ``unified``. Looks at every process (50 microseconds each). Never raises.

    ``on_device``: bytes by process id of what a device holds in the same pool, which /proc does not show (a unified box).
    """
    memory = read_usable(proc, unified=unified)
    used = memory.total_bytes - memory.free_bytes - memory.cached_bytes
    least = max(LEAST_BYTES, 0.0 if is_na(used) else LEAST_SHARE * memory.total_bytes)
    sizes = process_sizes(proc)
    for pid, size in (on_device or {}).items():
        sizes[pid] = sizes.get(pid, 0.0) + size
    largest = sorted(((size, pid) for pid, size in sizes.items() if size >= least), reverse=True)[:MOST_NAMED]
    holders, left = [], used
    for whole, pid in largest:
        size = whole if is_na(left) else min(whole, left)  # memory that two processes share is counted in both: the books must close
        left -= size
        holders.append(Holder(_run_name(proc, pid) or process_name(proc, pid), pid, size))
    return Pool(memory=memory, holders=tuple(holders), rest_bytes=NA if is_na(used) else max(0.0, left), reserve_bytes=reserve_bytes)


def pressure(memory: MemorySnapshot, reserve_bytes: float) -> tuple[Level, str]:
    """``good``, ``warn`` or ``bad``, and the reason in words; ``unknown`` where the system tells nothing.

    By what programs can still get (MemAvailable) against the reserve, and by the share of time in which tasks wait for memory (PSI): used memory
    says nothing, since page cache counts as used.
    """
    available, waiting = memory.available_bytes, memory.pressure_percent
    if is_na(available):
        return "unknown", "the system does not tell how much memory is available"
    left = f"{format_bytes(available)} available" + (" in this container" if memory.total_bytes == memory.limit_bytes else "")
    if available < reserve_bytes:
        return "bad", f"{left}, less than the {format_bytes(reserve_bytes)} kept free for the system"
    if waiting >= STALLED_PERCENT:
        return "bad", f"tasks wait for memory {waiting:.0f} % of the time"
    if waiting >= BUSY_PERCENT:
        return "warn", f"tasks wait for memory {waiting:.0f} % of the time"
    if available < 2 * reserve_bytes:
        return "warn", f"{left}; from {format_bytes(reserve_bytes)} down the system runs dry"
    return "good", left


def _run_name(proc: Path, pid: int) -> str:
    """``run NAME`` for a process that advances a run, else ""."""
    try:
        words = (proc / str(pid) / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return ""
    if WORKER not in words or words.index(WORKER) + 1 >= len(words):
        return ""
    name = os.path.basename(words[words.index(WORKER) + 1].decode("utf-8", "replace"))
    return "run " + "".join(letter for letter in name if letter.isprintable())[:60] if name else ""
