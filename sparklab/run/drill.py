"""A rehearsal of the guard's trip, end to end and harmless: a tiny run, made to believe that memory runs out.

The run is a real one, with its worker and its watchdog; only what the watchdog reads is a file of ours in the place of /proc/meminfo.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from sparklab.box.doctor import Finding
from sparklab.data.lesson import lesson
from sparklab.errors import RunError
from sparklab.planner.recipe import Recipe
from sparklab.run import guard, inputs, launch
from sparklab.run.directory import RunDirectory
from sparklab.run.state import RunState

SECONDS: Final = 120.0  # for any one step of the drill
SOFT, HARD = 8.0, 4.0  # GiB, of a box of 128
PLENTY, LOW, LOWEST = 100.0, 7.0, 3.0
KIB_PER_GIB: Final = 2**20


def drill() -> list[Finding]:
    """Trips the soft floor, then the hard one, of a tiny run in a temporary directory; takes under a minute. Two findings: what happened, in figures."""
    with tempfile.TemporaryDirectory(prefix="sparklab-drill-") as folder, pretended(Path(folder) / "proc") as available:
        recipe = _recipe(Path(folder))
        run = RunDirectory.create(Path(folder) / "run", recipe, {}, inputs.describe(recipe))
        try:
            return [_soft(run, available), _hard(run, available)]
        finally:
            _end(run)


def _recipe(folder: Path) -> Recipe:
    """Long enough that it is still at work whenever it is asked."""
    return lesson("lora", 0, folder / "lesson").replace(
        micro_batch_tokens=256, max_length=256, max_steps=100_000, epochs=1e6, held_out=0.0, answer_held_out=0, sample_prompts=(), save_every=100_000,
        soft_floor_gib=SOFT, hard_floor_gib=HARD,
    )  # fmt: skip


@contextmanager
def pretended(proc: Path) -> Iterator[Callable[[float], None]]:
    """Lets guards that start in the block read ``proc`` in the place of /proc; call what comes out with the GiB that are to be available."""
    proc.mkdir(parents=True)

    def available(size: float) -> None:
        draft = proc / "meminfo.new"
        draft.write_text(f"MemTotal: {128 * KIB_PER_GIB} kB\nMemAvailable: {int(size * KIB_PER_GIB)} kB\n", encoding="ascii")
        os.replace(draft, proc / "meminfo")

    available(PLENTY)
    before = os.environ.get(guard.PROC)
    os.environ[guard.PROC] = str(proc)
    try:
        yield available
    finally:
        if before is None:
            del os.environ[guard.PROC]
        else:
            os.environ[guard.PROC] = before


def _soft(run: RunDirectory, available: Callable[[float], None]) -> Finding:
    launch.start(run)
    _until(run, lambda state: state.step >= 2)
    began = time.monotonic()
    available(LOW)
    state = _until(run, lambda state: state.is_over)
    seconds = time.monotonic() - began
    saved = [entry for entry in state.checkpoints if entry["step"] == state.step]
    right = state.status == "stopped" and state.ended_by == "guard" and saved
    fact = (
        f"{seconds:.1f} s after memory fell below the soft floor the run was {state.status}, {'with' if saved else 'without'} a checkpoint of step {state.step}"
    )
    return Finding("drill, soft floor", "ok" if right else "fault", fact, "" if right else _report(state))


def _hard(run: RunDirectory, available: Callable[[float], None]) -> Finding:
    available(PLENTY)
    step = run.state.step
    launch.start(run)
    _until(run, lambda state: state.step > step and not state.is_over)
    began = time.monotonic()
    available(LOWEST)
    state = _until(run, lambda state: state.is_over)
    seconds = time.monotonic() - began
    left = guard.left_behind(run.path)
    right = state.status == "lost" and state.ended_by == "guard" and left is not None
    told = "left" if left else "lost"
    fact = f"{seconds:.1f} s after memory fell below the hard floor the worker was gone and its reason {told}; it had gone on from step {step}"
    return Finding("drill, hard floor", "ok" if right else "fault", fact, "" if right else _report(state))


def _report(state: RunState) -> str:
    return f"report it with this line: {state.status}, {state.reason!r}"


def _until(run: RunDirectory, condition: Callable[[RunState], bool]) -> RunState:
    follower = run.follow()
    deadline = time.monotonic() + SECONDS
    while not condition(state := follower.refresh()):
        if state.status == "failed" or time.monotonic() > deadline:
            raise RunError(f"the drill's run is {state.status} at step {state.step}: {state.reason or run.log_tail(3)}", "mend what it says, then drill again")
        time.sleep(0.05)
    return state


def _end(run: RunDirectory) -> None:
    """Nothing of the drill may outlive it."""
    deadline = time.monotonic() + SECONDS
    if run.is_alive:
        run.send("stop")
    while run.is_alive and time.monotonic() < deadline:
        time.sleep(0.05)
