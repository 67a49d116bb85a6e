"""Who works on a run: one worker at a time, whose name everybody can read, and who is known to be gone when it is.

``worker.lock`` is held by the kernel (flock), which lets go when the holder ends, however it ends; and it says in JSON who holds it. Within
one machine the kernel's word is enough. Where a file system is shared between machines or containers its locks may not be, so there the
holder also beats: it touches the file every few seconds, and a lock of another boot whose heart stands still is stale.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from sparklab.errors import RunBusy
from sparklab.files import open_plain
from sparklab.text import one_line
from sparklab.units import format_seconds

BEAT_SECONDS: Final = 5.0
SILENT_SECONDS: Final = 30.0
"""A holder on another machine that has not touched the lock for so long is gone."""
SKEW_SECONDS: Final = 3600.0
"""How far the clocks of two machines may be apart before a heartbeat from the future counts as none."""
_HELD: Final = {errno.EWOULDBLOCK, errno.EACCES}
_LONGEST: Final = 4096


@dataclass(frozen=True, kw_only=True)
class Owner:
    """The worker that holds a run, as it signed the lock."""

    pid: int
    host: str
    boot: str
    """The kernel's boot id: a lock of another one was left by a machine that has restarted since, or is another machine's."""
    pids: str
    """The namespace the pid counts in; a container has one of its own."""
    ticks: str
    """When the process began, in the kernel's ticks: a pid is used again, a pid and its beginning are not."""
    since: float
    """Unix seconds at which it took the lock."""

    @classmethod
    def me(cls) -> Owner:
        """This process."""
        return cls(pid=os.getpid(), host=socket.gethostname(), boot=_boot(), pids=_pids(), ticks=_ticks(os.getpid()), since=round(time.time(), 3))

    def __str__(self) -> str:
        held = format_seconds(max(0.0, time.time() - self.since))
        clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"process {self.pid} on {self.host}, since {clock} ({held})"

    def lives(self, kernel_knows: bool, silence: Callable[[], float]) -> bool:
        """Whether the holder is still there, although the kernel lets us have the lock.

        ``kernel_knows``: locks work on this file system, so a holder under this kernel would have kept us out. ``silence``: seconds since its
        last heartbeat.
        """
        if self.boot == _boot():
            if kernel_knows:
                return False
            if self.pids == _pids():
                return _ticks(self.pid) == self.ticks != ""
        return -SKEW_SECONDS < silence() < SILENT_SECONDS


def acquire(path: Path) -> int | None:
    """An open file descriptor that holds the lock, signed with this process's name, or None where a living worker has it.

    A stale lock is taken over. Give it back with :func:`release`. Raises OSError where the file cannot be written.
    """
    descriptor = open_plain(path, os.O_RDWR | os.O_CREAT)
    try:
        kernel_knows = _try(descriptor, fcntl.LOCK_EX)
        if kernel_knows is None:
            os.close(descriptor)
            return None
        owner = _read(descriptor)
        if owner is not None and owner.lives(kernel_knows, lambda: _silence(path, descriptor)):
            os.close(descriptor)
            return None
        sign(descriptor)
        if not kernel_knows:  # two may have come at once, and the last signature stands
            time.sleep(0.2)
            signed = _read(descriptor)
            if signed is None or (signed.pid, signed.ticks, signed.boot) != (os.getpid(), _ticks(os.getpid()), _boot()):
                os.close(descriptor)
                return None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def wait_for(path: Path) -> int:
    """As :func:`acquire`; raises :class:`RunBusy`, which says who has it and since when."""
    for _ in range(20):  # somebody asking whether a worker lives holds the lock for microseconds
        descriptor = acquire(path)
        if descriptor is not None:
            return descriptor
        time.sleep(0.02)
    owner = owner_of(path)
    elsewhere = owner is not None and owner.boot != _boot()
    fix = f"wait for it, or stop it first: sparklab stop {path.parent}"
    if elsewhere:
        fix += f"; if that machine is gone, or restarted just now, try again in {SILENT_SECONDS:.0f} seconds"
    raise RunBusy(f"a worker is at work on {path.parent}" + (f": {owner}" if owner else ""), fix)


def sign(descriptor: int) -> None:
    """Writes this process's name into a lock it holds."""
    content = json.dumps(asdict(Owner.me())).encode()
    os.pwrite(descriptor, content, 0)
    os.ftruncate(descriptor, len(content))


def release(descriptor: int) -> None:
    """Lets go, and takes the name out, so that nobody elsewhere waits for a heart to stop."""
    try:
        os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


@contextmanager
def beating(descriptor: int) -> Iterator[None]:
    """Touches the lock every few seconds, from a thread of its own, for those on other machines."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(BEAT_SECONDS):
            try:
                os.utime(descriptor)
            except OSError:  # a full or vanished disk: the run itself will say so
                return

    thread = threading.Thread(target=beat, name="sparklab-heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def is_held(path: Path) -> bool:
    """True while a living worker holds the lock. Writes nothing, so it works on a directory that may only be read."""
    try:
        descriptor = open_plain(path)
    except OSError:
        return False
    try:
        kernel_knows = _try(descriptor, fcntl.LOCK_SH)
        if kernel_knows is None:
            return True
        owner = _read(descriptor)
        return owner is not None and owner.lives(kernel_knows, lambda: time.time() - os.fstat(descriptor).st_mtime)
    finally:
        os.close(descriptor)


def owner_of(path: Path) -> Owner | None:
    """Who signed the lock last; None where nobody did, or where what stands there is no signature. It may be gone: see :func:`is_held`."""
    try:
        descriptor = open_plain(path)
    except OSError:
        return None
    try:
        return _read(descriptor)
    finally:
        os.close(descriptor)


def _try(descriptor: int, kind: int) -> bool | None:
    """True: the kernel gave us the lock; None: somebody has it; False: this file system has no locks."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except OSError as error:
        return None if error.errno in _HELD else False
    return True


def _read(descriptor: int) -> Owner | None:
    try:
        values: Any = json.loads(os.pread(descriptor, _LONGEST, 0))
        numbers = {"pid": int(values["pid"]), "since": float(values["since"])}
        words = {name: one_line(values[name], 100) for name in ("host", "boot", "pids", "ticks")}
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None
    return Owner(**numbers, **words)  # type: ignore[arg-type]


def _silence(path: Path, descriptor: int) -> float:
    """Seconds since the last heartbeat, by the clock of the file system that holds the lock: machines disagree about the time."""
    with tempfile.TemporaryFile(dir=path.parent) as now:
        return os.fstat(now.fileno()).st_mtime - os.fstat(descriptor).st_mtime


def _boot() -> str:
    return _text("/proc/sys/kernel/random/boot_id") or socket.gethostname()


def _pids() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _ticks(pid: int) -> str:
    """The 22nd field of /proc/PID/stat; "" where there is no such process. The second, the name in brackets, may hold anything."""
    fields = _text(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 else ""


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
