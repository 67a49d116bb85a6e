"""A day in miniature: 100,000 updates told by the real reporter into a real run directory, and how long it then takes to open.

    python benchmarks/long_run.py [--steps 100000] [--write benchmarks/long_run.md]

No model computes here: a loop that does nothing but call the worker's own Reporter (the callback between the Trainer and the run directory) as the
Trainer calls it, with a memory reading a second, an evaluation at every hundredth and a checkpoint event at every thousandth update. What is
watched is what a long run must not let grow: bytes of the diary per update, memory of the worker, time of one update's telling, time of a panel's
look at what is new; and, at the end, how long a fresh look at the whole run takes.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import TrainerControl, TrainerState

import sparklab as sl
from sparklab.box.live import LiveMeter
from sparklab.box.meter import read_memory
from sparklab.run.directory import RunDirectory
from sparklab.run.events import EventWriter
from sparklab.run.reporter import Reporter
from sparklab.units import MIB


def directory(folder: Path) -> RunDirectory:
    """A run directory with a recipe and nothing else."""
    return RunDirectory.create(folder / "run", sl.Recipe(model="tiny", data="none.jsonl"), {"peak_gib": 1.0}, {})


def tell(run: RunDirectory, steps: int, parts: int = 10) -> list[dict[str, float]]:
    """Tells ``steps`` updates; after each of so many parts: bytes of the diary an update, memory, seconds an update, seconds of a look."""
    trainer = SimpleNamespace(update_tokens=0, update_wait_seconds=0.0, eval_dataset=(), carry=None, where="", row_tokens=2048)
    arguments: Any = None
    state, control = TrainerState(max_steps=steps), TrainerControl()
    follower = run.follow()
    found, size = [], 0
    with EventWriter(run.events_path) as events:
        events.write("started", pid=os.getpid(), host="", device="cpu", dtype="fp32", method="lora", resumed_from=None, nth=0)
        reporter = Reporter(run, events, lambda _: None, LiveMeter(unified=False))
        reporter.begin(trainer, 0)
        trainer.state = state
        reporter.on_train_begin(arguments, state, control)
        for part in range(parts):
            began = time.perf_counter()
            for step in range(part * steps // parts + 1, (part + 1) * steps // parts + 1):
                state.global_step, state.epoch = step, step / steps
                trainer.update_tokens, trainer.update_wait_seconds = 2011 + step % 37, 1e-5
                reporter.on_step_end(arguments, state, control)
                reporter.on_log(arguments, state, control, {"loss": 2.3 / (1 + step / 9000) + step % 7 / 100, "learning_rate": 2e-4, "grad_norm": 0.731})
                if step % 100 == 0:
                    reporter.on_evaluate(arguments, state, control, {"eval_loss": 2.2 / (1 + step / 9000), "eval_tokens": 4096})
                if step % 1000 == 0:
                    events.write("checkpoint", step=step, path=f"checkpoints/step-{step:06d}", bytes=10**6, held_out_loss=None)
            telling = (time.perf_counter() - began) / (steps / parts)
            follower.refresh()
            began = time.perf_counter()
            follower.refresh()
            look = time.perf_counter() - began
            gc.collect()
            now = run.events_path.stat().st_size
            found.append({"step": state.global_step, "bytes": (now - size) / (steps / parts), "rss": read_memory().rss_bytes, "telling": telling, "look": look})
            size = now
        events.write("finished", step=steps, seconds=1.0, tokens=steps * 2029, tokens_per_second=1.0, peak_bytes=10**9)
    return found


def opening(run: RunDirectory) -> tuple[float, float]:
    """Seconds until a fresh look at the run is there: of this process's time, and of the clock's."""
    used, began = time.process_time(), time.perf_counter()
    state = RunDirectory(run.path).state
    seconds = time.process_time() - used, time.perf_counter() - began
    assert state.status == "finished" and len(state.losses) == state.steps == state.step
    return seconds


def panel(run: RunDirectory) -> tuple[float, float]:
    """As :func:`opening`, until the static panel of the run is there: opened, added up and drawn."""
    from sparklab.panels.run_panel import LivePanel  # noqa: PLC0415 - loaded before the clock starts

    used, began = time.process_time(), time.perf_counter()
    made = LivePanel(RunDirectory(run.path))
    made.refresh()
    made._twin()
    return time.process_time() - used, time.perf_counter() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--write", type=Path, help="a Markdown file for the figures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sparklab-long-") as folder:
        run = directory(Path(folder))
        parts = tell(run, options.steps)
        megabytes = run.events_path.stat().st_size / MIB
        opened = sorted(opening(run) for _ in range(5))
        drawn = sorted(panel(run) for _ in range(3))
    cpu = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    machine = f"{cpu[0] if cpu else platform.machine()}, torch {torch.__version__}, Python {platform.python_version()}"
    lines = [
        "# A long run in miniature", "",
        f"`python benchmarks/long_run.py --steps {options.steps}`; {machine}. The worker's reporter and diary are the real ones; no model computes.", "",
        f"**{megabytes:.1f} MiB of events. Opened and added up in {opened[2][0]:.2f} s of processor time (median of 5; {opened[0][0]:.2f} to "
        f"{opened[-1][0]:.2f}); its panel drawn from nothing in {drawn[1][0]:.2f} s (median of 3).**",
        f"By the clock {opened[2][1]:.2f} and {drawn[1][1]:.2f} s, beside {os.getloadavg()[0]:.0f} other busy processes on {os.cpu_count()} cores.", "",
        "| after update | bytes an update | process, MiB | telling an update, µs | looking with nothing new, µs |", "|---|---|---|---|---|",
        *(
            f"| {part['step']:,.0f} | {part['bytes']:.1f} | {part['rss'] / MIB:.0f} | {part['telling'] * 1e6:.0f} | {part['look'] * 1e6:.0f} |"
            for part in parts
        ), "",
        "The process also follows its own run here, as a panel would, so its memory holds the series that a panel draws.",
    ]  # fmt: skip
    text = "\n".join(lines) + "\n"
    print(text)
    if options.write:
        options.write.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
