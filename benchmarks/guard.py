"""The guard on this machine, with real memory: a hog beside a run, a worker that hangs in C, an hour of page cache.

    python benchmarks/guard.py hog --times 20        # trips the soft floor; checkpoint; resumed; compared bit for bit with a run that was left alone
    python benchmarks/guard.py stuck                 # a worker that never gives the interpreter back is killed at the hard floor
    python benchmarks/guard.py cache --minutes 60    # reads and writes until memory is full of page cache: no alarm

Floors are set relative to what is available when each trial begins, so that a hog of 1 to 3 GiB is enough and nobody else on the machine is hurt.
What it printed stands in benchmarks/guard.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import sparklab as sl
from sparklab.box.watchdog import Judge, read_pool
from sparklab.data.lesson import lesson
from sparklab.data.world import orders
from sparklab.planner.recipe import Recipe
from sparklab.units import GIB, MIB

HOG = "import sys, time; size = int(sys.stdin.readline()); held = bytearray(size); print('held', flush=True); time.sleep(600)"
STEPS = 40


def recipe(folder: Path, **changes: object) -> Recipe:
    """A few seconds of LoRA on the bundled model."""
    data = folder / "chats.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in orders("train", 64, 0)))
    base = lesson("lora", 0, folder / "lesson")
    settings = {"data": str(data), "held_out": 0.0, "micro_batch_tokens": 512, "max_length": 256, "max_steps": STEPS, "epochs": 1000.0,
                "answer_held_out": 0, "sample_prompts": (), "save_every": 1000}  # fmt: skip
    return base.replace(**{**settings, **changes})


def wait_for(condition: object, seconds: float = 240.0) -> float:
    """Seconds until it holds."""
    began = time.monotonic()
    while not condition():  # type: ignore[operator]
        assert time.monotonic() - began < seconds, "did not happen"
        time.sleep(0.02)
    return time.monotonic() - began


def available() -> float:
    return read_pool("/proc")["available_bytes"]


def floors(below: float) -> dict[str, float]:
    """A soft floor ``below`` GiB under what is available now, and a hard one 2 GiB lower."""
    soft = available() / GIB - below
    return {"soft_floor_gib": round(soft, 3), "hard_floor_gib": round(soft - 2, 3)}


def result(run: sl.Run) -> tuple[list[float], dict[str, bytes]]:
    """Losses and final weights."""
    return run.state.losses, {file.name: file.read_bytes() for file in (run.path / "adapter").glob("*.safetensors")}


def hog(folder: Path, times: int) -> None:
    """A hog beside a run whose soft floor is 1.5 GiB under what was available before the run began."""
    alone = sl.train(recipe(folder, guard=False), folder / "alone", panel=False).wait(600)
    losses, weights = result(alone)
    assert len(losses) == STEPS and weights
    seconds, tripped, exact, disturbed = [], 0, 0, 0
    while len(seconds) < times:
        trial = len(seconds)
        run = sl.train(recipe(folder, **floors(1.5)), folder / f"hog-{trial}-{disturbed}", panel=False)
        eater = subprocess.Popen([sys.executable, "-c", HOG], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            wait_for(lambda run=run, step=2 + trial % 3: run.state.step >= step or run.state.is_over)
            if run.state.is_over:  # somebody else on this machine took the memory first
                disturbed += 1
                print(f"    again: {run.state.reason}", flush=True)
                continue
            size = max(available() - run.recipe.soft_floor_gib * GIB + 0.5 * GIB, 0.5 * GIB)
            began = time.monotonic()
            print(int(size), file=eater.stdin, flush=True)
            eater.stdout.readline()
            held = time.monotonic() - began
            wait_for(lambda run=run: run.state.is_over)
            if run.status == "finished" and time.monotonic() - began < held + 1:  # the run was over before the hog had its memory
                disturbed += 1
                print(f"    again: the hog took {held:.1f} s, and the run was over", flush=True)
                continue
            seconds.append(time.monotonic() - began)
        finally:
            eater.kill()
            eater.wait()
        state = run.state
        saved = any(entry["step"] == state.step for entry in state.checkpoints)
        right = state.status == "stopped" and state.ended_by == "guard" and saved and state.step < STEPS
        tripped += right
        while run.status != "finished":  # what else goes on here may trip the floor again
            with contextlib.suppress(sl.errors.RunFailed):
                run.resume(panel=False).wait(600)
        same = run.status == "finished" and result(run) == (losses, weights)
        exact += same
        words = f"{state.status} by {state.ended_by or 'nobody'} at step {state.step}, checkpoint {'saved' if saved else 'MISSING'}"
        print(f"{trial + 1:2}: hog of {size / GIB:.2f} GiB, had after {held:.2f} s; {words}, {seconds[-1]:.2f} s after it began; "
              f"resumed: bits {'equal' if same else 'DIFFERENT'}", flush=True)  # fmt: skip
    print(f"soft floor tripped {tripped} of {times}, resume exact {exact} of {times}; from the hog's begin to stopped with a checkpoint: median "
          f"{statistics.median(seconds):.2f} s, longest {max(seconds):.2f} s")  # fmt: skip
    print(f"{disturbed} trials begun anew: others took the memory first, or the run was over before the hog had it")


STUCK = """
import ctypes, os, sys
from pathlib import Path
from sparklab.run import guard
with guard.watching(Path(sys.argv[1]), guard.Floors(float(sys.argv[2]), float(sys.argv[3])), group=True):
    lock, library = ctypes.create_string_buffer(64), ctypes.PyDLL(None)  # PyDLL keeps the GIL
    library.pthread_mutex_lock(lock)
    print("stuck", flush=True)
    library.pthread_mutex_lock(lock)  # never returns: no other thread, no signal handler of Python's runs again
