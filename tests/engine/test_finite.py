"""A loss or gradient that is not finite: the update is not made, the rows are named, adapter, moments and checkpoints are as before."""

import math

import pytest
import torch
from family_configs import SMALL
from transformers import PrinterCallback, TrainerCallback
from whole_step import BOX, base, documents, recipe_of

from sparklab.data.dataset import make_row
from sparklab.engine import checkpoint
from sparklab.engine.fast import ready_model
from sparklab.engine.trainer import PackedTrainer
from sparklab.errors import RunFailed
from sparklab.model.load import causal_lm

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers has opinions on token numbers and rotary factors of configs this small
BAD = 7
"""A token that makes the model fail: no document holds it by chance."""


class Rows(list):
    """Rows that know their lines: row r is lines 10 r + 1 and 10 r + 2."""

    def lines(self, row):
        return (10 * row + 1, 10 * row + 2)


class Notes(TrainerCallback):
    """What the trainer tells."""

    def __init__(self):
        self.losses, self.told = [], []

    def on_log(self, args, state, control, logs=None, **_):
        if "loss" in logs:
            self.losses.append(logs["loss"])

    def on_bad_update(self, bad, ends):
        self.told.append((bad, ends))


def rows_with(bad, count=12):
    """One document a row; token BAD is in the rows ``bad`` alone."""
    told = documents(lengths=(24,) * count)
    for number, document in enumerate(told):
        document.input_ids[:] = [token if token != BAD else 8 for token in document.input_ids]
        if number in bad:
            document.input_ids[3] = BAD
    return Rows(make_row([document]) for document in told)


def poison(model, how):
    """Makes the token BAD give an infinite hidden state, or an infinite gradient of the first layer's output."""

    def forward(module, arguments, keywords, output):
        ids = keywords["input_ids"]
        if not (ids == BAD).any():
            return None
        state = output.last_hidden_state
        if how == "forward":
            output.last_hidden_state = state * torch.inf
        elif how == "backward":
            state.register_hook(lambda gradient: gradient * torch.inf)
        return output

    causal_lm(model).get_decoder().register_forward_hook(forward, with_kwargs=True)


def trainer_of(tmp_path, rows, how, **changes):
    settings = {"max_steps": None, "learning_rate": 1e-2, "clip_norm": 1.0, "schedule": "constant", "warmup_share": 0.0, "save_every": 100}
    recipe = recipe_of(tmp_path / "model", {**SMALL["llama"], "num_hidden_layers": 1}, **{**settings, **changes})
    model = ready_model(recipe, BOX, base)
    poison(model, how)
    notes = Notes()
    trainer = PackedTrainer(model, recipe, tmp_path / "run", rows, (), callback=notes)
    trainer.remove_callback(PrinterCallback)
    (tmp_path / "run").mkdir(exist_ok=True)
    return trainer, notes


def held(trainer):
    """Bits of all trained weights and all states of the optimizer."""
    weights = [parameter.detach().clone() for parameter in trainer.model.parameters() if parameter.requires_grad]
    states = trainer.optimizer.state.values() if trainer.optimizer is not None else ()
    moments = [value.clone() for state in states for value in state.values() if isinstance(value, torch.Tensor)]
    return weights, moments


def same(left, right):
    return all(len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True)) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("how", ["forward", "backward"])
@pytest.mark.parametrize("together", [1, 3])
def test_the_update_is_not_made(tmp_path, how, dtype, together):
    trainer, notes = trainer_of(tmp_path, rows_with({5}), how, dtype=dtype, micro_batches_per_update=together)
    before = {}

    def look(*_, **__):  # after each update that was made
        before["state"] = held(trainer)

    notes.on_step_end = look
    with pytest.raises(RunFailed, match="not finite") as caught:
        trainer.train()
    update = trainer.rows_of_update()
    assert 5 in update and len(update) == together
    step = trainer.state.global_step
    assert len(before["state"][0]) == 2 * 7 and len(before["state"][1]) == 3 * 14
    assert same(held(trainer), before["state"])
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    ((bad, ends),) = notes.told
    assert (bad.step, ends, math.isfinite(bad.loss)) == (step + 1, True, how == "backward")
    assert bad.rows == ((5,) if how == "forward" else tuple(update))
    assert f"update {step + 1}" in caught.value.fact and "5" in caught.value.fact
    assert (51 in bad.lines and 52 in bad.lines) and len(bad.lines) == 2 * len(bad.rows)
    # what was good until there is saved, whole, and says the step
    assert checkpoint.newest_good(tmp_path / "run") == (checkpoint.step_path(tmp_path / "run", step), [])
    model = ready_model(trainer.recipe, BOX, base)
    checkpoint.load_weights(model, checkpoint.step_path(tmp_path / "run", step))
    kept = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(kept, before["state"][0], strict=True))


@pytest.mark.parametrize("how", ["forward", "backward"])
def test_skipping_leaves_the_update_out(tmp_path, how):
    """With two bad rows the run goes on, and learns from the others what it learns where those two are simply not taken."""
    trainer, notes = trainer_of(tmp_path, rows_with({5, 2}), how, skip_bad_updates=2)
    taken = []

    def remember(args, state, control, **_):
        taken.append(held(trainer))

    notes.on_step_end = remember
    trainer.train()
    assert trainer.state.global_step == 12
    assert sorted(bad.rows for bad, _ in notes.told) == [(2,), (5,)] and not any(ends for _, ends in notes.told)
    bad_steps = {bad.step for bad, _ in notes.told}
    for step in range(2, 13):
        assert same(taken[step - 1], taken[step - 2]) == (step in bad_steps)
        assert math.isfinite(notes.losses[step - 1]) == (step not in bad_steps or how == "backward")
    assert all(weight.isfinite().all() for weight in taken[-1][0])


def test_too_many_in_a_row_end_the_run(tmp_path):
    trainer, notes = trainer_of(tmp_path, rows_with(range(12)), "forward", skip_bad_updates=2)
    before = held(trainer)
    with pytest.raises(RunFailed, match="after 2 skipped in a row"):
        trainer.train()
    assert [ends for _, ends in notes.told] == [False, False, True]
    assert same(held(trainer), before)


def test_weights_that_are_no_numbers_are_said_so_and_not_saved(tmp_path):
    trainer, _ = trainer_of(tmp_path, rows_with({}), "forward", skip_bad_updates=5)
    next(parameter for parameter in trainer.model.parameters() if parameter.requires_grad).data.fill_(torch.nan)
    with pytest.raises(RunFailed, match="weights were not finite"):
        trainer.train()
    assert checkpoint.steps(tmp_path / "run") == []
