"""Adapters on experts in the ledger, against a real step storage by storage."""

import pytest
from family_configs import SMALL
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
