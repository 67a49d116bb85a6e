"""The grid of tests/planner/grid.py: models whose projections stand apart. The rest is in test_grid_of_others.py, so that two processes share it."""

import pytest
from grid import MODELS, RECIPES, check

DENSE, _ = MODELS


@pytest.mark.parametrize("model", DENSE)
def test_the_ledger_is_the_trace(model, tmp_path):
    check(model, tmp_path)


def test_the_grid_is_wide():
    models = {model for half in MODELS for model in half}
    assert len(models) == 20 and len(RECIPES) == 15  # 300 points
    values = [(recipe.get("method", "lora"), recipe.get("optimizer", "adamw"), recipe.get("engine", "fast")) for recipe in RECIPES]
    assert {method for method, _, _ in values} == {"lora", "qlora", "full"}
    assert {optimizer for _, optimizer, _ in values} == {"adamw", "adamw_8bit"} and {engine for _, _, engine in values} == {"fast", "stock"}
    for field, least in (("rank", 5), ("micro_batch_tokens", 5), ("checkpoint_layers", 2)):
        assert len({recipe[field] for recipe in RECIPES if field in recipe}) >= least, field
