"""Memory that runs out while training: the phase, the figures and the nearest plan are said; or the same update is taken in smaller pieces."""

import json

import pytest
import torch

import sparklab as sl
from sparklab.engine import trainer as engine
from sparklab.errors import RecipeError, RunFailed
from sparklab.run.session import Session

pytestmark = pytest.mark.slow


class Crash(BaseException):
    """The worker's end without a word from it."""


def events(run, kind=None):
    found = [json.loads(line) for line in run.directory.events_path.read_text().splitlines()]
    return [event for event in found if kind is None or event["event"] == kind]


def no_memory(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def nth_call(patch, place, name, number, action=no_memory):
    """Runs ``action`` instead of the ``number``-th call (from 1)."""
    real, calls = getattr(place, name), []

    def counted(*arguments, **options):
        calls.append(1)
        return action() if len(calls) == number else real(*arguments, **options)

    patch.setattr(place, name, counted)


def in_training(patch, first=1):
    """No memory for a forward pass that is to have a backward pass, the ``first``-th of them alone."""
    real, calls = engine.row_loss, []

    def counted(model, *more):
        calls.extend([1] * model.training)
        return no_memory() if model.training and len(calls) == first else real(model, *more)

    patch.setattr(engine, "row_loss", counted)


PHASES = {
    "prepare": lambda patch: patch.setattr("sparklab.run.session.prepare", no_memory),
    "load": lambda patch: patch.setattr("sparklab.run.session.ready_model", no_memory),
    "evaluate": lambda patch: nth_call(patch, engine, "mean_loss", 1), "sample": lambda patch: patch.setattr(Session, "_answer", no_memory),
    "forward": in_training, "backward": lambda patch: nth_call(patch, torch.Tensor, "backward", 3),
    "optimizer": lambda patch: nth_call(patch, torch.optim.AdamW, "step", 3), "save": lambda patch: nth_call(patch, engine.checkpoint, "save_optimizer", 1),
}  # fmt: skip


def test_every_phase_says_where_what_was_planned_and_what_would_fit(quick_recipe, tmp_path, monkeypatch):
    recipe = quick_recipe(max_steps=3, save_every=2, sample_prompts=("Hello!",), held_out=0.05)
    for phase, break_it in PHASES.items():
        with monkeypatch.context() as patch:
            break_it(patch)
            run = sl.train(recipe, tmp_path / phase, inline=True, panel=False)
        assert run.status == "failed", phase
        (failed,) = events(run, "failed")
        assert (failed["error"], failed["phase"]) == ("OutOfMemory", phase)
        assert failed["planned_bytes"] > 1e6 and failed["measured_bytes"] > 1e8 and failed["changes"]
        assert "were planned there" in failed["fact"] and "Tried to allocate 2.00 GiB" in failed["fact"] and "planned at" in failed["fix"]
        with pytest.raises(RunFailed, match="memory ran out"):
            run.wait()
    run = sl.Run.open(tmp_path / "optimizer")
    with pytest.raises(RecipeError, match=r"rank \(16 in this run, 4 asked\) cannot change on the way[\s\S]*recipe.replace\(rank=4\)"):
        run.resume(rank=4, inline=True)
    assert run.resume(checkpoint_layers="all", inline=True, panel=False).status == "finished"
    assert [list(event["what"]) for event in events(run, "changed")] == [["recipe"]] and run.recipe.checkpoint_layers == "all"


@pytest.mark.parametrize("phase", ["forward", "backward", "evaluate"])
def test_smaller_pieces_of_the_same_update(quick_recipe, tmp_path, monkeypatch, phase):
    """The update is made again with half the tokens at once: as many tokens in it, the same loss up to rounding, and no update lost."""
    recipe = quick_recipe(max_steps=4, save_every=2, eval_every=2, retry="smaller", dropout=0.1, micro_batches_per_update=2, micro_batch_tokens=512)
    whole = sl.train(recipe.replace(retry="none"), tmp_path / "whole", inline=True, panel=False)
    with monkeypatch.context() as patch:
        if phase == "evaluate":
            nth_call(patch, engine, "mean_loss", 2)
        elif phase == "forward":
            in_training(patch, 6)
        else:
            nth_call(patch, torch.Tensor, "backward", 6)
        run = sl.train(recipe, tmp_path / "run", inline=True, panel=False)
    assert run.status == "finished"
    (retry,) = events(run, "retry")
    assert retry["phase"] == phase and retry["row_tokens"] < retry["was"] <= 512 and run.state.row_tokens == retry["row_tokens"]
    assert [event["tokens"] for event in events(run, "step")] == [event["tokens"] for event in events(whole, "step")]
    # Dropout is drawn piece by piece, so only what came before is the same to the bit; the first update after it starts from the same weights.
    step = retry["step"]
    assert run.state.losses[:step] == whole.state.losses[:step]
    assert run.state.losses[step] == pytest.approx(whole.state.losses[step], rel=0.05)


def test_smaller_pieces_without_dropout_give_the_same_run_up_to_rounding(quick_recipe, tmp_path, monkeypatch):
    recipe = quick_recipe(max_steps=4, retry="smaller", micro_batches_per_update=2, micro_batch_tokens=512)
    whole = sl.train(recipe, tmp_path / "whole", inline=True, panel=False)
    with monkeypatch.context() as patch:
        nth_call(patch, torch.Tensor, "backward", 4)
        run = sl.train(recipe, tmp_path / "run", inline=True, panel=False)
    assert events(run, "retry")[0]["step"] == 1
    assert run.state.losses == pytest.approx(whole.state.losses, rel=1e-3) and run.state.grad_norms == pytest.approx(whole.state.grad_norms, rel=1e-2)


def test_a_run_that_took_smaller_pieces_resumes_exactly(quick_recipe, tmp_path, monkeypatch):
    """Memory ran out in update 4; a crash in update 6 goes back to update 2, and the smaller pieces come again from update 4 on."""
    from sparklab.run.reporter import Reporter

    recipe = quick_recipe(max_steps=7, save_every=2, retry="smaller", dropout=0.1, micro_batches_per_update=2, micro_batch_tokens=512, keep_checkpoints=9)

    def start(name, patch):
        nth_call(patch, torch.Tensor, "backward", 8)
        return sl.train(recipe, tmp_path / name, inline=True, panel=False)

    with monkeypatch.context() as patch:
        whole = start("whole", patch)
    log = Reporter.on_log

    def log_and_crash(self, args, state, control, **more):
        log(self, args, state, control, **more)
        if state.global_step == 6:
            raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(Reporter, "on_log", log_and_crash)
        with pytest.raises(Crash):
            start("run", patch)
    run = sl.Run.open(tmp_path / "run")
    import shutil

    shutil.rmtree(run.path / "checkpoints" / "step-000004")
    run.resume(inline=True, panel=False)
    assert [event["resumed_from"] for event in events(run, "started")] == [None, 2] and len(events(run, "retry")) == 1
    assert run.state.losses == whole.state.losses and run.state.grad_norms == whole.state.grad_norms
    assert (run.path / "adapter" / "adapter_model.safetensors").read_bytes() == (whole.path / "adapter" / "adapter_model.safetensors").read_bytes()


def test_a_document_is_never_cut_to_make_room(quick_recipe, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(engine, "row_loss", no_memory)
        run = sl.train(quick_recipe(max_steps=2, retry="smaller", held_out=0.0), tmp_path / "run", inline=True, panel=False)
    retries = events(run, "retry")
    sizes = [retries[0]["was"], *(event["row_tokens"] for event in retries)]
    assert sizes == sorted(set(sizes), reverse=True) and len(sizes) >= 2
    assert run.status == "failed" and f"the longest document alone has {sizes[-1]} tokens, and documents are not cut" in run.state.fix
