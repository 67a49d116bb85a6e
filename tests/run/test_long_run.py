"""The long run of benchmarks/long_run.py, short: what must not grow does not. (How fast it opens is a figure of the benchmark, not of a test.)"""

import runpy

import pytest
from support import ROOT

from sparklab.run.events import EventReader


@pytest.mark.slow
def test_what_a_long_run_must_not_let_grow(tmp_path):
    script = runpy.run_path(str(ROOT / "benchmarks" / "long_run.py"), run_name="long_run")
    run = script["directory"](tmp_path)
    parts = script["tell"](run, 8000, parts=4)
    assert [part["step"] for part in parts] == [2000, 4000, 6000, 8000]
    assert max(part["bytes"] for part in parts) < 1.1 * min(part["bytes"] for part in parts) < 330
    assert parts[-1]["rss"] - parts[0]["rss"] < 24 * 2**20, "six thousand updates take less than 4 KiB each, here with a panel's series"
    events = list(EventReader(run.events_path).read_new())
    assert sum(event["event"] == "memory" for event in events) < 400 and sum(event["event"] == "step" for event in events) == 8000
    script["opening"](run)


def test_the_figures_are_of_a_hundred_thousand_updates():
    text = (ROOT / "benchmarks" / "long_run.md").read_text()
    seconds = float(text.split("added up in ")[1].split(" s")[0])
    assert "--steps 100000" in text and seconds < 1.0
