"""What is asked of a worker while it trains: done, or refused with a reason, and answered within the update in which it arrives."""

import json

import pytest

import sparklab as sl
from sparklab.errors import RecipeError, RunError

pytestmark = pytest.mark.slow


class Crash(BaseException):
    """The worker's end without a word from it."""


@pytest.fixture
def during(monkeypatch):
    """``during(step, action)``: what happens beside the worker while it is in a certain update, once."""
    from sparklab.run.reporter import Reporter

    actions = {}
    obey = Reporter._obey

    def obey_after_acting(self, control):
        for action in actions.pop(self.trainer.state.global_step, []):
            action(self.directory)
        obey(self, control)

    monkeypatch.setattr(Reporter, "_obey", obey_after_acting)
    return lambda step, *action: actions.setdefault(step, []).extend(action)


def events(run, kind=None):
    found = [json.loads(line) for line in run.directory.events_path.read_text().splitlines()]
    return [event for event in found if kind is None or event["event"] == kind]


def send(command, **details):
    return lambda directory: directory.send(command, **details)


def test_every_command_is_answered_in_its_update(quick_recipe, tmp_path, during):
    during(2, send("evaluate"), send("sample", prompts=["Hello!"]), send("checkpoint"))
    during(3, send("resume"), send("sample"), send("learning_rate", learning_rate=-1), send("learning_rate", learning_rate="fast"), send("sample", prompts=[3]))
    during(3, lambda directory: (directory.path / "commands" / "9-x.json").write_text('{"command": "rm -rf \\u001b[31m"}'))
    during(4, send("pause"), send("pause"), send("resume"))
    during(5, send("stop", reason="enough\x1b[31m"))
    run = sl.train(quick_recipe(eval_every=100, save_every=100), tmp_path / "run", inline=True, panel=False)
    answers, step = {}, 0
    for event in events(run):
        step = event["step"] if event["event"] == "step" else step
        if event["event"] == "command":
            answers.setdefault(step + 1, []).append((event["name"], event["refused"], event["detail"]))
    assert answers[2] == [("evaluate", False, ""), ("sample", False, ""), ("checkpoint", False, "")]
    assert [event["step"] for event in events(run, "eval")] == [0, 2] and len(events(run, "sample")) == 1
    assert [event["step"] for event in events(run, "checkpoint")] == [2, 5]
    assert all(refused for _, refused, _ in answers[3]) and len(answers[3]) == 6
    assert {detail for _, _, detail in answers[3]} == {
        "refused: it is not paused", "refused: no prompt was given, and the recipe has no sample_prompts", "refused: there is no command 'rm -rf'",
        "refused: learning_rate is -1; it must be a number above 0", "refused: learning_rate is fast; it must be a number above 0",
        "refused: prompts must be texts",
    }  # fmt: skip
    assert answers[4] == [("pause", False, ""), ("pause", True, "refused: it is paused already"), ("resume", False, "")]
    assert (run.status, run.state.step, run.state.reason) == ("stopped", 5, "enough")
    assert set(answers) == {2, 3, 4, 5}


def test_what_cannot_be_is_refused_before_it_is_sent(quick_recipe, tmp_path, during):
    run = sl.train(quick_recipe(max_steps=2, held_out=0.0), tmp_path / "run", inline=True, panel=False)
    with pytest.raises(RecipeError, match="learning_rate is 0"):
        run.set_learning_rate(0)
    for ask in (run.evaluate_now, run.stop, lambda: run.set_learning_rate(1e-4)):
        with pytest.raises(RunError, match="no worker is at work"):
            ask()
    assert not list((run.path / "commands").iterdir())


def test_evaluating_where_nothing_is_held_out_is_refused(quick_recipe, tmp_path, during):
    during(1, send("evaluate"))
    run = sl.train(quick_recipe(max_steps=2, held_out=0.0), tmp_path / "run", inline=True, panel=False)
    assert [(event["refused"], event["detail"]) for event in events(run, "command")] == [(True, "refused: this run held nothing out to evaluate on")]
    assert run.status == "finished"


def test_a_changed_learning_rate_scales_the_schedule_and_survives_a_crash(quick_recipe, tmp_path, during, monkeypatch):
    """Changed in update 5, crashed in update 7, resumed from update 4, where nobody had asked yet: the change comes again at its update."""
    recipe = quick_recipe(max_steps=9, save_every=4, eval_every=100, schedule="linear", warmup_share=0.0, learning_rate=1e-3)
    plain = [1e-3 * (9 - step) / 9 for step in range(9)]
    during(5, send("learning_rate", learning_rate=4e-3))
    whole = sl.train(recipe, tmp_path / "whole", inline=True, panel=False)
    expected = plain[:5] + [4 * rate for rate in plain[5:]]
    assert [event["learning_rate"] for event in events(whole, "step")] == pytest.approx(expected)
    assert whole.state.rate_changes == [{"step": 5, "learning_rate": 4e-3, "was": 1e-3}]

    def crash(directory):
        raise Crash

    during(5, send("learning_rate", learning_rate=4e-3))
    during(7, crash)
    with pytest.raises(Crash):
        sl.train(recipe, tmp_path / "run", inline=True, panel=False)
    run = sl.Run.open(tmp_path / "run").resume(inline=True, panel=False)
    assert [event["resumed_from"] for event in events(run, "started")] == [None, 4]
    assert run.state.losses == whole.state.losses and run.state.learning_rates == whole.state.learning_rates
    assert len(events(run, "learning_rate")) == 1, "it is said once"
