"""Two altitudes, one training: the flat loop of examples/ and the real run reach the same losses."""

import runpy
import time

import pytest
from support import ROOT

import sparklab as sl
from sparklab.data.lesson import lesson

pytestmark = pytest.mark.slow


def test_the_flat_loop_and_the_run_reach_the_same_losses(tmp_path):
    steps = 25
    plain = runpy.run_path(str(ROOT / "examples" / "plain_loop.py"))["train"](steps, seed=1)
    recipe = lesson("lora", 1, tmp_path / "lesson").replace(dtype="fp32", answer_held_out=0, sample_prompts=(), held_out=0.0)
    assert recipe.max_steps is None  # the whole schedule, of which the first steps are compared
    whole = recipe.replace(data=recipe.data, held_out=str(tmp_path / "lesson" / "orders-held-out.jsonl"), eval_every=10_000, save_every=10_000)
    run = sl.train(whole, tmp_path / "run", panel=False)
    while run.state.step < steps and not run.state.is_over:
        time.sleep(0.05)
    run.stop()
    run.wait(120)
    assert run.state.losses[:steps] == pytest.approx(plain, rel=2e-3)
    assert plain[-1] < 0.7 * plain[0]
