"""The grid of tests/planner/grid.py, second half: windows, fused projections, latent attention, experts."""

import pytest
from grid import MODELS, check

_, OTHERS = MODELS


@pytest.mark.parametrize("model", OTHERS)
def test_the_ledger_is_the_trace(model, tmp_path):
    check(model, tmp_path)
