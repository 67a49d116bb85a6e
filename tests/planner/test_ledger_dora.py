"""DoRA in the ledger, against a real step storage by storage, and its numbers by hand."""

import json

import pytest
from family_configs import SMALL
from real_step import measured_peak
from test_ledger_real import planned_peak

import sparklab as sl
from sparklab.box import Box
from sparklab.planner.recipe import Recipe

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers has opinions on token numbers and rotary factors of configs this small
SETTINGS = {"model": "small", "data": "none", "micro_batch_tokens": 256, "max_length": 64, "dtype": "bf16", "dora": True}
GRID = [
    ("llama", {}), ("llama", {"dropout": 0.1}), ("llama", {"method": "qlora"}), ("qwen2", {"dtype": "fp32", "rank": 4}),
    ("gemma2", {"checkpoint_layers": "all", "micro_batch_tokens": 512, "max_length": 256}), ("qwen3_moe", {"micro_batches_per_update": 2}),
]  # fmt: skip


@pytest.mark.parametrize(("family", "changes"), GRID)
def test_planned_is_measured(family, changes):
    recipe = Recipe(**{**SETTINGS, **changes})
    documents = recipe.micro_batch_tokens // recipe.max_length
    assert planned_peak(SMALL[family], recipe) == pytest.approx(measured_peak(SMALL[family], recipe, documents), rel=0.005)


def test_adapters_in_fp32_on_a_bf16_base_are_planned_above():
    """At most 7 % above, never below."""
    recipe = Recipe(**{**SETTINGS, "adapter_dtype": "fp32", "checkpoint_layers": 2})
    assert 1 <= planned_peak(SMALL["llama"], recipe) / measured_peak(SMALL["llama"], recipe, 4) < 1.07


def test_the_magnitudes_are_counted(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SMALL["llama"]))
    plans = [sl.plan(Recipe(model=str(tmp_path), data="none", dora=dora), box=Box.profile("dgx-spark")) for dora in (False, True)]
    assert plans[1].trainable_parameters - plans[0].trainable_parameters == 3 * (128 + 64 + 64 + 128 + 352 + 352 + 128)
