"""The guard beside a real worker: what it leaves in the directory, what panels read of it, and that the run goes on to the same bits."""

import json
import os
import time

import pytest

import sparklab as sl
from sparklab.errors import DoesNotFit, RecipeError, RunFailed
from sparklab.run import guard
from sparklab.run.directory import RunDirectory
from sparklab.run.state import RunState
from sparklab.units import GIB

SPARK = {"name": "t", "chip": "t", "memory_bytes": 120 * GIB, "unified": True, "reserve_bytes": 8 * GIB}


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """What the guard takes for /proc: ``fake(gib)`` sets what is available of 120."""
    folder = tmp_path / "proc"
    folder.mkdir()
    monkeypatch.setenv(guard.PROC, str(folder))

    def available(gib):
        (folder / "new").write_text(f"MemTotal: {120 * 2**20} kB\nMemAvailable: {int(gib * 2**20)} kB\n")
        os.replace(folder / "new", folder / "meminfo")

    available(50)
    return available


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen"
        time.sleep(0.02)


def events(run):
    return [json.loads(line) for line in run.directory.events_path.read_text().splitlines()]


def test_floors(fake):
    def gib(box=SPARK, **changes):
        found = guard.floors_of(sl.Recipe(model="tiny", data="x", **changes), sl.Box(**box))
        return found and (found.soft_bytes / GIB, found.hard_bytes / GIB)

    assert gib() == (8, 4)  # the soft one is what every plan leaves free
    assert gib({**SPARK, "unified": False}) == (2, 1)
    assert gib(soft_floor_gib=16) == (16, 4)
    assert gib(soft_floor_gib=3) == (3, 1.5)
    assert gib(hard_floor_gib=12) == (12, 12)
    assert gib(soft_floor_gib=16, hard_floor_gib=12) == (16, 12)
    assert gib(guard=False) is None
    assert guard.last_floor(sl.Recipe(model="tiny", data="x"), sl.Box(**SPARK)) == guard.Floors(4 * GIB, 4 * GIB)
    assert guard.last_floor(sl.Recipe(model="tiny", data="x", guard=False), sl.Box(**SPARK)) is None
    fake(0)
    assert gib() == (8, 4)


def test_floors_within_a_container_go_by_its_limit(fake, tmp_path, monkeypatch):
    mounted = tmp_path / "sys" / "fs" / "cgroup"
    mounted.mkdir(parents=True)
    (tmp_path / "proc").mkdir(exist_ok=True)
    (tmp_path / "proc" / "meminfo").write_text(f"MemTotal: {120 * 2**20} kB\nMemAvailable: {90 * 2**20} kB\n")
    (mounted / "memory.max").write_text(str(25 * GIB))
    (mounted / "memory.current").write_text(str(5 * GIB))
    monkeypatch.setenv(guard.PROC, str(tmp_path / "proc"))

    def floors(**changes):
        return guard.floors_of(sl.Recipe(model="tiny", data="x", **changes), sl.Box(**SPARK))

    assert floors() == guard.Floors(8 * GIB, 4 * GIB, 1 * GIB, 0.5 * GIB)  # the box freezes at its end, a container only ends
    assert floors(soft_floor_gib=6) == guard.Floors(6 * GIB, 3 * GIB, 6 * GIB, 0.5 * GIB)


def test_no_guard_where_the_system_tells_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv(guard.PROC, str(tmp_path))
    assert guard.floors_of(sl.Recipe(model="tiny", data="x"), sl.Box(**SPARK)) is None
    with guard.watching(tmp_path, None, group=False):
        pass


def test_floors_that_cannot_be_are_named():
    with pytest.raises(RecipeError, match=r"(?s)soft_floor_gib is -1.*hard_floor_gib is 'x'"):
        sl.Recipe(model="tiny", data="x", soft_floor_gib=-1, hard_floor_gib="x")
    with pytest.raises(RecipeError, match="ended before it could save"):
        sl.Recipe(model="tiny", data="x", soft_floor_gib=4, hard_floor_gib=8)


