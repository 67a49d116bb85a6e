"""The watchdog: a process of a few MB that watches the pool of memory for one worker, and ends it before the box can freeze.

``python -I -S watchdog.py OPTIONS``, started beside a worker by :mod:`sparklab.run.guard`, in a session of its own. It loads nothing but this
file and the standard library, asks nothing of the process it watches, and so works on where that one hangs in a C call and never gives the
interpreter back. It ends with the worker.

Several times a second it reads MemAvailable, never MemFree: page cache can go and counts as available. Where a container or a service has a limit
of its own below what the system has, what is left of that (page cache that can go counted as left) is a second pool with floors of its own.

- Below the **soft floor** in two looks running, it asks for checkpoint-and-stop: a ``stop`` command with its reason in the run's directory.
- Below the **hard floor** in two looks running, or below the soft one where the memory falls so fast, in two looks running, that nothing
  would be left at the next look but one, it leaves its reason and figures in ``guard.json`` and kills the worker and all it started.
- Where tasks stand still for want of memory (PSI ``full``) or the system writes much to swap, the soft floor counts as twice as high: a box
  that has begun to thrash is nearer its end than MemAvailable says. Neither alone is a reason, as reading large files causes both.

How fast MemAvailable falls decides how soon it looks again. It is no reason to stop above the floors: loading a model looks the same.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing costs more memory than all the rest
    from pathlib import Path
    from typing import Any, Final

EVERY_SECONDS: Final = 0.2  # between two looks while nothing is near
SOONEST_SECONDS: Final = 0.02
LOOKS_TO_THE_FLOOR: Final = 4  # so many looks before the hard floor is reached at the present slope
STALLED_PERCENT: Final = 20.0  # PSI full avg10 from which the soft floor counts double
SWAPPING_BYTES: Final = 256.0 * 2**20  # a second written to swap from which it does
GIB: Final = 2.0**30
LEAST_BYTES: Final = 0.5 * GIB  # smaller holders of memory are not worth a line
MOST_NAMED: Final = 4
NA: Final = float("nan")


# what the system tells


def read_sizes(path: str | Path) -> dict[str, float]:
    """Lines like ``MemTotal:  24684092 kB`` as {name: bytes}; other lines are skipped."""
    sizes: dict[str, float] = {}
    for line in _text(path).splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if len(words) == 2 and words[1] == "kB" and words[0].isdigit():
            sizes[name] = float(words[0]) * 1024
    return sizes


def read_pressure(path: str | Path) -> dict[str, float]:
    """A PSI file as {"some": percent, "full": percent} of the last ten seconds; NA where it does not tell."""
    shares = {"some": NA, "full": NA}
    for line in _text(path).splitlines():
        kind, _, rest = line.partition(" avg10=")
        try:
            if kind in shares:
                shares[kind] = float(rest.split()[0])
        except (IndexError, ValueError):
            continue
    return shares


def read_swapped(path: str | Path) -> tuple[float, float]:
    """(bytes ever read from swap, bytes ever written to it) as ``/proc/vmstat`` counts them; NA where it does not."""
    pages = {"pswpin": NA, "pswpout": NA}
    for line in _text(path).splitlines():
        name, _, count = line.partition(" ")
        if name in pages and count.isdigit():
            pages[name] = float(count)
    size = os.sysconf("SC_PAGE_SIZE")
    return pages["pswpin"] * size, pages["pswpout"] * size


def read_pool(proc: str | Path) -> dict[str, float]:
    """One look at the pool: sizes in bytes, pressure in percent, swap traffic as counted since the start of the system; NA where unknown."""
    memory = read_sizes(f"{proc}/meminfo")
    pressure = read_pressure(f"{proc}/pressure/memory")
    swapped_in, swapped_out = read_swapped(f"{proc}/vmstat")
    return {
        "total_bytes": memory.get("MemTotal", NA),
        "available_bytes": memory.get("MemAvailable", NA),
        "free_bytes": memory.get("MemFree", NA),
        "swap_used_bytes": memory.get("SwapTotal", NA) - memory.get("SwapFree", NA),
        "pressure_some_percent": pressure["some"],
        "pressure_full_percent": pressure["full"],
        "swapped_in_bytes": swapped_in,
        "swapped_out_bytes": swapped_out,
    }


def read_group(proc: str | Path, total_bytes: float) -> dict[str, float]:
    """What is left of the tightest memory limit of the control groups this process is in (versions 1 and 2), where it is below ``total_bytes``.

    ``limit_bytes``, ``available_bytes`` (not in use, or page cache of the group that can go), ``free_bytes``, ``cached_bytes``; {} where there is no such
    limit. Beyond it the kernel ends processes of the group, however much the system has.
    """
    tightest: dict[str, float] = {}
    for folder in _groups(proc):
        version2 = os.path.exists(f"{folder}/memory.max")
        limit = _amount(f"{folder}/{'memory.max' if version2 else 'memory.limit_in_bytes'}")
        used = _amount(f"{folder}/{'memory.current' if version2 else 'memory.usage_in_bytes'}")
        if not limit < total_bytes or used != used:  # noqa: PLR0124 - NA compares false
            continue
        counted = {name: float(count) for name, _, count in (line.partition(" ") for line in _text(f"{folder}/memory.stat").splitlines()) if count.isdigit()}
        prefix = "" if version2 else "total_"  # version 1 counts what groups below it hold apart
        cached = min(used, counted.get(f"{prefix}active_file", 0.0) + counted.get(f"{prefix}inactive_file", 0.0) + counted.get("slab_reclaimable", 0.0))
        room = max(0.0, limit - used)
        if not tightest or room + cached < tightest["available_bytes"]:
            tightest = {"limit_bytes": limit, "available_bytes": room + cached, "free_bytes": room, "cached_bytes": cached}
    return tightest


def _groups(proc: str | Path) -> list[str]:
    """The folders of this process's memory control groups, from its own up to the root that is in sight: a limit holds for all below it."""
    mounted = f"{os.path.dirname(os.path.abspath(proc)).rstrip('/')}/sys/fs/cgroup"
    found = {mounted: "", f"{mounted}/memory": ""}  # inside a container its own group is the root, whatever the path says
    for line in _text(f"{proc}/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if ".." not in path and (not controllers or "memory" in controllers.split(",")):
            found[f"{mounted}/memory" if controllers else mounted] = path.strip("/")
    folders = []
    for root, path in found.items():
        parts = path.split("/") if path else []
        folders += [f"{root}/{'/'.join(parts[:depth])}".rstrip("/") for depth in range(len(parts), -1, -1)]
    return folders


def _amount(path: str) -> float:
    """The bytes a file of a control group tells; NA where there is none, or no limit ("max")."""
    text = _text(path).strip()
    return float(text) if text.isdigit() else NA


def process_sizes(proc: str | Path) -> dict[int, float]:
    """What each process alone holds, by its id: anonymous and shared memory, as files it has mapped can go."""
    sizes = {}
    try:
        found = [entry.name for entry in os.scandir(proc) if entry.name.isdigit()]
    except OSError:
        return {}
    for name in found:
        fields = read_sizes(f"{proc}/{name}/status")
        sizes[int(name)] = fields.get("RssAnon", 0.0) + fields.get("RssShmem", 0.0)
    return sizes


def named_largest(proc: str | Path, sizes: dict[int, float], leave_out: tuple[int, ...]) -> dict[str, float]:
    """The largest processes by name, ``{"ollama (process 8)": bytes}``, largest first, from 0.5 GiB on."""
    others = [(size, pid) for pid, size in sizes.items() if size >= LEAST_BYTES and pid not in leave_out]
    return {f"{process_name(proc, pid)} (process {pid})": size for size, pid in sorted(others, reverse=True)[:MOST_NAMED]}


def process_name(proc: str | Path, pid: int) -> str:
    """The program's name as it may stand in a line of text."""
    return "".join(letter for letter in _text(f"{proc}/{pid}/comm").strip() if letter.isprintable())[:40] or "unknown"


def _text(path: str | Path) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


# what follows from it


class Judge:
    """Two floors and what was seen so far; :meth:`look` takes one more reading and says "", "soft" or "hard"."""

    def __init__(self, soft_bytes: float, hard_bytes: float) -> None:
        self.soft_bytes, self.hard_bytes = soft_bytes, hard_bytes
        self.next_seconds = EVERY_SECONDS
        """When to look again."""
        self.slope_bytes = 0.0
        """Bytes a second by which MemAvailable grew between the last two looks; below zero: it falls."""
        self.swap_out_bytes = 0.0
        """Bytes a second written to swap, smoothed over about two seconds."""
        self._last: tuple[float, dict[str, float]] | None = None
        self._below_soft = self._below_hard = self._nothing_left = 0

    def look(self, now: float, pool: dict[str, float]) -> str:
        """``now`` in seconds on a clock that never jumps. A reading without MemAvailable says nothing."""
        available = pool["available_bytes"]
        if available != available:  # noqa: PLR0124 - NA
            return ""
        self._measure(now, pool)
        soft = self.soft_bytes * (2.0 if self.is_thrashing(pool) else 1.0)
        falling = max(0.0, -self.slope_bytes)
        self.next_seconds = EVERY_SECONDS
        if falling and available > 0:
            self.next_seconds = min(max((available - self.hard_bytes) / falling / LOOKS_TO_THE_FLOOR, SOONEST_SECONDS), EVERY_SECONDS)
        self._below_soft = self._below_soft + 1 if available < soft else 0
        self._below_hard = self._below_hard + 1 if available < self.hard_bytes else 0
        nothing_left = available < self.soft_bytes and available - falling * 2 * self.next_seconds <= 0
        self._nothing_left = self._nothing_left + 1 if nothing_left else 0
        if max(self._below_hard, self._nothing_left) >= 2:
            return "hard"
        return "soft" if self._below_soft >= 2 else ""

    def is_thrashing(self, pool: dict[str, float]) -> bool:
        """Tasks stand still for want of memory, or much is written to swap."""
        return pool["pressure_full_percent"] >= STALLED_PERCENT or self.swap_out_bytes >= SWAPPING_BYTES  # NA compares false

    def _measure(self, now: float, pool: dict[str, float]) -> None:
        if self._last is not None and now > self._last[0]:
            then, before = self._last
            seconds = now - then
            self.slope_bytes = (pool["available_bytes"] - before["available_bytes"]) / seconds
            written = (pool["swapped_out_bytes"] - before["swapped_out_bytes"]) / seconds
            if written == written:  # noqa: PLR0124 - not NA
                self.swap_out_bytes += min(1.0, seconds / 2.0) * (written - self.swap_out_bytes)
        self._last = (now, pool)


# what is done


class Watch:
    """One worker under watch. Options: ``pid``, ``group`` (kill all it started too), ``run`` (its directory), ``soft_bytes``, ``hard_bytes``, ``proc``,
    and ``limit_soft_bytes``, ``limit_hard_bytes``, the floors within a container's limit.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self.pid, self.run, self.proc = int(options["pid"]), str(options["run"]), str(options["proc"])
        self.group = bool(options["group"]) and os.getpgid(self.pid) == self.pid
        floors = float(options["soft_bytes"]), float(options["hard_bytes"])
        self.judge = Judge(*floors)
        self.limit_judge = Judge(float(options.get("limit_soft_bytes", floors[0])), float(options.get("limit_hard_bytes", floors[1])))
        self.asked = False
        self.handle = os.pidfd_open(self.pid)  # stays the worker's: no other process of the same number can be meant

    def until_it_ends(self) -> None:
        """Looks again and again; returns when the worker is gone, by itself or by us."""
        gone = select.poll()
        gone.register(self.handle, select.POLLIN)
        while not gone.poll(min(self.judge.next_seconds, self.limit_judge.next_seconds) * 1000):
            verdict, judge, pool = self.look()
            if verdict == "hard":
                self.end(judge, pool)
                return
            if verdict == "soft" and not self.asked:
                self.asked = True
                self.ask(judge, pool)

    def look(self) -> tuple[str, Judge, dict[str, float]]:
        """The worse of two verdicts, on the system's memory and on what the container may have of it, with who said it and what was seen."""
        now, pool = time.monotonic(), read_pool(self.proc)
        verdict = self.judge.look(now, pool)
        group = read_group(self.proc, pool["total_bytes"])
        if group:
            within = {**pool, **group, "total_bytes": group["limit_bytes"]}
            said = self.limit_judge.look(now, within)
            if said == "hard" or (said and not verdict):
                return said, self.limit_judge, within
        return verdict, self.judge, pool

    def numbers(self, judge: Judge, pool: dict[str, float], others: bool = True) -> dict[str, Any]:
        """What was seen, for the record."""
        worker = read_sizes(f"/proc/{self.pid}/status")
        kept = {name: value for name, value in pool.items() if not name.startswith("swapped")}
        held = named_largest("/proc", process_sizes("/proc"), (self.pid, os.getpid())) if others else {}
        return {**kept, "slope_bytes_per_second": judge.slope_bytes, "swap_out_bytes_per_second": judge.swap_out_bytes,
                "soft_floor_bytes": judge.soft_bytes, "hard_floor_bytes": judge.hard_bytes,
                "worker_bytes": worker.get("RssAnon", NA), "others": held}  # fmt: skip

    def ask(self, judge: Judge, pool: dict[str, float]) -> None:
        """Checkpoint-and-stop, through the run's commands; where none can be written, by the signal that means the same."""
        numbers = self.numbers(judge, pool)
        reason, fix = words(numbers, "soft", judge.is_thrashing(pool))
        try:
            write(f"{self.run}/commands/{time.time_ns()}-stop.json", {"command": "stop", "by": "guard", "reason": reason, "fix": fix, "numbers": numbers})
        except OSError:
            signal.pidfd_send_signal(self.handle, signal.SIGTERM)

    def end(self, judge: Judge, pool: dict[str, float]) -> None:
        """Kills the worker. The reason is written first, so that nobody finds it dead without one, unless there is no time for that."""
        hurry = pool["available_bytes"] < judge.hard_bytes / 2
        if hurry:
            self._kill()
        numbers = self.numbers(judge, pool, others=not hurry)
        reason, fix = words(numbers, "hard", False)
        try:
            write(f"{self.run}/guard.json", {"level": "hard", "pid": self.pid, "time": round(time.time(), 3), "reason": reason, "fix": fix, "numbers": numbers})
        except OSError as error:  # a full disk saves nobody
            print(f"guard: {reason} ({error})", file=sys.stderr)  # noqa: T201
        finally:
            self._kill()

    def _kill(self) -> None:
        try:
            if self.group:
                os.killpg(self.pid, signal.SIGKILL)
            signal.pidfd_send_signal(self.handle, signal.SIGKILL)
        except ProcessLookupError:
            pass


def words(numbers: dict[str, Any], level: str, thrashing: bool) -> tuple[str, str]:
    """(reason, the cheapest fix) of a trip, for people."""
    have, floor = numbers["available_bytes"], numbers[f"{level}_floor_bytes"]
    falling = -numbers["slope_bytes_per_second"]
    limit = numbers.get("limit_bytes", NA)
    kind = "memory" if limit != limit else f"this container's limit of {_gib(limit)}"  # noqa: PLR0124 - NA: the system's own
    what = f"{_gib(have)} of {kind} were left, below the guard's {level} floor of {_gib(floor)}"
    if level == "hard" and have >= floor:
        what = f"{_gib(have)} of {kind} were left and falling by {_gib(falling)} a second towards the guard's hard floor of {_gib(floor)}"
    elif thrashing and have >= floor:
        what = f"the system has begun to swap or stall with {_gib(have)} of {kind} left (the guard's soft floor is {_gib(floor)})"
    elif falling >= GIB:
        what += f", falling by {_gib(falling)} a second"
    others = numbers["others"]
    if others and sum(others.values()) >= floor - have:
        held = ", ".join(f"{name} {_gib(size)}" for name, size in others.items())
        return f"{what}; others hold {held}", f"close what is not needed ({next(iter(others))}), then resume: the run goes on from its last checkpoint"
    return what, "resume when memory is free; if it comes again, start with half the micro_batch_tokens and twice the micro_batches_per_update"


def write(path: str, content: dict[str, Any]) -> None:
    """Writes a JSON file whole or not at all; unknown is null."""
    folder, _, name = path.rpartition("/")
    draft = f"{folder}/.{name}.{os.getpid()}.new"
    with open(draft, "w", encoding="utf-8") as file:
        json.dump(_plain(content), file, ensure_ascii=False, indent=1)
    os.replace(draft, path)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return None if value != value else value  # noqa: PLR0124 - NA


def _gib(size: float) -> str:
    return f"{size / GIB:.3g} GiB"


def come_first() -> None:
    """Looks in time also where every core is busy, and is the last to go where the system itself must end somebody; as far as it is allowed."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, -10)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write("-900")


if __name__ == "__main__":
    come_first()
    with contextlib.suppress(ProcessLookupError):  # the worker was gone before the first look
        Watch(json.loads(sys.argv[1])).until_it_ends()
