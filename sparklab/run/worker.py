"""The worker: the process that advances one run. ``python -m sparklab.run.worker DIRECTORY [--lock-fd N]``.

It is another process so that a restarted kernel, a closed browser or an out-of-memory kill never takes notebook and run together, and so
that all memory comes back when it ends. ``sparklab.train(..., inline=True)`` calls :func:`advance` in the notebook itself.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from sparklab.box import Box
from sparklab.errors import DiskFull, RunError, SparklabError
from sparklab.run import guard, lock
from sparklab.run.directory import DISK_FULL, RunDirectory
from sparklab.run.events import EventWriter

FAILED = 2  # exit status of a run that ended with an error of ours
CRASHED = 1


def main(arguments: list[str] | None = None) -> int:
    """Advances the run in the directory given; 0 when it finished or was stopped, 2 on an error for the user, 1 on one of ours."""
    parser = argparse.ArgumentParser(prog="python -m sparklab.run.worker", description="Advance one run.")
    parser.add_argument("directory")
    parser.add_argument("--lock-fd", type=int, help="a file descriptor that holds the run's lock already")
    options = parser.parse_args(arguments)
    directory = RunDirectory(options.directory)
    if options.lock_fd is None:
        descriptor = directory.lock()
    else:
        descriptor = options.lock_fd
        lock.sign(descriptor)  # whoever started us held it until now
    try:
        with lock.beating(descriptor):
            return advance(directory, detached=True)
    finally:
        lock.release(descriptor)


def advance(directory: RunDirectory, detached: bool = False) -> int:
    """Trains from where the run stands to its end, or until it is asked to stop. The caller holds the lock.

    ``detached``: this process is the worker and nothing else, so the guard may end all that it started.
    """
    began = time.perf_counter()
    with EventWriter(directory.events_path) as events:
        try:
            from sparklab.run.session import Session  # noqa: PLC0415 - torch and transformers: seconds, after the directory is known to be good

            floors = guard.floors_of(directory.recipe, Box.detect())
            with guard.watching(directory.path, floors, group=detached):
                session = Session(directory, events, began, floors)
                with _graceful(session.ask_to_stop):
                    session.run()
        except SparklabError as error:
            _last_word(events, type(error).__name__, error.fact, error.fix)
            return FAILED
        except OSError as error:
            if error.errno != DISK_FULL:
                _crash(events, error)
                raise
            full = DiskFull(f"the disk is full: {error}", "free some space, then resume the run")
            _last_word(events, "DiskFull", full.fact, full.fix)
            return FAILED
        except BaseException as error:
            _crash(events, error)
            raise
    return 0


def _crash(events: EventWriter, error: BaseException) -> None:
    """An error nobody foresaw: its traceback goes to the log, its last line to the diary."""
    traceback.print_exception(error, file=sys.stderr)
    fact = traceback.format_exception_only(error)[-1].strip()
    _last_word(events, type(error).__name__, fact, "see worker.log in the run directory; the last checkpoint is good")


def _last_word(events: EventWriter, error: str, fact: str, fix: str) -> None:
    try:
        events.write("failed", error=error, fact=fact, fix=fix)
    except OSError as full:  # nothing can be written any more; the log may still take a line
        print(f"{error}: {fact} (and the diary could not be written: {full})", file=sys.stderr)  # noqa: T201


@contextmanager
def _graceful(stop: Any) -> Iterator[None]:
    """SIGTERM and Ctrl-C finish the update, save and leave; a second one ends at once. Only a main thread may listen."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous: dict[signal.Signals, Any] = {}

    def once(number: int, _frame: FrameType | None) -> None:
        stop(f"received {signal.Signals(number).name}")
        for waiting, handler in previous.items():
            signal.signal(waiting, handler)

    for each in (signal.SIGTERM, signal.SIGINT):
        previous[each] = signal.signal(each, once)
    try:
        yield
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except RunError as error:
        print(error, file=sys.stderr)  # noqa: T201
        sys.exit(FAILED)
