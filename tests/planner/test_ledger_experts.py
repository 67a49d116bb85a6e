"""Adapters on experts in the ledger, against a real step storage by storage."""

import pytest
from family_configs import REAL, SMALL
from grid import ALL, compared, write_config
from real_step import measured_peak
from test_ledger_real import planned_peak

from sparklab.planner.recipe import Recipe

MIXTURES = ["deepseek_v2", "deepseek_v3", "gpt_oss", "mixtral", "olmoe", "qwen3_moe"]
pytestmark = pytest.mark.filterwarnings("ignore")  # transformers has opinions on token numbers and rotary factors of configs this small


GRID = [
    ({}, 4), ({"checkpoint_layers": "all", "micro_batch_tokens": 512, "max_length": 256}, 2), ({"adapter_dtype": "fp32", "checkpoint_layers": 2}, 4),
    ({"rank": 4, "micro_batches_per_update": 2}, 4),
]  # fmt: skip


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize(("changes", "documents"), GRID)
def test_the_ledger_counts_them(family, changes, documents):
    """Less than a real step holds by 3 in a thousand at most, and at most 2 % more."""
    settings = {"model": "small", "data": "none", "micro_batch_tokens": 256, "max_length": 64, "dtype": "bf16", "expert_adapters": True}
    recipe = Recipe(**{**settings, **changes})
    measured = measured_peak(SMALL[family], recipe, documents)
    assert 0.997 * measured <= planned_peak(SMALL[family], recipe) <= 1.02 * measured


WIDE = ["DeepSeek-V2-Lite", "DeepSeek-V3", "Mixtral-8x7B", "OLMoE-1B-7B", "Qwen3-30B-A3B", "gpt-oss-20B"]


def test_every_mixture_is_here():
    assert {model for model, values in REAL.items() if values["model_type"] in MIXTURES} == set(WIDE)


@pytest.mark.parametrize("model", WIDE)
def test_experts_without_adapters(model, tmp_path):
    """What comes and goes at real widths, without the weights beside which it would look small: a percent from the trace."""
    path = write_config(tmp_path, model)
    for changes in ({"targets": "attention"}, {"targets": "attention", **ALL}):
        assert compared(path, changes).moving == pytest.approx(1, abs=0.01), changes
