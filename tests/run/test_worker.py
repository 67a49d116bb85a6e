"""The worker end to end, in this process: what it writes, that it stops and goes on exactly, and that plain PEFT reads the result."""

import hashlib
import html
import json

import pytest
import torch
from safetensors.torch import load_file
from support import run_cli, stop_after

import sparklab as sl
from sparklab.errors import RunError, RunFailed, RunNotFound

pytestmark = pytest.mark.slow


def events(run, kind=None):
    found = [json.loads(line) for line in run.directory.events_path.read_text().splitlines()]
    return [event for event in found if kind is None or event["event"] == kind]


def test_a_run_tells_its_whole_story(small_recipe, tmp_path):
    recipe = small_recipe(answer_held_out=4, sample_prompts=("Hello!",), save_every=3, eval_every=4)
    run = sl.train(recipe, tmp_path / "run", inline=True, panel=False)
    story = events(run)
    assert [event["seq"] for event in story] == list(range(len(story)))
    assert run.status == "finished"
    steps = events(run, "step")
    assert [event["step"] for event in steps] == list(range(1, 9))
    assert all(event["steps"] == 8 and event["seconds"] > 0 and 0 < event["tokens"] <= 256 for event in steps)
    assert steps[0]["learning_rate"] == 0
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert [event["step"] for event in events(run, "eval")] == [0, 4, 8]
    assert [event.get("n") for event in events(run, "eval")] == [4, None, 4]
    assert [event["step"] for event in events(run, "checkpoint")] == [3, 6, 8]
    assert [event["step"] for event in events(run, "sample")] == [0, 4, 8]
    (finished,) = events(run, "finished")
    assert finished["tokens"] == sum(event["tokens"] for event in steps)
    assert finished["peak_bytes"] > 2**27  # a process with torch in it
    assert events(run, "model")[0]["trainable_parameters"] == sum(
        tensor.numel() for tensor in load_file(run.path / "adapter" / "adapter_model.safetensors").values()
    )
    assert not any(file.suffix in {".bin", ".pt", ".pth", ".pkl"} for file in run.path.rglob("*"))
    with pytest.raises(RunError, match="finished"):
        run.resume(inline=True)


def test_a_run_that_ends_before_max_steps_says_why_wherever_one_looks(quick_recipe, tmp_path):
    run = sl.train(quick_recipe(micro_batch_tokens=8192, max_steps=2, epochs=1.0), tmp_path / "run", inline=True, panel=False)
    said = "data: max_steps is 2, and the run ends after 1 update: 64 documents fill 1 row of 8,192 tokens; epochs=2 makes 2"
    assert (run.state.step, run.state.steps, run.to_dict()["warnings"]) == (1, 1, [said])
    told = run_cli("watch", str(run.path), "--json", cwd=tmp_path)
    assert json.loads(told.stdout)["warnings"] == [said] and f"  {said}\n" in told.stderr
    assert said in html.unescape(run.report(tmp_path / "run.html").read_text())


