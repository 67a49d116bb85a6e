"""What looking on costs: the worker, the kernel and the page, watched and unseen, and how long a run of 100,000 steps takes to open.

python benchmarks/panels.py [worker] [kernel] [opening]        (default: all three; some four minutes)
python benchmarks/panels.py hours --minutes 60                 (memory of kernel and page over a long time; cheap, and may run beside other work)

Needs what the browser tests need: Debian's chromium, JupyterLab.
"""

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "panels")]
warnings.simplefilter("ignore")

from lab import Lab, browser, server, write_notebook  # noqa: E402
from scenes import make_directory, start_worker  # noqa: E402
from support import write_chats  # noqa: E402

import sparklab as sl  # noqa: E402
from sparklab.box.watchdog import read_sizes  # noqa: E402
from sparklab.data.lesson import lesson  # noqa: E402

HIDE = """() => {
  Object.defineProperty(document, "hidden", { get: () => true, configurable: true });
  document.dispatchEvent(new Event("visibilitychange"));
}"""
WATCHED_SECONDS = 20.0
LONG = 100_000


def worker(folder: Path) -> dict[str, Any]:
    """Share of a real run's steps that goes into telling: the reporter's callbacks inside an inline run of the bundled model, in CPU time of its thread."""
    from sparklab.run.reporter import Reporter  # noqa: PLC0415 - torch, for this measurement alone

    spent: dict[str, Any] = {"seconds": 0.0, "inside": False}

    def timed(name: str) -> None:
        method = getattr(Reporter, name)

        def call(self: Reporter, *arguments: Any, **options: Any) -> Any:
            if spent["inside"]:
                return method(self, *arguments, **options)
            begin, spent["inside"] = time.thread_time(), True
            try:
                return method(self, *arguments, **options)
            finally:
                spent["seconds"] += time.thread_time() - begin
                spent["inside"] = False

        setattr(Reporter, name, call)

    for name in ("on_step_end", "on_log"):
        timed(name)
    data, held_out = write_chats(folder / "train.jsonl", 200), write_chats(folder / "held_out.jsonl", 8, "held_out")
    recipe = lesson("lora", 0, folder / "lesson").replace(
        data=str(data), held_out=str(held_out), max_steps=20, answer_held_out=0, sample_prompts=(), eval_every=1000, save_every=1000
    )
    os.environ["OMP_NUM_THREADS"] = "1"
    begin = time.thread_time()
    run = sl.train(recipe, folder / "run", inline=True, panel=False)
    whole, state = time.thread_time() - begin, run.state
    updates = len(state.step_seconds)
    return {
        "updates": updates,
        "tokens an update": round(state.tokens / updates),
        "CPU milliseconds telling an update": round(1000 * spent["seconds"] / updates, 3),
        "wall milliseconds an update": round(1000 * sum(state.step_seconds) / updates, 1),
        "share of the run's CPU": f"{100 * spent['seconds'] / whole:.2f} %",
    }


MEASURE = f"""
import resource, time
def measure(seconds={WATCHED_SECONDS}):
    begin, used = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF)
    time.sleep(seconds)
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime
    rss = int(open("/proc/self/statm").read().split()[1]) * 4096
    print(cpu / (time.monotonic() - begin), rss)
"""


CLOSE = "run._panel.freeze(); run._panel.widget.close()"


@contextmanager
def notebook(folder: Path) -> Iterator[tuple[Lab, Any]]:
    """The notebook that watches, open in a browser, and what asks the browser for its own figures."""
    with server(folder) as address, browser(folder) as context:
        lab = Lab(context.new_page(), address)
        lab.open("watch.ipynb")
        devtools = context.new_cdp_session(lab.page)
        devtools.send("Performance.enable")
        yield lab, devtools


