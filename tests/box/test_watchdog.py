"""The watchdog: its two floors judged on made-up readings, and the process itself against processes that hang."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sparklab.box import watchdog
from sparklab.box.watchdog import Judge, read_pool, words
from sparklab.units import GIB, NA, is_na

SOFT, HARD = 8 * GIB, 4 * GIB
# A mutex locked twice: the C call never returns, whatever signal comes, and PyDLL keeps the GIL, so Python never runs again in this process.
STUCK = """
import ctypes
lock, library = ctypes.create_string_buffer(64), ctypes.PyDLL(None)
library.pthread_mutex_lock(lock)
print("stuck", flush=True)
library.pthread_mutex_lock(lock)
"""


def pool(available_gib, full=0.0, swapped_out=0.0, free_gib=1.0):
    return {"total_bytes": 120 * GIB, "available_bytes": available_gib * GIB, "free_bytes": free_gib * GIB, "swap_used_bytes": 0.0,
            "pressure_some_percent": full, "pressure_full_percent": full, "swapped_in_bytes": 0.0, "swapped_out_bytes": swapped_out}  # fmt: skip


def verdicts(readings, every=0.2):
    """What a judge says to each reading, looks ``every`` seconds apart."""
    judge = Judge(SOFT, HARD)
    return [judge.look(index * every, reading) for index, reading in enumerate(readings)]


@pytest.mark.parametrize(
    ("available", "said"),
    [
        ([50, 20, 9, 8.1, 8.1], ["", "", "", "", ""]),  # above the floor nothing is a reason, however fast it got there
        ([9, 7.9, 9, 7.9, 9], ["", "", "", "", ""]),  # one look below it is none
        ([9, 7.9, 7.8, 7.9], ["", "", "soft", "soft"]),
        ([7, 6.9], ["", "soft"]),
        ([7, 3.9, 7, 3.9], ["", "soft", "soft", "soft"]),
        ([7, 3.9, 3.8], ["", "soft", "hard"]),
        ([50, 3.9, 3.9], ["", "", "hard"]),
        ([9, 6.5, 5, 4.1], ["", "", "soft", "soft"]),  # 12 GiB/s falling to 5 a second: something is left at the next look but one
        ([50, 1.5, 1.5, 1.5], ["", "", "hard", "hard"]),
        ([NA, NA, NA], ["", "", ""]),
    ],
)
def test_floors(available, said):
    assert verdicts([pool(each) for each in available]) == said


def test_memory_that_runs_out_before_the_next_look_is_not_waited_for():
    """Below the soft floor, above the hard one, and gone in 40 ms at this slope."""
    judge = Judge(SOFT, HARD)
    assert judge.look(0.0, pool(16)) == ""
    assert judge.look(0.02, pool(7)) == ""
    assert judge.next_seconds == watchdog.SOONEST_SECONDS
    assert judge.look(0.04, pool(4.1)) == "hard"


def test_the_faster_it_falls_the_sooner_it_looks():
    judge = Judge(SOFT, HARD)
    judge.look(0.0, pool(40))
    assert judge.next_seconds == watchdog.EVERY_SECONDS
    judge.look(1.0, pool(14))  # 26 GiB/s, 10 GiB above the hard floor
    assert judge.next_seconds == pytest.approx(10 / 26 / 4)
    judge.look(2.0, pool(14))
    assert judge.next_seconds == watchdog.EVERY_SECONDS


def test_thrashing_doubles_the_soft_floor_and_is_no_reason_of_its_own():
    assert verdicts([pool(12, full=25.0)] * 3) == ["", "soft", "soft"]
    assert verdicts([pool(17, full=90.0)] * 3) == ["", "", ""]
    writing = [pool(12, swapped_out=index * 0.2 * 2 * watchdog.SWAPPING_BYTES) for index in range(30)]
    assert verdicts(writing)[:3] == ["", "", ""]  # traffic counts when it lasts
    assert verdicts(writing)[-1] == "soft"
    assert set(verdicts([pool(17, swapped_out=index * GIB) for index in range(30)])) == {""}


def test_page_cache_is_no_reason():
    """A file of 60 GiB read through: MemFree falls to nothing, MemAvailable hardly moves, reclaim makes some pressure."""
    assert set(verdicts([pool(100 - index * 0.01, free_gib=max(0.2, 60 - index), full=5.0) for index in range(300)])) == {""}


def test_reads_what_the_system_tells(tmp_path):
    (tmp_path / "pressure").mkdir()
    (tmp_path / "meminfo").write_text("MemTotal: 2048 kB\nMemFree: 8 kB\nMemAvailable: 1024 kB\nSwapTotal: 4 kB\nSwapFree: 1 kB\nHugePages_Total: 0\n")
    (tmp_path / "pressure" / "memory").write_text("some avg10=1.50 avg60=0.00 avg300=0.00 total=5\nfull avg10=0.25 avg60=0.00 avg300=0.00 total=1\n")
    (tmp_path / "vmstat").write_text("nr_free_pages 7\npswpin 2\npswpout 3\n")
    page = os.sysconf("SC_PAGE_SIZE")
    assert read_pool(tmp_path) == {
        "total_bytes": 2**21, "available_bytes": 2**20, "free_bytes": 2**13, "swap_used_bytes": 3 * 2**10, "pressure_some_percent": 1.5,
        "pressure_full_percent": 0.25, "swapped_in_bytes": 2 * page, "swapped_out_bytes": 3 * page,
    }  # fmt: skip
    nothing = read_pool(tmp_path / "nowhere")
    assert len(nothing) == 8 and all(map(is_na, nothing.values()))


def group(folder, version, limit_gib, used_gib, cached_gib=0.0):
    """The files of a control group as the kernel writes them; no limit is "max", or a number beyond all memory."""
    folder.mkdir(parents=True, exist_ok=True)
    used, half = f"{int(used_gib * GIB)}\n", int(cached_gib * GIB / 2)
    if version == 2:
        files = {
            "max": "max\n" if limit_gib is None else f"{int(limit_gib * GIB)}\n",
            "current": used,
            "stat": f"anon 7\nfile 9\nactive_file {half}\ninactive_file {half}\n",
        }
    else:
        files = {"limit_in_bytes": f"{2**63 - 4096 if limit_gib is None else int(limit_gib * GIB)}\n", "usage_in_bytes": used,
                 "stat": f"cache 9\nactive_file 1\ninactive_file 1\ntotal_active_file {half}\ntotal_inactive_file {half}\n"}  # fmt: skip
    for name, text in files.items():
        (folder / f"memory.{name}").write_text(text)


@pytest.mark.parametrize(
    ("version", "line", "place"),
    [
        (2, "0::/\n", ""),  # a container with a namespace of its own
        (2, "0::/../../other\n", ""),  # one that is in sight from outside its own
        (2, "0::/user.slice/run.scope\n", "user.slice/run.scope"),  # systemd-run -p MemoryMax=
        (1, "4:memory:/docker/0abc\n0::/\n", "memory"),  # version 1 without a namespace: its group is mounted as the root
        (1, "9:cpuset:/\n4:memory,hugetlb:/docker/0abc\n", "memory/docker/0abc"),
        (2, "", ""),  # an old kernel that does not tell
    ],
)
def test_reads_what_a_container_may_have(tmp_path, version, line, place):
    proc, mounted = tmp_path / "proc", tmp_path / "sys" / "fs" / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "self" / "cgroup").write_text(line)
    assert watchdog.read_group(proc, 120 * GIB) == {}
    group(mounted / place, version, None, 10)
    assert watchdog.read_group(proc, 120 * GIB) == {}, "no limit"
    group(mounted / place, version, 16, 15, cached_gib=4)
    left = {"limit_bytes": 16 * GIB, "available_bytes": 5 * GIB, "free_bytes": 1 * GIB, "cached_bytes": 4 * GIB}
    assert watchdog.read_group(proc, 120 * GIB) == left
    assert watchdog.read_group(proc, 16 * GIB) == {} and watchdog.read_group(proc, NA) == {}, "the system itself has no more"


def test_the_tightest_limit_on_the_way_up_counts(tmp_path):
    proc, mounted = tmp_path / "proc", tmp_path / "sys" / "fs" / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "self" / "cgroup").write_text("0::/a/b/c\n")
    group(mounted / "a/b/c", 2, 8, 1)
    group(mounted / "a/b", 2, None, 3)
    group(mounted / "a", 2, 12, 10)  # others in it hold nine
    assert watchdog.read_group(proc, 120 * GIB)["limit_bytes"] == 12 * GIB
    group(mounted / "a", 2, 12, 10, cached_gib=9)
    assert watchdog.read_group(proc, 120 * GIB)["limit_bytes"] == 8 * GIB


def figures(**changes):
    return {"available_bytes": 7 * GIB, "slope_bytes_per_second": 0.0, "soft_floor_bytes": SOFT, "hard_floor_bytes": HARD, "others": {}, **changes}


def test_words_name_the_cheapest_fix():
    reason, fix = words(figures(), "soft", False)
    assert reason == "7 GiB of memory were left, below the guard's soft floor of 8 GiB"
    assert "half the micro_batch_tokens" in fix
    reason, fix = words(figures(others={"ollama (process 8)": 12 * GIB}, slope_bytes_per_second=-2 * GIB), "soft", False)
    assert reason.endswith("falling by 2 GiB a second; others hold ollama (process 8) 12 GiB")
    assert fix.startswith("close what is not needed (ollama (process 8))")
    assert "swap or stall with 12 GiB" in words(figures(available_bytes=12 * GIB), "soft", True)[0]
    assert (
        words(figures(limit_bytes=16 * GIB), "soft", False)[0] == "7 GiB of this container's limit of 16 GiB were left, below the guard's soft floor of 8 GiB"
    )
    assert "towards the guard's hard floor" in words(figures(slope_bytes_per_second=-90 * GIB), "hard", False)[0]


@pytest.fixture
def fake(tmp_path):
    """A run directory and a directory that stands for /proc: ``fake(gib)`` sets what is available, ``fake.start(pid)`` a watchdog."""

    class Fake:
        run, proc = tmp_path / "run", tmp_path / "proc"

        def __call__(self, gib):
            draft = self.proc / "new"
            draft.write_text(f"MemTotal: {120 * 2**20} kB\nMemAvailable: {int(gib * 2**20)} kB\n")
            os.replace(draft, self.proc / "meminfo")

        def start(self, pid, group=False):
            options = {"pid": pid, "group": group, "run": str(self.run), "soft_bytes": SOFT, "hard_bytes": HARD, "proc": str(self.proc)}
            return subprocess.Popen([sys.executable, "-I", "-S", watchdog.__file__, json.dumps(options)], start_new_session=True)

    (tmp_path / "run" / "commands").mkdir(parents=True)
    (tmp_path / "proc").mkdir()
    made = Fake()
    made(50)
    return made


def test_a_worker_that_never_gives_the_interpreter_back_is_killed(fake):
    with subprocess.Popen([sys.executable, "-c", STUCK], stdout=subprocess.PIPE) as worker:
        worker.stdout.readline()
        watcher = fake.start(worker.pid)
        time.sleep(0.6)
        worker.send_signal(signal.SIGINT)  # Python would act on it, if it ever ran again
        time.sleep(0.3)
        assert worker.poll() is None
        assert not list(fake.run.glob("*.json"))
        fake(3.5)
        assert worker.wait(30) == -signal.SIGKILL
        assert watcher.wait(30) == 0
    left = json.loads((fake.run / "guard.json").read_text())
    assert (left["level"], left["pid"]) == ("hard", worker.pid)
    assert left["reason"].startswith("3.5 GiB of memory were left, below the guard's hard floor of 4 GiB")
    assert left["numbers"]["available_bytes"] == 3.5 * GIB
    assert left["numbers"]["worker_bytes"] > 2**20
    assert left["numbers"]["swap_used_bytes"] is None
    assert not list((fake.run / "commands").iterdir())


def test_a_container_that_is_nearly_full_is_seen_however_much_the_box_has(fake, tmp_path):
    mounted = tmp_path / "sys" / "fs" / "cgroup"
    group(mounted, 2, 16, 9, cached_gib=2)
    with subprocess.Popen(["sleep", "100"]) as worker:
        watcher = fake.start(worker.pid)  # 50 GiB available, and 9 of 16
        time.sleep(0.8)
        assert not list((fake.run / "commands").glob("*.json"))
        group(mounted, 2, 16, 11, cached_gib=2)
        for _ in range(500):
            time.sleep(0.02)
            if any((fake.run / "commands").glob("*-stop.json")):
                break
        (command,) = (json.loads(file.read_text()) for file in (fake.run / "commands").glob("*.json"))
        assert command["reason"].startswith("7 GiB of this container's limit of 16 GiB were left, below the guard's soft floor of 8 GiB")
        assert command["numbers"]["limit_bytes"] == 16 * GIB and worker.poll() is None
        group(mounted, 2, 16, 14, cached_gib=1)
        assert worker.wait(30) == -signal.SIGKILL and watcher.wait(30) == 0
    assert json.loads((fake.run / "guard.json").read_text())["reason"].startswith("3 GiB of this container's limit of 16 GiB were left")


def ends(pid, seconds=10):
    """Whether the process goes; one that its parent did not wait for stays in the table as a zombie."""
    for _ in range(int(seconds / 0.02)):
        text = Path(f"/proc/{pid}/stat").read_text() if Path(f"/proc/{pid}").exists() else "0 (gone) Z"
        if text.rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.02)
    return False


def test_all_that_a_worker_started_ends_with_it(fake):
    code = "import subprocess, sys; child = subprocess.Popen(['sleep', '100']); print(child.pid, flush=True); child.wait()"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True) as worker:
        child = int(worker.stdout.readline())
        watcher = fake.start(worker.pid, group=True)
        fake(3.5)
        worker.wait(30)
        watcher.wait(30)
    assert ends(child)


def test_asks_once_and_stays_until_the_worker_ends(fake):
    with subprocess.Popen(["sleep", "100"]) as worker:
        watcher = fake.start(worker.pid)
        fake(7)
        for _ in range(500):
            time.sleep(0.02)
            if any((fake.run / "commands").glob("*-stop.json")):
                break
        time.sleep(0.5)
        (command,) = (json.loads(file.read_text()) for file in (fake.run / "commands").glob("*.json"))
        assert (command["command"], command["by"]) == ("stop", "guard")
        assert command["reason"].startswith("7 GiB of memory were left")
        assert command["fix"]
        assert command["numbers"]["soft_floor_bytes"] == SOFT
        assert worker.poll() is None and watcher.poll() is None
        worker.kill()
    assert watcher.wait(30) == 0


def test_where_no_command_can_be_written_a_signal_says_the_same(fake):
    (fake.run / "commands").rmdir()
    with subprocess.Popen(["sleep", "100"]) as worker:
        watcher = fake.start(worker.pid)
        fake(7)
        assert worker.wait(30) == -signal.SIGTERM
        assert watcher.wait(30) == 0


def test_it_is_small_and_loads_next_to_nothing():
    code = f"import sys; source = open({watchdog.__file__!r}).read(); exec(compile(source, 'watchdog', 'exec'), {{'__name__': 'x'}}); print(*sys.modules)"
    loaded = set(subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True).stdout.split())
    assert {"json", "select", "signal"} <= loaded
    assert not {"sparklab", "typing", "pathlib", "dataclasses", "subprocess", "torch", "numpy"} & loaded
