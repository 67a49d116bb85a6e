"""What a look of the meter costs: the cheap part that is taken during training, the dear one that a thread takes, and the watchdog's.

    python benchmarks/meter.py

What it printed stands in benchmarks/guard.md.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

from sparklab.box.live import LiveMeter, read_devices
from sparklab.box.watchdog import process_sizes, read_pool


def milliseconds(work: Callable[[], object], times: int) -> str:
    """Median and the 99th percentile."""
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        taken.append(1e3 * (time.perf_counter() - began))
    taken.sort()
    return f"{statistics.median(taken):.3f} | {taken[int(0.99 * (len(taken) - 1))]:.3f}"


def main() -> None:
    meter = LiveMeter(unified=False)
    count = len([name for name in os.listdir("/proc") if name.isdigit()])
    print("| what | median ms | 99th percentile ms |\n|---|---|---|")
    print(f"| a look (cheap part) | {milliseconds(meter.look, 2000)} |")
    print(f"| the watchdog's look | {milliseconds(lambda: read_pool('/proc'), 2000)} |")
    print(f"| all {count} processes | {milliseconds(lambda: process_sizes('/proc'), 50)} |")
    print(f"| nvidia-smi, twice (here: none) | {milliseconds(read_devices, 20)} |")


if __name__ == "__main__":
    main()
