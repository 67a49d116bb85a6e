"""A handful of the runs that benchmarks/torture.py kills: none lost, none different."""

import runpy
import subprocess
import sys

import pytest
from support import ROOT

SCRIPT = ROOT / "benchmarks" / "torture.py"


@pytest.mark.slow
def test_killed_runs_end_as_if_nothing_had_been(tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--runs", "6", "--seed", "7", "--variants", "2", "--write", str(tmp_path / "torture.md")],
        capture_output=True, text=True, check=False, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "**6 runs, " in (tmp_path / "torture.md").read_text() and "0 lost, 0 different" in done.stdout


def test_the_figures_in_the_benchmarks_are_of_enough_runs():
    text = (ROOT / "benchmarks" / "torture.md").read_text()
    runs = int(text.split("**")[1].split(" runs")[0])
    assert runs >= 60 and "0 lost, 0 different" in text


@pytest.mark.slow
def test_a_run_that_differs_is_found(tmp_path, monkeypatch):
    """The comparison itself: one bit of one loss, one number, one byte of the weights."""
    told = runpy.run_path(str(SCRIPT), run_name="torture")["told"]
    import json

    for folder in ("a", "b", "c", "d"):
        (tmp_path / folder / "adapter").mkdir(parents=True)
        (tmp_path / folder / "adapter" / "x.safetensors").write_bytes(b"weights" if folder != "c" else b"wreights")
        loss = 1.0000000000000002 if folder == "b" else 1.0
        events = [{"event": "started", "seq": 0, "nth": 0}, {"event": "step", "seq": 1, "nth": 0, "time": folder, "loss": loss}]
        if folder == "d":
            events.append({"event": "step", "seq": 3, "nth": 1})
        (tmp_path / folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    assert told(tmp_path / "a") == told(tmp_path / "a") != told(tmp_path / "b")
    assert told(tmp_path / "a")[0] == told(tmp_path / "c")[0] and told(tmp_path / "a")[1] != told(tmp_path / "c")[1]
    with pytest.raises(AssertionError, match="gap"):
        told(tmp_path / "d")
