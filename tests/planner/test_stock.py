"""The stock stack's ledger: published peaks, the arithmetic of what differs, and the table as it stands in benchmarks."""

from __future__ import annotations

import runpy
from typing import Any

import pytest
from support import ROOT

from sparklab.errors import RecipeError
from sparklab.model.anatomy import Anatomy
from sparklab.planner.ledger import Ledger
from sparklab.planner.recipe import Recipe
from sparklab.planner.stock import Stack, StockLedger

SCRIPT = runpy.run_path(str(ROOT / "benchmarks" / "published_peaks.py"))
LLAMA_8B = Anatomy.read(ROOT / "tests" / "planner" / "configs" / "llama-3.1-8b.json")


def ledger(stack: Stack, **changes: Any) -> StockLedger:
    return StockLedger(LLAMA_8B, Recipe(**{"model": "m", "data": "d", "micro_batch_tokens": 4096, "dtype": "bf16", **changes}), SCRIPT["BOX"], stack)


def test_published_peaks_are_met() -> None:
    assert len(SCRIPT["ROWS"]) == 12
    for row in SCRIPT["ROWS"]:
        assert SCRIPT["planned_gib"](row) == pytest.approx(row.gib, rel=SCRIPT["BAR"]), row.what


def test_the_table_is_the_scripts() -> None:
    assert SCRIPT["table"]() in (ROOT / "benchmarks" / "published_peaks.md").read_text(), "run python benchmarks/published_peaks.py"


def test_bytes_kept_by_a_layer_as_traced_by_others() -> None:
    # all-linear r16 on 8B, bytes a token a layer: fp32 adapters without autocast, and with
    assert ledger(Stack(autocast=False)).layer_list[1].training.kept == 295_496
    cast = ledger(Stack())
    copies = {item.name: item.size_bytes for item in cast.states}["adapters under autocast"]
    assert copies == 2 * 41_943_040
    assert cast.layer_list[1].training.kept + copies / 32 / 2048 == 218_728  # theirs are of 2048 tokens
    # a padding mask repeats keys and values: 2 (q - k) numbers of 2 bytes
    assert ledger(Stack(masked=True)).layer_list[1].training.kept - ledger(Stack()).layer_list[1].training.kept == 4 * (4096 - 1024)


def test_all_logits_at_once() -> None:
    peaks = {version: {item.name: item.size_bytes for item in ledger(Stack(version=version))._loss().items}["all logits"] for version in ("4.48", "5.23")}
    assert peaks == {"4.48": 14 * 4096 * 128_256, "5.23": 12 * 4096 * 128_256}
    recipe = Recipe(model="m", data="d", micro_batch_tokens=4096, dtype="bf16")
    assert ledger(Stack()).peak_bytes > Ledger(LLAMA_8B, recipe, SCRIPT["BOX"]).peak_bytes
    with pytest.raises(RecipeError, match=r"transformers 3\.0 holds is not known"):
        ledger(Stack(version="3.0"))


def test_inputs_that_old_bitsandbytes_kept() -> None:
    """Of a layer: one normed input for q, k and v, one for gate and up, the attention's output (which attention keeps anyway) and what goes into down."""
    old, new = (ledger(Stack(keeps_unpacked_inputs=keeps), method="qlora", targets="attention").layer_list[1].training.kept for keeps in (True, False))
    assert old - new == 2 * (4096 + 4096 + 14336)
