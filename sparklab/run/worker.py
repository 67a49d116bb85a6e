"""The worker: the process that advances one run. ``python -m sparklab.run.worker DIRECTORY [--lock-fd N]``.

It is another process so that a restarted kernel, a closed browser or an out-of-memory kill never takes notebook and run together, and so
that all memory comes back when it ends. ``sparklab.train(..., inline=True)`` calls :func:`advance` in the notebook itself.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import logging
import os
import re
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from sparklab.box import Box
from sparklab.errors import DiskFull, OutOfMemory, RunError, SparklabError
from sparklab.files import reason
from sparklab.run import guard, inputs, lock
from sparklab.run.directory import RunDirectory
from sparklab.run.events import EventWriter
from sparklab.units import KIB

FAILED = 2  # exit status of a run that ended with an error of ours
CRASHED = 1
RESERVE_BYTES = 64 * KIB
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}


def main(arguments: list[str] | None = None) -> int:
    """Advances the run in the directory given; 0 when it finished or was stopped, 2 on an error for the user, 1 on one of ours."""
    parser = argparse.ArgumentParser(prog="python -m sparklab.run.worker", description="Advance one run.")
    parser.add_argument("directory")
    parser.add_argument("--lock-fd", type=int, help="a file descriptor that holds the run's lock already")
    parser.add_argument("--checked", action="store_true", help="whoever starts this has seen that recipe, data, model and packages are as before")
    options = parser.parse_args(arguments)
    directory = RunDirectory(options.directory)
    if options.lock_fd is None:
        descriptor = directory.lock()
    else:
        descriptor = options.lock_fd
        lock.sign(descriptor)  # whoever started us held it until now
    try:
        if not options.checked:
            inputs.check(directory)
        with lock.beating(descriptor):
            return advance(directory, detached=True)
    finally:
        lock.release(descriptor)


def advance(directory: RunDirectory, detached: bool = False) -> int:
    """Trains from where the run stands to its end, or until it is asked to stop. The caller holds the lock.

    ``detached``: this process is the worker and nothing else, so the guard may end all that it started.
    """
    began = time.perf_counter()
    with EventWriter(directory.events_path) as events, _reserve(directory) as reserve:
        try:
            from sparklab.run.session import Session  # noqa: PLC0415 - torch and transformers: seconds, after the directory is known to be good

            floors = guard.floors_of(directory.recipe, Box.detect())
            with guard.watching(directory.path, floors, group=detached):
                session = Session(directory, events, began, floors)
                with session.reporter.meter, _graceful(session.ask_to_stop):
                    session.run()
        except SparklabError as error:
            _last_word(events, reserve, type(error).__name__, error.fact, error.fix, **(error.details if isinstance(error, OutOfMemory) else {}))
            return FAILED
        except Exception as error:
            refused = _not_written(error, directory)
            if refused is None:
                _crash(events, reserve, error)
                raise
            _last_word(events, reserve, type(refused).__name__, refused.fact, refused.fix)
            return FAILED
        except BaseException as error:
            _crash(events, reserve, error)
            raise
    return 0


def _not_written(error: Exception, directory: RunDirectory) -> RunError | None:
    """What the user can mend where a write failed: a full disk, or a run directory that may no longer be written to. None: something else."""
    if is_disk_full(error):
        return DiskFull(f"the disk is full: {error}", "free some space, then resume the run; its last checkpoint is good")
    if not isinstance(error, OSError) or error.errno not in _FORBIDDEN or not isinstance(error.filename, str):
        return None
    if directory.path.absolute() not in Path(error.filename).absolute().parents:
        return None
    fix = f"make {directory.path} writable again, then resume the run; its last checkpoint is good"
    return RunError(f"{error.filename} cannot be written: {reason(error)}", fix)


def is_disk_full(error: BaseException) -> bool:
    """Whether a write failed because nothing more fits: also as safetensors says it, which has no number for it."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FULL
    said = re.search(r"os error (\d+)|code: (\d+)", str(error)) if type(error).__name__ == "SafetensorError" else None
    return said is not None and int(said[1] or said[2]) in _FULL


@contextmanager
def _reserve(directory: RunDirectory) -> Iterator[Path]:
    """A little of the disk held back, so that a run which fills it can still say so."""
    file = directory.path / ".reserve"
    with contextlib.suppress(OSError):
        file.unlink(missing_ok=True)
        file.write_bytes(os.urandom(RESERVE_BYTES))  # no file system stores that in less
    try:
        yield file
    finally:
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)


def _crash(events: EventWriter, reserve: Path, error: BaseException) -> None:
    """An error nobody foresaw: its traceback goes to the log, its last line to the diary."""
    with contextlib.suppress(OSError):  # the log may lie on a full disk
        traceback.print_exception(error, file=sys.stderr)
    fact = traceback.format_exception_only(error)[-1].strip()
    _last_word(events, reserve, type(error).__name__, fact, "see worker.log in the run directory; the last checkpoint is good")


def _last_word(events: EventWriter, reserve: Path, error: str, fact: str, fix: str, **details: Any) -> None:
    try:
        try:
            events.write("failed", error=error, fact=fact, fix=fix, **details)
        except OSError:
            reserve.unlink(missing_ok=True)
            events.write("failed", error=error, fact=fact, fix=fix, **details)
    except OSError as full:  # nothing can be written any more; the log may still take a line
        with contextlib.suppress(OSError):
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


def _hush() -> None:
    """What the libraries say to everybody and nobody here can mend: in worker.log, which a lost run quotes, it would pass for the reason."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a kernel from the hub that nobody asked for is not there
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # PEFT asks for what transformers 5 renamed


if __name__ == "__main__":
    _hush()
    try:
        sys.exit(main())
    except RunError as error:
        print(error, file=sys.stderr)  # noqa: T201
        sys.exit(FAILED)