def test_the_adapter_is_plain_pefts(small_recipe, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sparklab.model.hub import TINY_PATH

    run = sl.train(small_recipe(), tmp_path / "run", inline=True, panel=False)
    base = AutoModelForCausalLM.from_pretrained(TINY_PATH, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(run.path / "adapter")("Send 3 red lamps to Nora.", return_tensors="pt").input_ids
    with torch.no_grad():
        before = base(ids).logits
        tuned = PeftModel.from_pretrained(base, run.path / "adapter")
        after = tuned(ids).logits
        with tuned.disable_adapter():
            off = tuned(ids).logits
    assert torch.equal(before, off)
    assert (after - before).abs().max() > 0.01


@pytest.mark.parametrize(
    ("method", "stop_at", "changes"),
    [("lora", 2, {"dropout": 0.1, "dora": True, "rank_stabilized": True}), ("lora", 9, {"micro_batches_per_update": 2}), ("full", 5, {}), ("qlora", 3, {})],
)
def test_resume_is_exact(small_recipe, tmp_path, monkeypatch, method, stop_at, changes):
    """Stopped (in the first or second pass) and resumed, a run ends with the bits of one that was never stopped."""
    recipe = small_recipe(method, max_steps=10, epochs=20, eval_every=2, **changes)
    whole = sl.train(recipe, tmp_path / "whole", inline=True, panel=False)
    with monkeypatch.context() as patch:
        stop_after(patch, stop_at)
        run = sl.train(recipe, tmp_path / "stopped", inline=True, panel=False)
    assert (run.status, run.state.step) == ("stopped", stop_at)
    assert run.state.reason == "asked to stop"
    run.resume(inline=True, panel=False)
    assert run.status == "finished"
    for field in ("step", "loss", "grad_norm", "learning_rate", "tokens"):
        assert [event[field] for event in events(run, "step")] == [event[field] for event in events(whole, "step")], field
    assert [event["loss"] for event in events(run, "eval")] == [event["loss"] for event in events(whole, "eval")]
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for one in (run, whole) for file in one.directory.result_path.glob("*.safetensors")]
    assert len(digests) == 2
    assert len(set(digests)) == 1


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(small_recipe, tmp_path, monkeypatch):
    recipe = small_recipe(save_every=2, keep_checkpoints=3)
    whole = sl.train(recipe, tmp_path / "whole", inline=True, panel=False)
    stop_after(monkeypatch, 5)
    run = sl.train(recipe, tmp_path / "run", inline=True, panel=False)
    monkeypatch.undo()
    damaged = run.path / "checkpoints" / "step-000005" / "optimizer.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    run.resume(inline=True, panel=False)
    assert "step-000005 is damaged" in events(run, "warning")[0]["message"]
    assert [event["resumed_from"] for event in events(run, "started")] == [None, 4]
    assert run.state.losses == whole.state.losses


def test_a_nan_fails_the_run_and_leaves_no_result(small_recipe, tmp_path, monkeypatch):
    from sparklab.engine import trainer

    monkeypatch.setattr(trainer, "chunked_cross_entropy", lambda hidden, *_, **__: hidden.sum() * float("nan"))
    run = sl.train(small_recipe(held_out=0.0), tmp_path / "run", inline=True, panel=False)
    assert run.status == "failed"
    assert "loss nan" in run.state.reason
    assert not (run.path / "adapter").exists()
    with pytest.raises(RunFailed, match="lower learning_rate"):
        run.wait()


def test_a_full_disk_is_said_and_loses_no_checkpoint(small_recipe, tmp_path, monkeypatch):
    from sparklab.engine import checkpoint

    save = checkpoint.save_optimizer

    def full(optimizer, folder):
        if "000004" in folder.name:
            raise OSError(28, "No space left on device")
        save(optimizer, folder)

    monkeypatch.setattr(checkpoint, "save_optimizer", full)
    run = sl.train(small_recipe(save_every=2), tmp_path / "run", inline=True, panel=False)
    assert (run.status, events(run, "failed")[0]["error"]) == ("failed", "DiskFull")
    assert [file.name for file in (run.path / "checkpoints").iterdir()] == ["step-000002"]
    monkeypatch.undo()
    assert run.resume(inline=True, panel=False).status == "finished"


def test_two_workers_never_share_a_run(small_recipe, tmp_path):
    run = sl.train(small_recipe(), tmp_path / "run", inline=True, panel=False)
    held = run.directory.lock()
    with pytest.raises(RunError, match="a worker is at work"):
        run.directory.lock()
    import os

    os.close(held)
    with pytest.raises(RunNotFound, match="runs beside it: run"):
        sl.Run.open(tmp_path / "rum")


def test_evaluating_before_training_changes_nothing_qlora_learns(small_recipe, tmp_path):
    """bitsandbytes on a CPU repacks 4-bit weights at the first forward without gradients; that path must stay off."""
    with_eval = sl.train(small_recipe("qlora"), tmp_path / "a", inline=True, panel=False)
    without = sl.train(small_recipe("qlora", held_out=0.0, data=with_eval.recipe.data), tmp_path / "b", inline=True, panel=False)
    assert len(events(with_eval, "eval")) > len(events(without, "eval")) == 0
    assert with_eval.state.losses == without.state.losses
