"""Starting the worker: in another process, detached, or in this one."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from sparklab.errors import DiskFull, RunError, RunFailed
from sparklab.files import reason
from sparklab.model.source import check_trainable
from sparklab.planner.recipe import Recipe
from sparklab.run import inputs, lock
from sparklab.run.directory import RunDirectory
from sparklab.run.state import RunState
from sparklab.run.worker import advance
from sparklab.text import one_line
from sparklab.units import format_bytes


class _Detached(subprocess.Popen[bytes]):
    """A process that outlives its starter on purpose, so Python need not warn that it still runs."""

    def __del__(self) -> None:
        pass


@dataclass(frozen=True)
class _Started:
    """A worker that this process started: kept so that an ended one is reaped, not left as a zombie, and its exit status is known."""

    process: _Detached
    events_bytes: int
    """How long the diary was before."""


_workers: dict[Path, _Started] = {}


def start(directory: RunDirectory, accept: Collection[str] | None = ()) -> None:
    """Starts a worker in a process and session of its own; it outlives this one. Raises RunBusy where one is at work, and RunChanged.

    ``accept``: what may have changed since the start (:data:`inputs.NAMES`); None for a run made this moment, whose inputs need no second look.

    The lock is taken here and handed over open, so no moment passes in which nobody holds the run.
    """
    for path in [path for path, worker in _workers.items() if worker.process.poll() is not None]:
        del _workers[path]
    descriptor = directory.lock()
    try:
        path = directory.path.resolve()
        if accept is not None:
            inputs.check(directory, accept)
        command = [sys.executable, "-m", "sparklab.run.worker", str(path), "--lock-fd", str(descriptor), "--checked"]
        with directory.open_log() as log:
            process = _Detached(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, pass_fds=(descriptor,),
                env=worker_environment(directory.recipe),
            )  # fmt: skip
        _workers[path] = _Started(process, directory.events_path.stat().st_size)
    except BaseException:
        lock.release(descriptor)
        raise
    os.close(descriptor)  # the worker holds it open


def run_inline(directory: RunDirectory, accept: Collection[str] | None = ()) -> None:
    """The same worker code in this process: for teaching and debugging. Raises what the worker raises; ``accept`` as in :func:`start`."""
    descriptor = directory.lock()
    try:
        if accept is not None:
            inputs.check(directory, accept)
        with lock.beating(descriptor):
            advance(directory)
    finally:
        lock.release(descriptor)


def wait(directory: RunDirectory, timeout_seconds: float | None = None, every_seconds: float = 0.2, on_look: Callable[[], object] = lambda: None) -> RunState:
    """Blocks until the run is over and its worker gone; ``on_look`` is called between two looks.

    Raises TimeoutError, and RunFailed where the run failed or its worker vanished."""
    follower = directory.follow()
    deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
    while not (state := follower.refresh()).is_over or directory.is_alive:
        if deadline is not None and time.monotonic() > deadline:
            raise TimeoutError(f"{directory.path} is still {state.status} at step {state.step} of {state.steps} after {timeout_seconds} s")
        on_look()
        time.sleep(every_seconds)
    raise_failure(directory, follower.refresh())
    return state


def raise_failure(directory: RunDirectory, state: RunState) -> None:
    """One clear RunFailed for a failed or lost run; a worker that ended before it could say anything has the end of its log in it."""
    started = _workers.get(directory.path.resolve())
    status = started.process.poll() if started is not None else None
    if started is not None and status is not None and _said_nothing(directory, started):
        tail = directory.log_tail(10)
        raise RunFailed(
            f"the worker ended before it could begin ({_exit_words(status)}); worker.log ends:\n{tail}", "mend what the log names, then resume the run"
        )
    if state.status in ("failed", "lost"):
        how = f" ({_exit_words(status)})" if state.status == "lost" and status and state.ended_by != "guard" else ""
        raise RunFailed(state.reason + how, state.fix)


def _said_nothing(directory: RunDirectory, started: _Started) -> bool:
    try:
        return directory.events_path.stat().st_size <= started.events_bytes
    except OSError:
        return True


def _exit_words(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
    return f"killed by {name}" + (": the kernel does that when memory runs out" if name == "SIGKILL" else "")


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
    try:
        existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    except (OSError, ValueError) as error:  # a name that no file can have
        raise RunError(f"{one_line(path)} cannot be a directory: {reason(error)}", "choose another name for the run") from None
    if existing != path and not existing.is_dir():
        raise RunError(f"{existing} is a file, and the run is to lie in it ({path})", "choose another directory for the run")
    if existing.is_dir() and not os.access(existing, os.W_OK):
        raise RunError(f"{existing} is not writable", "choose another directory for the run")
