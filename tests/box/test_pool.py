"""Who holds the pool: the books close, whatever the processes say, and pressure is told by what is available."""

import os
import subprocess
import sys

import pytest

from sparklab.box.meter import MemorySnapshot
from sparklab.box.others import device_sizes
from sparklab.box.pool import pressure, read_pool
from sparklab.units import GIB, KIB, MIB, NA, is_na

MEMINFO = "MemTotal: {total} kB\nMemFree: {free} kB\nMemAvailable: {available} kB\nCached: {cached} kB\nBuffers: 0 kB\nSReclaimable: 0 kB\nShmem: 0 kB\n"


def made(folder, processes, *, total=100, free=30, available=55, cached=25):
    """A /proc with sizes in GiB; ``processes``: pid to (name, command line, GiB)."""
    sizes = {name: round(size * GIB / KIB) for name, size in {"total": total, "free": free, "available": available, "cached": cached}.items()}
    (folder / "meminfo").write_text(MEMINFO.format(**sizes))
    for pid, (name, command, size) in processes.items():
        (folder / str(pid)).mkdir()
        (folder / str(pid) / "comm").write_text(name + "\n")
        (folder / str(pid) / "cmdline").write_bytes(b"\0".join(word.encode() for word in command) + b"\0")
        (folder / str(pid) / "status").write_text(f"VmRSS: 1 kB\nRssAnon: {round(size * GIB / KIB)} kB\nRssShmem: 0 kB\n")
    return folder


def test_the_books_close_and_runs_have_names(tmp_path):
    worker = ["python", "-m", "sparklab.run.worker", "/data/runs/chat-1", "--lock-fd", "3"]
    cut = worker[:3]
    processes = {7: ("python3", worker, 20), 8: ("vllm\x1b[31m", ["vllm"], 12), 9: ("sh", ["sh"], 0.01), 10: ("cut", cut, 2)}
    pool = read_pool(8 * GIB, made(tmp_path, processes))
    assert [(label, size / GIB) for label, size in pool.parts] == [
        ("run chat-1", 20.0), ("vllm[31m (process 8)", 12.0), ("cut (process 10)", 2.0), ("everything else", 11.0),
        ("page cache, given back when asked", 25.0), ("free", 30.0),
    ]  # fmt: skip
    assert sum(size for _, size in pool.parts) == 100 * GIB


def test_shared_memory_is_not_counted_twice(tmp_path):
    pool = read_pool(0, made(tmp_path, {1: ("a", [], 30), 2: ("b", [], 30)}))
    assert [holder.bytes / GIB for holder in pool.holders] == [30.0, 15.0]
    assert sum(size for _, size in pool.parts) == 100 * GIB


def test_a_device_in_the_same_pool_counts_for_its_process(tmp_path):
    answer = "7, 8192\n7, 2048\n11, [N/A]\nnonsense\n"
    on_device = device_sizes(lambda command: answer if "--query-compute-apps=pid,used_memory" in command else "")
    assert on_device == {7: 10240 * MIB}
    pool = read_pool(0, made(tmp_path, {7: ("python3", [], 5)}), on_device)
    assert pool.holders[0].bytes == 15 * GIB


def test_in_a_container_the_pool_is_what_it_may_have(tmp_path):
    (tmp_path / "proc").mkdir()
    proc = made(tmp_path / "proc", {7: ("python3", [], 9)})
    group = tmp_path / "sys" / "fs" / "cgroup"
    group.mkdir(parents=True)
    for name, text in (("max", f"{16 * GIB}"), ("current", f"{14 * GIB}"), ("stat", f"active_file {3 * GIB}\ninactive_file {GIB}\n")):
        (group / f"memory.{name}").write_text(text)
    pool = read_pool(7 * GIB, proc)
    assert sum(size for _, size in pool.parts) == pool.memory.total_bytes == 16 * GIB
    assert (pool.memory.free_bytes, pool.memory.cached_bytes, pool.memory.available_bytes, pool.rest_bytes) == (2 * GIB, 4 * GIB, 6 * GIB, 1 * GIB)
    assert pool.pressure == ("bad", "6 GiB available in this container, less than the 7 GiB kept free for the system")
    assert read_pool(7 * GIB, proc, unified=True).memory.total_bytes == 100 * GIB


def test_nothing_known_is_said_so(tmp_path):
    pool = read_pool(1 * GIB, tmp_path)
    assert pool.parts == [] and pool.holders == () and is_na(pool.rest_bytes)
    assert pool.pressure == ("unknown", "the system does not tell how much memory is available")


def test_a_real_process_is_found():
    code = "import sys; held = bytearray(300 * 2**20); print('ready', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        pool = read_pool(0)
        process.stdin.close()
    (held,) = [holder.bytes for holder in pool.holders if holder.pid == process.pid]
    assert 300 * MIB <= held < 400 * MIB
    assert sum(size for _, size in pool.parts) == pytest.approx(pool.memory.total_bytes)
    assert os.getpid() != process.pid


@pytest.mark.parametrize(
    ("available", "waiting", "level", "words"),
    [
        (50, 0, "good", "50 GiB available"),
        (50, NA, "good", "50 GiB available"),
        (15, 0, "warn", "15 GiB available; from 8 GiB down"),
        (7, 0, "bad", "7 GiB available, less than the 8 GiB kept free"),
        (50, 12, "warn", "wait for memory 12 % of the time"),
        (15, 60, "bad", "wait for memory 60 % of the time"),
        (NA, 90, "unknown", "does not tell"),
    ],
)
def test_pressure(available, waiting, level, words):
    found, reason = pressure(MemorySnapshot(total_bytes=120 * GIB, available_bytes=available * GIB, pressure_percent=waiting), 8 * GIB)
    assert found == level and words in reason
