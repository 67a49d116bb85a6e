"""The worker as users have it: another process, steered through the directory."""

import json
import os
import re
import signal
import time

import pytest

import sparklab as sl
from sparklab.errors import RunFailed

pytestmark = pytest.mark.slow


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen"
        time.sleep(0.05)


def events(run, kind):
    return [event for line in run.directory.events_path.read_text().splitlines() if (event := json.loads(line))["event"] == kind]


def test_commands_act_and_are_acknowledged(small_recipe, tmp_path):
    run = sl.train(small_recipe(max_steps=5000, epochs=1000, save_every=4000, eval_every=4000), tmp_path / "run", panel=False)
    wait_for(lambda: run.state.step >= 3)
    assert run.status == "running"
    run.checkpoint()
    wait_for(lambda: events(run, "checkpoint"))
    run.sample(["Hello!"])
    wait_for(lambda: any(event["prompt"] == "Hello!" for event in events(run, "sample")))
    run.pause()
    wait_for(lambda: run.status == "paused")
    step = run.state.step
    time.sleep(0.5)
    assert run.state.step == step
    run.resume()
    wait_for(lambda: run.state.step > step)
    run.stop()
    assert run.wait(120).status == "stopped"
    assert [event["name"] for event in events(run, "command")] == ["checkpoint", "sample", "pause", "resume", "stop"]
    assert (run.path / "checkpoints" / f"step-{run.state.step:06d}" / "manifest.json").is_file()
    assert not {"kernels", "is_gradient_checkpointing"} & set(re.findall(r"\w+", run.directory.log_tail())), "nothing that would pass for a reason"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, "stopped"), (signal.SIGKILL, "lost")])
def test_signals(small_recipe, tmp_path, number, status):
    run = sl.train(small_recipe(max_steps=300, epochs=100, save_every=2, eval_every=290), tmp_path / "run", panel=False)
    wait_for(lambda: run.state.step >= 4)
    os.kill(events(run, "started")[0]["pid"], number)
    wait_for(lambda: run.state.is_over)
    assert run.status == status
    if status == "lost":
        with pytest.raises(RunFailed, match="gone without a word"):
            run.wait(5)
    assert run.resume(panel=False).status in ("starting", "running", status)
    wait_for(lambda: run.state.step > 6)
    run.stop()
    run.wait(120)
    assert [event["seq"] for event in map(json.loads, run.directory.events_path.read_text().splitlines())] == list(
        range(len(run.directory.events_path.read_text().splitlines()))
    )


def test_the_workers_own_error_reaches_the_caller(small_recipe, tmp_path):
    run = sl.train(small_recipe(max_length=20, on_long="error"), tmp_path / "run", panel=False)
    with pytest.raises(RunFailed, match="longer than max_length 20"):
        run.wait(120)
    assert "raise max_length" in run.state.fix
