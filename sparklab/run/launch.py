"""Starting the worker: in another process, detached, or in this one."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from sparklab.data.read import open_source
from sparklab.errors import DiskFull, RunError, RunFailed
from sparklab.model.source import check_trainable
from sparklab.planner.recipe import Recipe
from sparklab.run.directory import RunDirectory
from sparklab.run.state import RunState
from sparklab.run.worker import advance
from sparklab.units import format_bytes

PACKAGES = ("sparklab", "torch", "transformers", "peft", "datasets", "accelerate", "bitsandbytes")


class _Detached(subprocess.Popen[bytes]):
    """A process that outlives its starter on purpose, so Python need not warn that it still runs."""

    def __del__(self) -> None:
        pass


_workers: list[_Detached] = []  # kept so that ended ones are reaped, not left as zombies


def start(directory: RunDirectory) -> None:
    """Starts a worker in a process and session of its own; it outlives this one. Raises RunBusy where one is at work.

    The lock is taken here and handed over open, so no moment passes in which nobody holds the run.
    """
    _workers[:] = [worker for worker in _workers if worker.poll() is None]
    descriptor = directory.lock()
    try:
        with open(directory.log_path, "ab") as log:
            _workers.append(
                _Detached(
                    [sys.executable, "-m", "sparklab.run.worker", str(directory.path.resolve()), "--lock-fd", str(descriptor)],
                    stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, pass_fds=(descriptor,), env=worker_environment(directory.recipe),
                )
            )  # fmt: skip
    finally:
        os.close(descriptor)


def run_inline(directory: RunDirectory) -> None:
    """The same worker code in this process: for teaching and debugging. Raises what the worker raises."""
    descriptor = directory.lock()
    try:
        advance(directory)
    finally:
        os.close(descriptor)


def wait(directory: RunDirectory, timeout_seconds: float | None = None, every_seconds: float = 0.2) -> RunState:
    """Blocks until the run is over. Raises TimeoutError, and RunFailed where the run failed or its worker vanished."""
    follower = directory.follow()
    deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
    while not (state := follower.refresh()).is_over:
        if deadline is not None and time.monotonic() > deadline:
            raise TimeoutError(f"{directory.path} is still {state.status} at step {state.step} of {state.steps} after {timeout_seconds} s")
        time.sleep(every_seconds)
    raise_failure(directory, state)
    return state


def raise_failure(directory: RunDirectory, state: RunState) -> None:
    """One clear RunFailed for a failed or lost run, with the tail of the worker's log where the diary says too little."""
    if state.status not in ("failed", "lost"):
        return
    tail = directory.log_tail(10) if state.status == "lost" else ""
    raise RunFailed(state.reason + (f"\n  worker.log ends:\n{tail}" if tail else ""), state.fix)


def worker_environment(recipe: Recipe) -> dict[str, str]:
    """The environment of a run's worker: without the network where the model lies on disk."""
    return child_environment(offline=Path(check_trainable(recipe.model)).is_dir())


def child_environment(offline: bool) -> dict[str, str]:
    """This process's environment, less the network where it is not needed, and less one core for whoever looks on.

    torch's threads wait for each other by spinning: where another process takes one of their cores (a browser that draws the panel), every
    step waits for the scheduler. benchmarks/LOG.md has the figures.
    """
    environment = dict(os.environ, TOKENIZERS_PARALLELISM="true", PYTHONUNBUFFERED="1")
    environment.setdefault("OMP_NUM_THREADS", str(max(1, _cores() - 1)))
    if offline:
        environment.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    return environment


def _cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe(recipe: Recipe) -> dict[str, Any]:
    """What the result also depends on: versions, machine, and the data's content."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "versions": versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "data": _content(recipe),
        "recipe_fingerprint": recipe.fingerprint,
    }


def _content(recipe: Recipe) -> dict[str, Any]:
    """What the data is: a file's hash, or that of all that a directory or a hub data set holds."""
    path = Path(recipe.data)
    if not path.is_file():
        return {"path": recipe.data, "fingerprint": open_source(recipe.data, recipe.format).fingerprint}
    with path.open("rb") as file:
        return {"path": str(path.resolve()), "bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def check_disk(path: Path, needed_bytes: float) -> None:
    """Raises :class:`DiskFull` where the file system of ``path`` cannot take what the run will write."""
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise DiskFull(
            f"the run will write up to {format_bytes(needed_bytes)} (checkpoints and result); {format_bytes(free)} are free on the disk of {path}",
            "free some space, choose another disk, or keep fewer checkpoints (keep_checkpoints)",
        )


def check_writable(path: Path) -> None:
    """Raises :class:`RunError` where a run directory cannot be made at ``path``."""
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if existing.is_dir() and not os.access(existing, os.W_OK):
        raise RunError(f"{existing} is not writable", "choose another directory for the run")
