"""What the box draws while something runs, where it tells: the GPU through nvidia-smi, an Intel or AMD processor through its energy counter."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Final

from sparklab.box.detect import Runner, run_command
from sparklab.units import NA

QUERY: Final = ("nvidia-smi", "--query-gpu=power.draw", "--format=csv,noheader,nounits")
ENERGY: Final = Path("sys/class/powercap/intel-rapl:0")  # the first package; readable by root alone on most systems
EVERY_SECONDS: Final = 0.5


class PowerMeter:
    """``with PowerMeter(is_gpu) as meter: ...`` and then ``meter.watts``: the mean draw inside, ``NA`` where the box does not tell.

    All GPUs together where one computes, else the processor package. What the rest of the box draws is in neither.
    """

    def __init__(self, is_gpu: bool, root: Path = Path("/"), run: Runner = run_command) -> None:
        self.watts = NA
        self._is_gpu, self._folder, self._run = is_gpu, root / ENERGY, run
        self._samples: list[float] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> PowerMeter:
        self._began, self._energy = time.perf_counter(), self._joules("energy_uj")
        if self._is_gpu:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._done.set()
        if self._is_gpu:
            self._thread.join()
            self.watts = sum(self._samples) / len(self._samples) if self._samples else NA
            return
        used = self._joules("energy_uj") - self._energy
        if used < 0:  # the counter started anew
            used += self._joules("max_energy_range_uj")
        self.watts = used / (time.perf_counter() - self._began)

    def _joules(self, name: str) -> float:
        try:
            return float((self._folder / name).read_text()) / 1e6
        except (OSError, ValueError):
            return NA

    def _sample(self) -> None:
        while True:
            words = self._run(QUERY).split()
            try:
                self._samples.append(sum(map(float, words)) if words else NA)
            except ValueError:  # "[N/A]": this GPU does not tell
                self._samples.append(NA)
            if self._done.wait(EVERY_SECONDS):
                return