def kernel(folder: Path) -> dict[str, Any]:
    """CPU of a whole kernel process, and of the page, while a run of 20 steps a second is watched, unseen, and not there at all."""
    work = folder / "work"
    work.mkdir()
    directory = make_directory(work / "run")
    write_notebook(work / "watch.ipynb", [MEASURE, "measure()", "import sparklab as sl\nrun = sl.Run.open('run'); run.panel()", CLOSE])
    running = start_worker(directory, "--steps", 20_000, "--delay", 0.05)
    found = {}
    try:
        with notebook(folder) as (lab, devtools):

            def look(name: str) -> None:
                devtools.send("HeapProfiler.collectGarbage")  # what came before is not this look's
                before = _page_metrics(devtools)
                lab.run(1)
                after = _page_metrics(devtools)
                text = lab.page.locator(".jp-OutputArea-output").filter(has_text="0.").first.inner_text()
                share, rss = map(float, text.split())
                found[name] = {"kernel share of a core": f"{100 * share:.2f} %", "kernel MiB": round(rss / 2**20, 1),
                               "page share of a core": f"{100 * (after['TaskDuration'] - before['TaskDuration']) / WATCHED_SECONDS:.2f} %",
                               "page, its scripts": f"{100 * (after['ScriptDuration'] - before['ScriptDuration']) / WATCHED_SECONDS:.2f} %",
                               "page laid out": int(after["LayoutCount"] - before["LayoutCount"]),
                               "page heap MiB": round(lab.page.evaluate("performance.memory.usedJSHeapSize") / 2**20, 1)}  # fmt: skip

            lab.run(0)
            look("nothing watched")
            lab.run(2)
            lab.until("$('.sparklab')?.dataset.rows > 5", 60)
            look("watched")
            look("watched, later")
            lab.page.evaluate(HIDE)
            lab.page.wait_for_timeout(3000)
            look("in a hidden tab")
            lab.run(3)
            running.kill()
            look("nothing watched, later")
    finally:
        running.kill()
        running.wait()
    return found


