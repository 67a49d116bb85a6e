"""The meter beside a run: what is cheap is read when asked, in well under a millisecond; what is dear comes from a thread every few seconds.

Cheap: /proc and torch's own allocator, where torch is loaded already. Dear: nvidia-smi (power, temperature, what each process holds) and the
walk over all processes. The driver's totals of a unified chip say "Not Supported", and those of CUDA count page cache as used: there they are
``NA``, and the pool's truth is :class:`sparklab.box.meter.MemorySnapshot`.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from sparklab.box.detect import Runner, run_command
from sparklab.box.meter import MemorySnapshot, read_usable
from sparklab.box.others import device_sizes
from sparklab.box.watchdog import named_largest, process_sizes, read_swapped
from sparklab.units import MIB, NA, is_na, jsonable

QUERY: Final = ("nvidia-smi", "--query-gpu=power.draw,temperature.gpu,memory.total,memory.used", "--format=csv,noheader,nounits")
EVERY_SECONDS: Final = 5.0  # between two dear looks
LEAST_SECONDS: Final = 0.1  # between two readings that a rate is made of


@dataclass(frozen=True, kw_only=True)
class DeviceReading:
    """What the NVIDIA driver tells of all devices together; ``NA`` where it does not."""

    watts: float = NA
    celsius: float = NA
    """Of the hottest."""
    total_bytes: float = NA
    """Memory of their own; ``NA`` on a unified chip, which has none."""
    used_bytes: float = NA
    held: Mapping[int, float] = field(default_factory=dict)
    """Bytes by process id."""


@dataclass(frozen=True, kw_only=True)
class Look:
    """One look at memory and devices. Sizes in bytes, rates in bytes a second; ``NA`` where nobody tells."""

    memory: MemorySnapshot
    swap_in_rate: float = NA
    swap_out_rate: float = NA
    allocated_bytes: float = NA
    """Tensors that CUDA's allocator handed out in this process."""
    reserved_bytes: float = NA
    """What it holds for them."""
    device: DeviceReading = field(default_factory=DeviceReading)
    device_bytes: float = NA
    """What this process holds on the devices: what the driver told last, with what the allocator has taken or given back since; without its word the
    allocator's own figure."""
    process_bytes: float = NA
    """What this process holds of the pool that ``memory`` is about: resident memory; on a unified box its own, and what it holds on the device."""
    held_bytes: float = NA
    """What a plan speaks of: device memory where a device has its own, else the same."""
    held_peak_bytes: float = NA
    """The most of that so far, as far as it can be told now: the largest of all looks is the run's."""
    others: Mapping[str, float] = field(default_factory=dict)
    """The largest other processes by name, from 0.5 GiB on, what they hold on a device included where it is one pool."""
    age_seconds: float = NA
    """How old the dear part is; ``NA`` before the first."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON; unknown is None."""
        values: dict[str, Any] = jsonable({**asdict(self), "memory": self.memory.to_dict()})
        return values


def read_devices(run: Runner = run_command) -> DeviceReading:
    """Asks nvidia-smi, which takes tens of milliseconds. Never raises."""
    rows = [[_number(word) for word in line.split(",")] for line in run(QUERY).splitlines() if line.count(",") == 3]
    if not rows:
        return DeviceReading()
    watts, celsius, total, used = zip(*rows, strict=True)
    return DeviceReading(watts=sum(watts), celsius=max(celsius), total_bytes=sum(total) * MIB, used_bytes=sum(used) * MIB, held=device_sizes(run))


def _number(word: str) -> float:
    """A figure of nvidia-smi's; "[N/A]", "[Not Supported]" and the like are NA."""
    try:
        return float(word)
    except ValueError:
        return NA


class LiveMeter:
    """``with LiveMeter(unified) as meter: ... meter.look()``. ``unified``: what a process holds on a device lies in the same pool.

    ``on_gpu``: this process computes on one, or will: what a plan speaks of is there, also while it holds nothing there yet.
    """

    def __init__(self, unified: bool, proc: Path = Path("/proc"), run: Runner = run_command, on_gpu: bool = False) -> None:
        self._unified, self._proc, self._run, self._on_gpu = unified, proc, run, on_gpu
        self._dear: tuple[float, DeviceReading, dict[str, float], float] | None = None
        self._swapped = (time.monotonic(), *read_swapped(proc / "vmstat"))
        self._rates = (NA, NA)
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> LiveMeter:
        self._done.clear()
        self._thread = threading.Thread(target=self._walk, name="meter", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join(EVERY_SECONDS)

    def look(self) -> Look:
        """What is so now, and the dear part as it was at its last look. Never raises."""
        allocated, reserved, most = allocator_bytes()
        age, device, others, before = NA, DeviceReading(), dict[str, float](), NA
        if self._dear is not None:
            then, device, others, before = self._dear
            age = time.monotonic() - then
        on_device = device.held.get(os.getpid(), NA)
        if not is_na(reserved):
            on_device = reserved if is_na(on_device) else on_device + reserved - (0.0 if is_na(before) else before)
        swap_in, swap_out = self._swap_rates()
        memory = read_usable(self._proc, unified=self._unified)
        there = 0.0 if self._on_gpu and is_na(on_device) else on_device
        mine = memory.own_bytes + there if self._unified and not is_na(there) else memory.rss_bytes
        held = mine if self._unified or is_na(there) else there
        return Look(memory=memory, swap_in_rate=swap_in, swap_out_rate=swap_out, allocated_bytes=allocated, reserved_bytes=reserved,
                    device=device, device_bytes=on_device, process_bytes=mine, held_bytes=held,
                    held_peak_bytes=memory.rss_peak_bytes if is_na(there) else held if is_na(reserved) else held + most - reserved,
                    others=others, age_seconds=age)  # fmt: skip

    def look_dearly(self) -> None:
        """The dear part, now, in the thread that calls."""
        device, reserved = read_devices(self._run), allocator_bytes()[1]
        sizes = process_sizes(self._proc)
        if self._unified:
            for pid, size in device.held.items():
                sizes[pid] = sizes.get(pid, 0.0) + size
        self._dear = (time.monotonic(), device, named_largest(self._proc, sizes, (os.getpid(),)), reserved)

    def _walk(self) -> None:
        while True:
            self.look_dearly()
            if self._done.wait(EVERY_SECONDS):
                return

    def _swap_rates(self) -> tuple[float, float]:
        now = (time.monotonic(), *read_swapped(self._proc / "vmstat"))
        seconds = now[0] - self._swapped[0]
        if seconds >= LEAST_SECONDS:
            self._rates = ((now[1] - self._swapped[1]) / seconds, (now[2] - self._swapped[2]) / seconds)
            self._swapped = now
        return self._rates


def allocator_bytes() -> tuple[float, float, float]:
    """(allocated, reserved, most ever reserved) by CUDA's allocator in this process; NA where torch is not loaded or has no CUDA at work. Loads nothing."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "cuda") or not torch.cuda.is_initialized():
        return NA, NA, NA
    return float(torch.cuda.memory_allocated()), float(torch.cuda.memory_reserved()), float(torch.cuda.max_memory_reserved())
