"""The guard on this machine, with real memory: a hog beside a run, a worker that hangs in C, an hour of page cache.

    python benchmarks/guard.py hog --times 20        # trips the soft floor; checkpoint; resumed; compared bit for bit with a run that was left alone
    python benchmarks/guard.py stuck                 # a worker that never gives the interpreter back is killed at the hard floor
    python benchmarks/guard.py cache --minutes 60    # reads and writes until memory is full of page cache: no alarm

Floors are set relative to what is available when each trial begins, so that a hog of 1 to 3 GiB is enough and nobody else on the machine is hurt.
A trial in which somebody else took or gave back so much that it was not the hog who tripped the floor is said, counted, and made again. A run that
differs stays where it is, and what differs is said. What it printed stands in benchmarks/guard.md.
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
from sparklab.box import watchdog
from sparklab.box.watchdog import Judge, read_pool, read_sizes
from sparklab.data.lesson import lesson
from sparklab.data.world import orders
from sparklab.planner.recipe import Recipe
from sparklab.run.events import EventReader
from sparklab.units import GIB, MIB

HOG = "import sys, time; size = int(sys.stdin.readline()); held = bytearray(size); print('held', flush=True); time.sleep(600)"
GREEDY = """
import sys, time
sys.path.insert(0, sys.argv[3])
from watchdog import read_pool
wanted, most, held = float(sys.argv[1]), float(sys.argv[2]), []
while True:  # what others give back is taken too
    if read_pool("/proc")["available_bytes"] > wanted and 2**26 * len(held) < most:
        held.append(bytearray(b"x" * 2**26))
    else:
        time.sleep(0.02)
"""
ROOM, BELOW, MOST = 2.0, 0.3, 12.0  # GiB: from what is available to the floor, from the floor to where the hog stops, the largest hog
STEPS = 120


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


def result(run: sl.Run) -> tuple[list[float], dict[str, bytes]]:
    """Losses and final weights."""
    return list(run.state.losses), {file.name: file.read_bytes() for file in (run.path / "adapter").glob("*.safetensors")}


def hog(folder: Path, times: int) -> None:
    """A hog beside a run whose soft floor is 2 GiB under what was available before the run began; until ``times`` trials were the hog's alone."""
    alone = sl.train(recipe(folder, guard=False), folder / "alone", panel=False).wait(600)
    whole = result(alone)
    assert len(whole[0]) == STEPS and whole[1]
    seconds: list[float] = []
    tripped = exact = again = resumed = 0
    while len(seconds) < times and again < 3 * times:
        trial = len(seconds)
        run = sl.train(recipe(folder, soft_floor_gib=round(available() / GIB - ROOM, 3)), folder / f"hog-{trial}-{again}", panel=False)
        took, other = eat(run, 2 + trial % 3)
        if other:
            again += 1
            print(f"    again: {other}", flush=True)
            run.wait(600) if run.directory.is_alive else None
            continue
        state = run.state
        seconds.append(took)
        saved = any(entry["step"] == state.step for entry in state.checkpoints)
        tripped += state.status == "stopped" and state.ended_by == "guard" and saved and state.step < STEPS
        words = f"{state.status} by {state.ended_by or 'nobody'} at step {state.step}, checkpoint {'saved' if saved else 'MISSING'}"
        resumes = resume(run)
        resumed += resumes
        difference = differs(run, whole)
        exact += not difference
        if difference:
            shutil.copytree(run.path, Path(tempfile.mkdtemp(prefix="guard-kept-")) / "run")
        print(f"{trial + 1:2}: {words}, {took:.2f} s after the hog began; resumed{f' {resumes} times' if resumes > 1 else ''}: "
              f"{difference or 'bits equal'}", flush=True)  # fmt: skip
    print(f"soft floor tripped {tripped} of {len(seconds)}, resume exact {exact} of {len(seconds)}; from the hog's begin to stopped with a checkpoint: median "
          f"{statistics.median(seconds):.2f} s, longest {max(seconds):.2f} s; {resumed} resumes")  # fmt: skip
    print(f"{again} trials begun anew")


def eat(run: sl.Run, step: int) -> tuple[float, str]:
    """Starts the hog at ``step``; (seconds until the run is over, "") or, where it was not the hog that ended it, what it was."""
    wait_for(lambda: run.state.step >= step or run.state.is_over)
    if run.state.is_over:
        return 0.0, f"others took the memory before the hog began: {run.state.reason}"
    floor = run.recipe.soft_floor_gib * GIB
    began = time.monotonic()
    greedy = [sys.executable, "-I", "-S", "-c", GREEDY, str(floor - BELOW * GIB), str(MOST * GIB), str(Path(watchdog.__file__).parent)]
    with subprocess.Popen(greedy) as eater:
        try:
            wait_for(lambda: run.state.is_over)
            took = time.monotonic() - began
            size = read_sizes(f"/proc/{eater.pid}/status").get("RssAnon", 0.0)
        finally:
            eater.kill()
    if run.status == "finished":
        return took, f"the run was over after {took:.1f} s, before the hog had its memory ({size / GIB:.2f} GiB)"
    seen = [event["numbers"]["available_bytes"] for event in EventReader(run.path / "events.jsonl").read_new() if event.get("kind") == "guard"]
    if seen and seen[-1] + size < floor:
        return took, f"others took the memory: {seen[-1] / GIB:.2f} GiB were left under a floor of {floor / GIB:.2f}, and the hog had {size / GIB:.2f}"
    return took, ""


def resume(run: sl.Run) -> int:
    """Resumes until the run is finished, as what else goes on here may trip the floor again; how often."""
    for count in range(1, 21):
        with contextlib.suppress(sl.errors.RunFailed):
            run.resume(panel=False).wait(600)
        if run.status == "finished":
            return count
    return count


def differs(run: sl.Run, whole: tuple[list[float], dict[str, bytes]]) -> str:
    """In words, where the run is not to the bit what the uninterrupted one was; "" where it is."""
    losses, weights = result(run)
    if run.status != "finished":
        return f"NOT OVER: {run.status} at step {run.state.step}, {run.state.reason}"
    first = next((step for step, (one, other) in enumerate(zip(losses, whole[0], strict=False), 1) if one != other), None)
    if first or len(losses) != len(whole[0]):
        return f"DIFFERENT: {len(losses)} losses of {len(whole[0])}, the first that differs at step {first}"
    return "" if weights == whole[1] else "DIFFERENT: losses equal, final weights not"


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