@pytest.mark.slow
def test_both_floors_and_the_same_bits_in_the_end(small_recipe, tmp_path, fake):
    recipe = small_recipe(max_steps=40, epochs=1000, save_every=15, eval_every=1000)
    alone = sl.train(recipe.replace(guard=False), tmp_path / "alone", inline=True, panel=False)
    loading = [event for event in events(alone) if event["event"] == "phase" and event.get("phase") == "load" and event.get("detail")]
    assert loading[-1]["share"] == 1.0 and " of " in loading[-1]["detail"]
    run = sl.train(recipe, tmp_path / "run", panel=False)
    wait_for(lambda: run.state.step >= 2)
    fake(1.6)  # of 120 GiB a box that is not unified keeps 2, and 1 at the hard floor
    wait_for(lambda: run.state.is_over)
    soft = run.state
    assert (soft.status, soft.ended_by) == ("stopped", "guard")
    assert soft.reason.startswith("1.6 GiB of memory were left, below the guard's soft floor of 2 GiB")
    assert soft.fix
    assert soft.checkpoints[-1]["step"] == soft.step < 40
    (started,) = (event for event in events(run) if event["event"] == "started")
    assert (started["soft_floor_bytes"], started["hard_floor_bytes"]) == (2 * GIB, GIB)
    assert [event for event in events(run) if event["event"] == "memory"][-1]["floor_bytes"] == 2 * GIB
    (warning,) = (event for event in events(run) if event["event"] == "warning" and event.get("kind") == "guard")
    assert warning["kind"] == "guard" and warning["numbers"]["soft_floor_bytes"] == 2 * GIB
    fake(50)
    run.resume(panel=False)
    wait_for(lambda: run.state.step >= soft.step + 2)
    fake(0.5)
    wait_for(lambda: run.state.is_over)
    hard = run.state
    assert (hard.status, hard.ended_by) == ("lost", "guard")
    assert hard.reason.startswith("the guard ended the worker: 0.5 GiB of memory were left, below the guard's hard floor of 1 GiB")
    with pytest.raises(RunFailed, match="the guard ended the worker") as caught:
        run.wait(5)
    assert "SIGKILL" not in caught.value.fact  # the reason is known: no guess at the kernel's
    fake(50)
    run.resume(panel=False).wait(120)
    assert run.status == "finished" and run.state.ended_by == ""
    assert [event["event"] for event in events(run)].count("started") == 3
    assert "the guard ended the last worker" in [event for event in events(run) if event.get("kind") == "guard"][-1]["message"]
    assert not (run.path / guard.LEFT).exists()
    assert run.state.losses == alone.state.losses
    file = "adapter/adapter_model.safetensors"
    assert (run.path / file).read_bytes() == (alone.path / file).read_bytes()


def test_what_a_stranger_left_is_words_and_nothing_else(small_recipe, tmp_path):
    directory = RunDirectory.create(tmp_path / "run", small_recipe(), {}, {})
    assert directory.state.status == "lost" and "guard" not in directory.state.reason
    for content in ("", "[]", "{}", '{"numbers": 3}', "[" * 100000, '{"numbers": {}, "reason": "' + "x" * 2**17 + '"}'):
        (directory.path / guard.LEFT).write_text(content)
        assert guard.left_behind(directory.path) is None
    (directory.path / guard.LEFT).write_text('{"numbers": {}, "reason": ["odd"]}')
    assert directory.state.reason == "the guard ended the worker: ['odd']"
    (directory.path / guard.LEFT).unlink()
    (tmp_path / "secret").write_text('{"numbers": {}, "reason": "secret"}')
    (directory.path / guard.LEFT).symlink_to(tmp_path / "secret")
    assert guard.left_behind(directory.path) is None


def test_a_state_tells_who_stopped_it():
    state = RunState()
    state.add({"event": "started", "seq": 0, "time": 1.0})
    state.add({"event": "stopped", "seq": 1, "time": 2.0, "reason": "r", "by": "guard", "fix": "f"})
    assert (state.status, state.ended_by, state.reason, state.fix) == ("stopped", "guard", "r", "f")
    state.add({"event": "started", "seq": 2, "time": 3.0})
    assert (state.status, state.ended_by) == ("running", "")


def test_a_rehearsal_that_the_guard_ended_says_so(tmp_path):
    from sparklab.run.rehearsal import _death

    (tmp_path / guard.LEFT).write_text('{"numbers": {}, "reason": "3 GiB of memory were left"}')
    error = _death(sl.plan("tiny", method="lora").best(), "train", "", -9, tmp_path / "log.txt")
    assert error.fact == "the guard ended the rehearsal in the phase 'train': 3 GiB of memory were left"
    assert "micro_batch_tokens" in error.fix


def test_a_floor_that_the_plan_would_go_below_is_refused(small_recipe, tmp_path):
    box = sl.Box(**SPARK, available_bytes=100 * GIB)
    floor = sl.Recipe(model="tiny", data="x", soft_floor_gib=16)
    guard.check_plan(floor, box, 84 * GIB)
    with pytest.raises(DoesNotFit, match="leaves 15 GiB of memory free, less than soft_floor_gib, 16 GiB") as caught:
        guard.check_plan(floor, box, 85 * GIB)
    assert caught.value.fix.startswith("soft_floor_gib of at most 15,")
    guard.check_plan(floor.replace(guard=False), box, 85 * GIB)
    guard.check_plan(floor.replace(soft_floor_gib=None), box, 99 * GIB)
    guard.check_plan(floor, sl.Box(**{**SPARK, "unified": False}, available_bytes=100 * GIB), 99 * GIB)
    guard.check_plan(floor, sl.Box(**SPARK), 99 * GIB)  # a profile: nobody knows what is available
    with pytest.raises(DoesNotFit, match="the guard would stop the run"):
        sl.train(small_recipe(soft_floor_gib=10_000), tmp_path / "run", panel=False)
    assert not (tmp_path / "run").exists()
