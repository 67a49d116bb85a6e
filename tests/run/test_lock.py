"""Who works on a run: named, kept out of by others, and known to be gone when it is, also where the kernel's locks do not reach."""

import dataclasses
import errno
import json
import os
import subprocess
import sys
import time

import pytest

from sparklab.errors import RunBusy, RunError
from sparklab.planner.recipe import Recipe
from sparklab.run import lock
from sparklab.run.directory import RunDirectory


@pytest.fixture
def directory(tmp_path):
    return RunDirectory.create(tmp_path / "run", Recipe(model="tiny", data="chats.jsonl"), {}, {})


@pytest.fixture
def path(directory):
    return directory.path / "worker.lock"


@pytest.fixture
def no_kernel_locks(monkeypatch):
    """A file system that has none, as some network file systems."""

    def flock(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", flock)


def leave(path, silent_seconds=0.0, **changes):
    """A lock that somebody signed and did not take back, last touched so long ago."""
    path.write_text(json.dumps(dataclasses.asdict(dataclasses.replace(lock.Owner.me(), **changes))))
    then = time.time() - silent_seconds
    os.utime(path, (then, then))


def test_the_one_who_is_refused_reads_who_has_it_and_since_when(directory):
    descriptor = directory.lock()
    try:
        assert directory.owner.pid == os.getpid()
        with pytest.raises(RunBusy, match=rf"process {os.getpid()} on .*, since \d{{4}}-\d\d-\d\d .*\n  Fix: .*sparklab stop"):
            directory.lock()
    finally:
        lock.release(descriptor)
    assert directory.owner is None and not directory.is_alive
    lock.release(directory.lock())


def test_a_killed_holders_name_is_no_obstacle(directory):
    code = "import sys, time; from sparklab.run.directory import RunDirectory; RunDirectory(sys.argv[1]).lock(); print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code, str(directory.path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        assert directory.owner.pid == holder.pid and directory.is_alive
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    assert lock.owner_of(directory.path / "worker.lock").pid == holder.pid, "its signature is still there"
    assert not directory.is_alive
    lock.release(directory.lock())


def test_without_kernel_locks_the_process_itself_is_looked_for(directory, path, no_kernel_locks):
    leave(path)
    assert directory.is_alive, "this very process"
    with pytest.raises(RunBusy):
        directory.lock()
    leave(path, ticks="1")
    assert not directory.is_alive, "a process of the same number that began at another time"
    ended = subprocess.Popen([sys.executable, "-c", "pass"])
    ended.wait()
    leave(path, pid=ended.pid)
    assert not directory.is_alive
    descriptor = directory.lock()
    assert directory.owner.pid == os.getpid()
    lock.release(descriptor)


@pytest.mark.parametrize("elsewhere", [{"boot": "another", "host": "spark-2"}, {"pids": "pid:[1]"}])
def test_on_another_machine_the_heart_is_listened_to(directory, path, elsewhere, no_kernel_locks):
    leave(path, silent_seconds=lock.SILENT_SECONDS - 10, **elsewhere)
    assert directory.is_alive and directory.owner is not None
    with pytest.raises(RunBusy):
        directory.lock()
    leave(path, silent_seconds=lock.SILENT_SECONDS + 10, **elsewhere)
    assert not directory.is_alive
    leave(path, silent_seconds=-10 * lock.SKEW_SECONDS, **elsewhere)
    assert not directory.is_alive, "a heartbeat from the far future"
    lock.release(directory.lock())


def test_a_lock_of_another_boot_is_listened_to_even_where_the_kernel_would_give_it(directory, path):
    leave(path, silent_seconds=1, boot="another", host="spark-2")
    with pytest.raises(RunBusy, match=r"on spark-2.*\n.*if that machine is gone, or restarted just now"):
        directory.lock()


def test_a_heart_beats(directory, path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.01)
    descriptor = directory.lock()
    os.utime(path, (1, 1))
    with lock.beating(descriptor):
        deadline = time.monotonic() + 10
        while path.stat().st_mtime < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert path.stat().st_mtime > 2
    lock.release(descriptor)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"pid": "x"}', b'{"pid": 1, "since": 1e999, "host": 3}', b"\xff" * 100_000])
def test_a_strange_signature_is_nobody(directory, path, content):
    path.write_bytes(content)
    assert lock.owner_of(path) is None and not directory.is_alive
    lock.release(directory.lock())


def test_a_signature_cannot_speak_to_the_terminal(path):
    leave(path, host="\x1b]0;owned\x07evil\x9b31m")
    assert str(lock.owner_of(path)).startswith(f"process {os.getpid()} on evil31m, since")


def test_a_pipe_in_its_place_makes_nobody_wait(directory, path):
    os.mkfifo(path)
    assert not directory.is_alive
    with pytest.raises(RunError, match="cannot be locked"):
        directory.lock()