"""


def stuck(folder: Path, times: int) -> None:
    """A process that holds the GIL in a C call, and a hog that goes through the hard floor."""
    seconds, killed = [], 0
    for trial in range(times):
        run = folder / f"stuck-{trial}"
        (run / "commands").mkdir(parents=True)
        have = available()
        worker = subprocess.Popen([sys.executable, "-c", STUCK, str(run), str(have - 0.3 * GIB), str(have - 0.6 * GIB)], stdout=subprocess.PIPE,
                                  start_new_session=True)  # fmt: skip
        worker.stdout.readline()
        time.sleep(0.5)
        eater = subprocess.Popen([sys.executable, "-c", HOG], stdin=subprocess.PIPE, text=True)
        try:
            print(int(1.0 * GIB), file=eater.stdin, flush=True)
            seconds.append(wait_for(lambda worker=worker: worker.poll() is not None, 30))
        finally:
            eater.kill()
            eater.wait()
        left = json.loads((run / "guard.json").read_text())
        killed += worker.returncode == -9 and left["level"] == "hard"
        print(f"{trial + 1:2}: exit status {worker.returncode}, {seconds[-1]:.2f} s after the hog was started: {left['reason']}", flush=True)
    print(f"killed at the hard floor {killed} of {times}, longest {max(seconds):.2f} s")


def cache(folder: Path, minutes: float) -> None:
    """A run under guard while files of 1.5 GiB are written and read until memory is full of page cache."""
    soft, hard = 4.0, 2.0
    run = sl.train(recipe(folder, max_steps=10**6, epochs=1e6, soft_floor_gib=soft, hard_floor_gib=hard), folder / "cache", panel=False)
    wait_for(lambda: run.state.step >= 3)
    run.pause()
    by_free = Judge(soft * GIB, hard * GIB)
    lowest = {"free_bytes": float("inf"), "available_bytes": float("inf")}
    highest = {"pressure_some_percent": 0.0, "pressure_full_percent": 0.0}
    would_trip, looks, moved, end = 0, 0, 0.0, time.monotonic() + 60 * minutes
    woken = time.monotonic()
    for block in traffic(folder, files=12, size=int(1.5 * GIB)):
        moved += block
        pool = read_pool("/proc")
        looks += 1
        would_trip += by_free.look(time.monotonic(), {**pool, "available_bytes": pool["free_bytes"]}) != ""
        lowest = {name: min(value, pool[name]) for name, value in lowest.items()}
        highest = {name: max(value, pool[name]) for name, value in highest.items()}
        if time.monotonic() > woken + 120:  # a few updates every other minute: the run is alive and stays small
            woken = time.monotonic()
            step = run.state.step
            run.resume()
            wait_for(lambda step=step: run.state.step > step or run.state.is_over)
            run.pause()
        if time.monotonic() > end or run.state.is_over:
            break
    alarms = [message for message in run.state.messages if "guard" in message["text"]]
    status, step, lasted = run.status, run.state.step, minutes - (end - time.monotonic()) / 60
    run.stop()
    run.wait(120)
    print(f"{lasted:.1f} minutes, {moved / GIB:.0f} GiB read and written, run {status} at step {step}; soft floor {soft} GiB, hard {hard} GiB: "
          f"{len(alarms)} alarms {alarms or ''}")  # fmt: skip
    print(f"lowest MemAvailable {lowest['available_bytes'] / GIB:.2f} GiB, lowest MemFree {lowest['free_bytes'] / GIB:.2f} GiB; highest PSI some avg10 "
          f"{highest['pressure_some_percent']} %, full {highest['pressure_full_percent']} %; the same floors on MemFree would have been tripped in "
          f"{would_trip} of {looks} looks")  # fmt: skip


def traffic(folder: Path, files: int, size: int) -> object:
    """Writes the files one after the other, then reads and writes them in turn, for ever; yields twice a second the bytes moved (32 MiB/s)."""
    block = os.urandom(int(16 * MIB))
    turn = 0
    while True:
        path = folder / f"file-{turn % files}"
        if turn < files or turn % 3 == 0:
            with open(path, "wb") as file:
                for _ in range(size // len(block)):
                    file.write(block)
                    yield len(block)
                    time.sleep(0.5)
        else:
            with open(path, "rb", buffering=0) as file:
                while file.read(len(block)):
                    yield len(block)
                    time.sleep(0.5)
        turn += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("hog", "stuck", "cache"))
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=60.0)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="guard-"))
    try:
        if options.what == "cache":
            cache(folder, options.minutes)
        else:
            {"hog": hog, "stuck": stuck}[options.what](folder, options.times)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