def hours(folder: Path, minutes: float = 60.0) -> dict[str, Any]:
    """Memory of kernel and page, each minute, while a run of 20 steps a second is watched: what lives, after both have collected their garbage."""
    work = folder / "work"
    work.mkdir()
    directory = make_directory(work / "run")
    write_notebook(work / "watch.ipynb", [KERNEL_SIZE, "import sparklab as sl\nsl.Run.open('run').panel()"])
    running = start_worker(directory, "--steps", 10**7, "--delay", 0.05)
    found: list[dict[str, float]] = []
    try:
        with notebook(folder) as (lab, devtools):
            lab.run(0)
            lab.run(1)
            lab.until("$('.sparklab')?.dataset.rows > 5", 60)
            pid = int((work / "pid").read_text())
            began = time.monotonic()
            while time.monotonic() - began < 60 * minutes:
                lab.page.wait_for_timeout(60_000)
                devtools.send("HeapProfiler.collectGarbage")
                page = _page_metrics(devtools)
                line = {"minute": round((time.monotonic() - began) / 60, 1), "steps": int(lab.page.locator(".sparklab").get_attribute("data-rows") or 0),
                        "kernel MiB": _kernel_bytes(pid) / 2**20, "heap MiB": page["JSHeapUsedSize"] / 2**20, "nodes": page["Nodes"],
                        "listeners": page["JSEventListeners"]}  # fmt: skip
                found.append(line)
                print("  ".join(f"{name} {value:,.2f}" for name, value in line.items()), flush=True)
    finally:
        running.kill()
        running.wait()
    half = found[len(found) // 2 :]
    return {
        f"{name} an hour, {part}": round(_slope([(line["minute"], line[name]) for line in lines]), 2)
        for name in ("kernel MiB", "heap MiB", "nodes", "steps")
        for part, lines in (("after the first five minutes", found[5:]), ("second half", half))
    }


KERNEL_SIZE = "import os\nopen('pid', 'w').write(str(os.getpid()))"


def _kernel_bytes(pid: int) -> float:
    """What a process alone holds."""
    return read_sizes(f"/proc/{pid}/status")["RssAnon"]


def _slope(points: list[tuple[float, float]]) -> float:
    """Of the line that fits best, y an hour for x in minutes."""
    middle_x, middle_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    return 60 * sum((x - middle_x) * (y - middle_y) for x, y in points) / sum((x - middle_x) ** 2 for x, _ in points)


def _page_metrics(devtools: Any) -> dict[str, float]:
    return {metric["name"]: metric["value"] for metric in devtools.send("Performance.getMetrics")["metrics"]}


def write_long_run(directory: Any, steps: int) -> None:
    """The events of a run of so many steps, as a worker writes them."""
    with open(directory.events_path, "w", encoding="utf-8") as file:
        count = [0]

        def say(event: str, **fields: Any) -> None:
            file.write(json.dumps({"event": event, "seq": count[0], "time": round(1.7e9 + count[0] / 9, 3), **fields}, separators=(",", ":")) + "\n")
            count[0] += 1

        say("started", pid=1, host="here", device="cpu", dtype="fp32", method="lora", resumed_from=None)
        for step in range(1, steps + 1):
            say("step", step=step, steps=2 * steps, epoch=round(step / steps, 4), loss=2 * math.exp(-step / 2e4) + 0.5 + 0.1 * math.sin(step * 1.7),
                learning_rate=2e-4 * (1 - step / steps / 2), grad_norm=0.6 + 0.4 * math.sin(step / 3), tokens=2040, seconds=0.1, wait_seconds=1e-4)  # fmt: skip
            if step % 10 == 0:
                say("memory", process_bytes=3e9, peak_bytes=3.3e9, available_bytes=14e9, total_bytes=24e9, free_bytes=6e9, cached_bytes=8e9,
                    swap_used_bytes=0, pressure_percent=0.0)  # fmt: skip
            if step % 1000 == 0:
                say("eval", step=step, loss=1.0, tokens=4000)
                say("sample", step=step, prompt="Greet the world.", text="Hello, world. " * 20)


def opening(folder: Path) -> dict[str, Any]:
    """From running the cell to a drawn panel, in a fresh kernel of a real JupyterLab; what of it is reading, and what crosses to the page."""
    work = folder / "work"
    work.mkdir()
    found = {}
    cells = ["import sparklab as sl\nfrom sparklab.panels import run_panel, widget", *(f"sl.Run.open('{name}').panel()" for name in ("short", "long"))]
    write_notebook(work / "open.ipynb", cells)
    holders = []
    for name, steps in (("short", 1000), ("long", LONG)):
        directory = make_directory(work / name)
        write_long_run(directory, steps)
        holders.append(directory.lock())  # a worker is at work, so the panel is live
    with server(folder) as address, browser(folder) as context:
        lab = Lab(context.new_page(), address)
        lab.open("open.ipynb")
        lab.run(0)
        for index, name in ((1, "short"), (2, "long")):
            begin = time.monotonic()
            lab.begin(index)
            lab.until(f"$$('.sparklab').length === {index}", 60)
            lab.page.locator(".sparklab").nth(index - 1).scroll_into_view_if_needed()
            lab.until(f"$$('.sparklab')[{index - 1}].dataset.points > 0", 60)
            found[f"{name}: seconds from the cell to the curve"] = round(time.monotonic() - begin, 2)
            found[f"{name}: points on the page"] = int(lab.page.locator(".sparklab").nth(index - 1).get_attribute("data-points"))
    for holder in holders:
        os.close(holder)
    code = f"""
import time
from sparklab.run.directory import RunDirectory
from sparklab.panels import twin
from sparklab.panels.widget import RunPanel
directory, seconds = RunDirectory({str(work / "long")!r}), [time.process_time()]
def lap(): seconds.append(time.process_time())
state = directory.follow().refresh(); lap()
html = twin.run_html(state, directory.plan); lap()
panel = RunPanel(); panel.update(state, directory.plan); lap()
print(*[round(b - a, 3) for a, b in zip(seconds, seconds[1:])], len(panel.series.all()), len(html))"""
    told = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True).stdout.split()
    names = ("CPU seconds reading events", "CPU seconds drawing the twin", "CPU seconds filling the widget", "bytes of curves to the page", "bytes of the twin")
    found |= {f"long: {name}": float(value) if "seconds" in name else int(value) for name, value in zip(names, told, strict=True)}
    found["long: MB of events"] = round((work / "long" / "events.jsonl").stat().st_size / 1e6, 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", default=["worker", "kernel", "opening"])
    parser.add_argument("--minutes", type=float, default=60.0, help="of hours")
    options = parser.parse_args()
    os.environ["SPARKLAB_CALIBRATION"] = "off"
    os.environ["PYTHONPATH"] = str(ROOT)
    parts: dict[str, Callable[[Path], dict[str, Any]]] = {
        "worker": worker, "kernel": kernel, "opening": opening, "hours": lambda folder: hours(folder, options.minutes),
    }  # fmt: skip
    for name in options.what:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            print(json.dumps({name: parts[name](Path(folder))}, indent=1), flush=True)
    print(json.dumps({"load average": os.getloadavg(), "seconds of CPU": round(sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]), 1)}))


if __name__ == "__main__":
    main()
