"""Golden loss curves: twenty updates of three small models from a seed, in fp32 on one thread, against those in golden.json.

Written anew with ``SPARKLAB_GOLDEN=1`` when a change of them is meant. The bound of 1e-4 of the loss is for other CPUs and libraries: the same
machine with AVX-512, with AVX2 and without differs by at most 7e-7. What may not happen differs by more than five times the bound (measured: 2e-3
and more), as the test at the end shows.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from family_configs import SMALL
from transformers import PrinterCallback, TrainerCallback
from whole_step import BOX, base, documents, recipe_of

from sparklab.data.dataset import make_row
from sparklab.engine.fast import ready_model
from sparklab.engine.trainer import PackedTrainer

GOLDEN = Path(__file__).with_name("golden.json")
BOUND = 1e-4
STEPS = 20
MODELS = {
    "llama": {},
    "qwen3_moe": {"expert_adapters": True},
    "gemma2": {"method": "full", "learning_rate": 3e-3, "weight_decay": 0.1, "checkpoint_layers": "all"},
}
LENGTHS = (40, 12, 25, 7, 60, 18, 33, 9, 21, 50, 5, 28)
pytestmark = pytest.mark.filterwarnings("ignore")  # transformers has opinions on token numbers and rotary factors of configs this small


class Losses(TrainerCallback):
    """Of every update; nothing is saved."""

    def __init__(self):
        self.values = []

    def on_log(self, args, state, control, logs=None, **_):
        if "loss" in logs:
            self.values.append(logs["loss"])

    def on_step_end(self, args, state, control, **_):
        control.should_save = control.should_evaluate = False


def curve(folder, family, changes=(), breaking=None):
    """Losses of the updates; ``breaking`` may spoil the rows."""
    settings = {
        "clip_norm": 1.0, "learning_rate": 8e-3, "warmup_share": 0.1, "max_steps": STEPS, "epochs": 20.0, "micro_batches_per_update": 2,
        "checkpoint_layers": 1, "rank": 8, "alpha": 16.0, "betas": (0.9, 0.95),
    }  # fmt: skip
    recipe = recipe_of(folder / "model", SMALL[family], **{**settings, **MODELS[family], **dict(changes)})
    told = documents(lengths=LENGTHS)
    rows = [make_row(told[start::4]) for start in range(4)]
    if breaking is not None:
        breaking(rows)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        losses = Losses()
        trainer = PackedTrainer(ready_model(recipe, BOX, base), recipe, folder / "run", rows, (), callback=losses)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    finally:
        torch.set_num_threads(threads)
    assert len(losses.values) == STEPS
    return losses.values


def apart(left, right):
    """The largest distance of two curves, in shares of the loss."""
    return max(abs(a / b - 1) for a, b in zip(left, right, strict=True))


def golden(family):
    return json.loads(GOLDEN.read_text(encoding="utf-8"))[family]


@pytest.mark.parametrize("family", sorted(MODELS))
def test_the_curve_is_the_golden_one(family, tmp_path):
    losses = curve(tmp_path, family)
    if os.environ.get("SPARKLAB_GOLDEN"):
        known = json.loads(GOLDEN.read_text(encoding="utf-8")) if GOLDEN.exists() else {}
        GOLDEN.write_text(json.dumps({**known, family: [round(loss, 7) for loss in losses]}, indent=1) + "\n", encoding="utf-8")
    assert losses[-1] < 0.95 * losses[0]  # it learns, so that what is learned shows
    assert apart(losses, golden(family)) < BOUND


def lose_a_border(rows):
    """Two documents of the first row become one, for attention alone."""
    del rows[0].boundaries[1]


@pytest.mark.parametrize(
    ("family", "changes", "breaking"),
    [
        ("llama", {"alpha": 16.5}, None),
        ("llama", {}, lose_a_border),
        ("qwen3_moe", {"learning_rate": 8.2e-3}, None),
        ("gemma2", {"weight_decay": 0.2}, None),
    ],
)
def test_what_may_not_happen_shows(family, changes, breaking, tmp_path):
    assert apart(curve(tmp_path, family, changes, breaking), golden(family)) > 5 * BOUND
