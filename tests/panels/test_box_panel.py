"""The box panel: one bar whose parts sum to the pool, the same words live, still and in a terminal, and nothing done while nobody looks."""

import io
import json
import re
import threading
import time
import warnings
from types import SimpleNamespace

import pytest
from scenes import assert_inert
from support import run_cli

import sparklab as sl
from sparklab.box.doctor import Finding
from sparklab.box.meter import MemorySnapshot
from sparklab.box.pool import Holder, Pool, read_pool
from sparklab.panels import box_view
from sparklab.panels.box_panel import BoxPanel, follow
from sparklab.units import GIB, NA

SPARK = sl.Box.profile("dgx-spark")
HOSTILE = "<img src=x onerror=alert(1)>\x1b[31m"
MEMORY = {"total": 120, "available": 14, "free": 2, "cached": 12, "swap_used": 1}
BUSY = Pool(
    memory=MemorySnapshot(**{f"{name}_bytes": size * GIB for name, size in MEMORY.items()}, pressure_percent=3.2),
    holders=(Holder("run chat-1", 7, 80 * GIB), Holder("vllm" + HOSTILE, 9, 20 * GIB)),
    rest_bytes=6 * GIB,
    reserve_bytes=8 * GIB,
)


def test_the_bar_closes_and_the_line_is_the_reserve():
    seen = box_view.view(SPARK, BUSY, [15.0, NA, 14.0])
    json.dumps(seen, allow_nan=False)
    assert sum(part["gib"] for part in seen["segments"]) == pytest.approx(seen["scale"]) == 120
    assert (seen["line"], seen["level"], seen["trail"]) == (112, "warn", [15.0, None, 14.0])
    assert [part["hatched"] for part in seen["segments"]] == [False, False, False, True, False]
    assert seen["segments"][0]["colour"] != seen["segments"][1]["colour"]  # one's own run stands out


def test_twin_and_terminal_say_the_same_and_let_nothing_through():
    seen = box_view.view(SPARK, BUSY)
    content, text = box_view.twin_html(seen, "home"), box_view.text(seen)
    assert_inert(content, "div", "span", "b", "img")
    for words in ("Tight", "14 GiB available", "run chat-1", "80.0 GiB", "3.2 % of the time"):
        assert words in content and words in text
    assert "\x1b" not in text and "8 GiB kept free" in content
    assert text.splitlines()[2].count("█") == pytest.approx(text.splitlines()[3].count("█") * 4, abs=3)


def test_what_the_doctor_finds_stands_below():
    findings = [Finding("swap", "warning", "8 GiB of swap" + HOSTILE, "sudo swapoff -a"), Finding("torch", "fault", "a CPU-only torch beside a GPU")]
    seen = box_view.view(SPARK, BUSY, findings=findings)
    content = box_view.twin_html(seen, "")
    assert_inert(content, "div", "span", "b", "img")
    assert "sudo swapoff -a" in content and "a CPU-only torch" in content and "\x1b" not in json.dumps(seen["findings"])


def test_an_unknown_pool_is_said_to_be_unknown(tmp_path):
    seen = box_view.view(SPARK, read_pool(8 * GIB, tmp_path))
    content = box_view.twin_html(seen, "")
    assert "Unknown" in content and "<img" not in content and "nan" not in content + box_view.text(seen)


@pytest.fixture
def panel(monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # ipywidgets and anywidget, on import
        made = BoxPanel(SPARK)
        monkeypatch.setattr("sparklab.panels.resident.in_kernel", lambda: True)
        monkeypatch.setattr("IPython.display.display", lambda *_, **__: SimpleNamespace(update=lambda *_, **__: None))
        yield made
    made.widget.close()


def test_nothing_is_done_while_nobody_looks(panel, monkeypatch):
    monkeypatch.setattr("sparklab.panels.resident.LOOKING_SECONDS", 0.3)
    panel.every_seconds = 0.01
    monkeypatch.setattr(panel, "_examine", lambda: None)
    looked = threading.Event()
    panel._ipython_display_()
    panel.widget.observe(lambda _change: looked.set(), "view")
    assert not looked.wait(0.3)
    panel._hear(panel.widget, {"looking": True}, [])
    assert looked.wait(20)
    deadline = time.monotonic() + 20
    while panel._looked_at.is_set() and time.monotonic() < deadline:
        time.sleep(0.01)
    looks = len(panel.widget.view["trail"])
    time.sleep(0.2)
    assert len(panel.widget.view["trail"]) == looks  # away again
    panel._hear(panel.widget, "nonsense", [])
    assert not panel._looked_at.is_set()


def test_a_terminal_draws_it_in_place(monkeypatch):
    rounds = iter(range(3))

    def rest(_seconds):
        if next(rounds) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("sparklab.panels.box_panel.time.sleep", rest)
    stream = io.StringIO()
    with pytest.raises(KeyboardInterrupt):
        follow(BoxPanel(SPARK), stream)
    drawn = re.split(r"\x1b\[\d+F", stream.getvalue())
    assert len(drawn) == 3 and all("everything else" in part for part in drawn)


def test_from_the_shell():
    found = json.loads(run_cli("monitor", "--json").stdout)
    assert found["total_bytes"] > found["available_bytes"] > 0 and found["pressure"] in ("good", "warn", "bad")
    assert "page cache, given back when asked" in run_cli("monitor", "--once").stdout
