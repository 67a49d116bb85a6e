"""A run whose loss becomes NaN: what its diary says, and that it can be resumed to the end it would have had."""

import json

import pytest
import torch

import sparklab as sl
from sparklab.engine import trainer
from sparklab.errors import RunFailed


def events(run, kind):
    return [event for event in map(json.loads, run.directory.events_path.read_text().splitlines()) if event["event"] == kind]


def test_a_nan_ends_the_run_and_the_run_can_go_on(small_recipe, tmp_path, monkeypatch):
    recipe = small_recipe(max_steps=4, save_every=3, held_out=0.0)
    clean = sl.train(recipe, tmp_path / "clean", inline=True, panel=False)
    plain, calls = trainer.row_loss, []

    def third_is_nan(*arguments, **options):
        calls.append(None)
        return plain(*arguments, **options) * (torch.nan if len(calls) == 3 else 1.0)

    monkeypatch.setattr(trainer, "row_loss", third_is_nan)
    run = sl.train(recipe, tmp_path / "run", inline=True, panel=False)
    assert run.status == "failed"
    with pytest.raises(RunFailed, match="update 3: the loss is not finite"):
        run.wait()
    assert [event["step"] for event in events(run, "step")] == [1, 2]
    (warning,) = [event for event in events(run, "warning") if event.get("kind") == "nonfinite"]
    assert warning["step"] == 3 and len(warning["rows"]) == 1
    assert [event["step"] for event in events(run, "checkpoint")] == [2]
    assert "skip_bad_updates" in events(run, "failed")[0]["fix"]
    run.resume(inline=True, panel=False)
    assert run.status == "finished"
    assert [event["loss"] for event in events(run, "step")] == [event["loss"] for event in events(clean, "step")]
