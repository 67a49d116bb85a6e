"""Going on: from the last good checkpoint, with what the run was started with or what was accepted by name, and with no update made twice."""

import json
from pathlib import Path

import pytest

import sparklab as sl
from sparklab.errors import RunChanged
from sparklab.run.events import EventReader, story

pytestmark = pytest.mark.slow


class Crash(BaseException):
    """The worker's end without a word from it."""


def events(run, kind=None):
    found = [json.loads(line) for line in run.directory.events_path.read_text().splitlines()]
    return [event for event in found if kind is None or event["event"] == kind]


def told(run):
    """The story of a run without what differs between any two: clocks, speeds, and where in the file it stands."""
    differing = {"seq", "time", "seconds", "wait_seconds", "tokens_per_second", "peak_bytes"}
    return [{name: value for name, value in event.items() if name not in differing} for event in story(EventReader(run.directory.events_path).read_new())]


def test_a_changed_data_file_is_refused_or_accepted_by_name(quick_recipe, tmp_path, monkeypatch):
    from support import stop_after

    stop_after(monkeypatch, 3)
    run = sl.train(quick_recipe(), tmp_path / "run", inline=True, panel=False)
    monkeypatch.undo()
    data = Path(run.recipe.data)
    first, rest = data.read_text().split("\n", 1)
    data.write_text(f"{rest}{first}\n")  # the same records, in another order
    with pytest.raises(RunChanged, match=r"data: .* has other content of the same size[\s\S]*accept=\(\"data\",\)"):
        run.resume(inline=True, panel=False)
    assert len(events(run, "started")) == 1 and run.status == "stopped" and not run.directory.is_alive
    assert run.resume(accept=("data",), inline=True, panel=False).status == "finished"
    (changed,) = events(run, "changed")
    assert list(changed["what"]) == ["data"] and any("data" in note["text"] for note in run.state.messages)


def test_what_fails_after_the_last_update_costs_no_update(quick_recipe, tmp_path, monkeypatch):
    from sparklab.run.session import Session

    whole = sl.train(quick_recipe(), tmp_path / "whole", inline=True, panel=False)
    with monkeypatch.context() as patch:
        patch.setattr(Session, "_save", lambda self: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        run = sl.train(quick_recipe(), tmp_path / "run", inline=True, panel=False)
    assert run.status == "failed" and run.state.step == 8
    run.resume(inline=True, panel=False)
    assert run.status == "finished" and events(run, "started")[1]["resumed_from"] == 8
    assert len(events(run, "step")) == 8, "none was made twice"
    assert told(run) == told(whole)
    files = [(one.path / "adapter" / "adapter_model.safetensors").read_bytes() for one in (run, whole)]
    assert files[0] == files[1]


def test_the_best_checkpoint_stays(small_recipe, tmp_path):
    """A learning rate that ruins the model: the best held-out loss comes early, and its checkpoint outlives the newer ones."""
    run = sl.train(
        small_recipe(max_steps=12, learning_rate=0.3, schedule="constant", eval_every=1, save_every=4, keep_checkpoints=1, keep_best=True, warmup_share=0.0),
        tmp_path / "run", inline=True, panel=False,
    )  # fmt: skip
    losses = {event["step"]: event["loss"] for event in events(run, "eval")}
    best = min((step for step in losses if 0 < step < 12), key=losses.get)
    kept = sorted(int(entry.name.removeprefix("step-")) for entry in (run.path / "checkpoints").iterdir())
    assert losses[best] < losses[0] and kept == sorted({best, 12})
    saved = {entry["step"]: entry["held_out_loss"] for entry in run.state.checkpoints}
    assert saved[best] == losses[best]


def test_a_crash_between_two_checkpoints_is_told_again_under_the_same_numbers(quick_recipe, tmp_path, monkeypatch):
    """The diary keeps what the crash undid; the story that counts, with its numbers, is that of a run that never crashed."""
    from sparklab.run.reporter import Reporter

    recipe = quick_recipe(save_every=3, eval_every=2, sample_prompts=("Hello!",), dropout=0.1)
    whole = sl.train(recipe, tmp_path / "whole", inline=True, panel=False)
    log = Reporter.on_log

    def log_and_crash(self, args, state, control, **more):
        log(self, args, state, control, **more)
        if state.global_step == 5:
            raise Crash

    monkeypatch.setattr(Reporter, "on_log", log_and_crash)
    with pytest.raises(Crash):
        sl.train(recipe, tmp_path / "run", inline=True, panel=False)
    monkeypatch.setattr(Reporter, "on_log", log)
    run = sl.Run.open(tmp_path / "run").resume(inline=True, panel=False)
    assert [event["nth"] for event in events(run, "started")] == [0, 7]  # before: eval and sample at 0, steps 1 and 2, eval and sample at 2, step 3
    assert [event["seq"] for event in events(run)] == list(range(len(events(run))))
    assert [event["nth"] for event in story(EventReader(run.directory.events_path).read_new())] == list(range(len(told(run))))
    assert told(run) == told(whole) and len(events(run, "step")) == 8 + 2
    assert run.state.losses == whole.state.losses and run.state.samples == whole.state.samples and run.state.evals == whole.state.evals
