"""The inverse questions: the longest context and the largest model that fit, each with a neighbour that does not; fixes; the command line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from family_configs import REAL

from sparklab.box import Box
from sparklab.cli import main
from sparklab.errors import DoesNotFit, ModelError, ModelNotFound, RecipeError
from sparklab.model.anatomy import Anatomy, from_config
from sparklab.planner import ModelTable, Plan, PlanTable, plan
from sparklab.planner.search import STEP_TOKENS, least_checkpointing, longest_row
from sparklab.units import GIB, NA

CONFIGS = Path(__file__).parent / "configs"
LLAMA_8B, LLAMA_70B = (str(CONFIGS / f"{name}.json") for name in ("llama-3.1-8b", "llama-3.3-70b"))
ANATOMY_8B = Anatomy.read(LLAMA_8B)
SPARK = Box.profile("dgx-spark")


def box_of(memory_gib: float) -> Box:
    return Box(**{**vars(SPARK), "memory_bytes": memory_gib * GIB})


def one_step_longer(found: Plan) -> Plan:
    tokens = found.recipe.max_length + STEP_TOKENS
    return found.replace(max_length=tokens, micro_batch_tokens=tokens)


# bisection


def test_bisection_finds_what_a_walk_finds() -> None:
    for limit in (0, 1, 127, 128, 129, 1000, 4000, 4096, 5000):
        walked = max((tokens for tokens in (*range(128, 4097, 128), 4100) if tokens <= limit and tokens <= 4100), default=0)
        assert longest_row(lambda tokens, limit=limit: tokens <= limit, 4100) == walked  # type: ignore[misc]
    assert longest_row(lambda tokens: tokens <= 100, 100) == 100  # a model made for fewer than 128
    for needed in range(12):
        least = least_checkpointing(lambda layers, needed=needed: 0.0 if layers >= needed else 1.0, 10, 0.5)  # type: ignore[misc]
        assert least == (needed if needed <= 10 else None)


# the longest context


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize("memory_gib", [30, 60, 90])
def test_the_longest_context_fits_and_the_next_does_not(method: Any, memory_gib: float) -> None:
    tireless = dataclasses.replace(ANATOMY_8B, max_positions=0)  # memory alone is the limit
    found = plan(tireless, box=box_of(memory_gib), method=method).best().longest_context()
    assert found.recipe.max_length == found.recipe.micro_batch_tokens
    assert found.recipe.max_length % STEP_TOKENS == 0
    if found.fits:
        assert not one_step_longer(found).replace(checkpoint_layers="all").fits
        layers = found.ledger.checkpointed
        assert layers == 0 or not found.replace(checkpoint_layers=layers - 1).fits, "one layer less would have fitted"
    else:
        assert found.recipe.max_length == STEP_TOKENS
        assert (method, memory_gib) in {("full", 30), ("full", 60)}


def test_settings_named_are_kept_while_looking_for_the_longest() -> None:
    best = plan(ANATOMY_8B, box=SPARK, method="lora").best()
    kept = best.longest_context(checkpoint_layers="none", rank=64)
    assert (kept.recipe.checkpoint_layers, kept.recipe.rank) == ("none", 64)
    assert kept.fits
    assert not one_step_longer(kept).fits
    assert kept.recipe.max_length < best.longest_context().recipe.max_length
    with pytest.raises(RecipeError, match="solved for max_length"):
        best.longest_context(max_length=5)
    with pytest.raises(RecipeError, match="no field 'ranks'"):
        best.longest_context(ranks=5)


def test_nothing_is_longer_than_the_model_was_made_for() -> None:
    table = plan(ANATOMY_8B, box=SPARK)
    longest = table.longest_context()
    assert longest["qlora"].recipe.max_length == ANATOMY_8B.max_positions
    assert [one.recipe.max_length for one in longest] == sorted((one.recipe.max_length for one in longest), reverse=True)
    assert longest["full"].recipe.max_length < ANATOMY_8B.max_positions
    unknown = plan(ANATOMY_8B, box=Box(name="odd", chip="odd", memory_bytes=NA, unified=False), method="lora").longest_context().best()
    assert unknown.recipe.max_length == ANATOMY_8B.max_positions


def test_every_family_has_a_table_and_a_longest_context() -> None:
    for name, config in REAL.items():
        anatomy = from_config(config, name)
        table = plan(anatomy, box=SPARK)
        assert {one.recipe.method for one in table} == {"full", "lora", "qlora"}
        for found in table.longest_context():
            if found.fits and found.recipe.max_length < anatomy.max_positions:
                assert not one_step_longer(found).replace(checkpoint_layers="all").fits, name
            assert found.fits or found.recipe.max_length == STEP_TOKENS
    assert len(REAL) >= 18


# the largest model


def test_the_largest_model_that_fits() -> None:
    models = plan([LLAMA_8B, "tiny", LLAMA_70B], box=SPARK)
    assert isinstance(models, ModelTable)
    assert [table.best().anatomy.source for table in models] == [LLAMA_70B, LLAMA_8B, "tiny"]
    assert models.largest().anatomy.source == LLAMA_70B
    assert models.largest().recipe.method == "qlora"
    assert isinstance(models["tiny"], PlanTable)
    by_lora = plan([LLAMA_8B, "tiny", LLAMA_70B], box=SPARK, method="lora", rank=8)
    assert by_lora.largest().anatomy.source == LLAMA_8B
    assert by_lora.largest().recipe.rank == 8
    small = plan([LLAMA_8B, LLAMA_70B], box=box_of(12))
    with pytest.raises(DoesNotFit, match="needs"):
        small.largest()
    assert small.to_dict()["fits"] is False
    assert small.to_dict()["model"] == LLAMA_8B
    assert all(not table.best().fits for table in small)
    assert models.longest_context()[LLAMA_70B].best().recipe.max_length > 16384


def test_a_list_with_strangers_names_them_all() -> None:
    with pytest.raises(ModelError, match=r"(?s)nowhere.*nobody"):
        plan(["nowhere.json", LLAMA_8B, "nobody.json"], box=SPARK)
    with pytest.raises(ModelNotFound, match="nowhere"):
        plan([LLAMA_8B, "nowhere.json"], box=SPARK)
    with pytest.raises(ModelError, match="empty"):
        plan([], box=SPARK)


# what follows from a change


def test_a_changed_plan_is_planned_anew() -> None:
    planned = plan(ANATOMY_8B, box=SPARK, method="lora", tokens=1e6).best()
    twice = planned.replace(epochs=2)
    assert twice.tokens == 2e6
    assert twice.hours[0] == pytest.approx(2 * planned.hours[0])
    assert planned.replace(max_steps=3).tokens == 3 * planned.recipe.micro_batch_tokens
    long = planned.replace(max_length=200_000, micro_batch_tokens=200_000)
    assert any("longer than the 131072 positions" in note for note in long.notes)
    assert not planned.notes
    assert any("10M tokens" in note for note in plan(ANATOMY_8B, box=SPARK).best().notes)


def test_8_bit_states_are_offered_where_they_help() -> None:
    # 8.03B parameters: 3 x 2 B in bf16 with AdamW's moments 2 x 2 B, of which 8 bits save nearly half
    planned = plan(ANATOMY_8B, box=box_of(76), method="full", checkpoint_layers="all", micro_batch_tokens=512).best()
    fix = next(fix for fix in planned.fixes if fix.changes == {"optimizer": "adamw_8bit"})
    after = planned.replace(**fix.changes)
    assert after.fits
    assert after.peak_bytes == fix.peak_bytes
    states = {item.name: item.size_bytes for item in after.ledger.states}["optimizer"]
    embedding = 128_256 * 4096
    assert states == 8 * embedding + (2 + 8 / 256) * (8_030_261_248 - embedding)  # norms are 4,096 wide: just large enough for 8 bits


# the command line


def typed(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> dict[str, Any]:
    """What ``sparklab plan ARGUMENTS --json`` prints."""
    assert main(["plan", *arguments, "--json"]) == status
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    return told


NAMES = {"fits", "peak_gib", "usable_gib", "peak_phase", "lines", "tokens_per_second", "hours", "wh", "fixes"}


def test_the_command_line_asks_the_same_questions(capsys: pytest.CaptureFixture[str]) -> None:
    longest = typed(capsys, LLAMA_8B, "--box", "dgx-spark", "--method", "full", "--longest")
    assert longest == json.loads(json.dumps(plan(LLAMA_8B, box=SPARK, method="full").longest_context().to_dict()))
    assert set(longest) >= NAMES
    told = typed(capsys, LLAMA_70B, LLAMA_8B, "tiny", "--box", "dgx-spark", "--method", "lora", "--optimizer", "adamw_8bit")
    assert (told["model"], told["fits"], told["recipe"]["optimizer"]) == (LLAMA_8B, True, "adamw_8bit")
    assert [model["model"] for model in told["models"]] == [LLAMA_70B, LLAMA_8B, "tiny"]
    assert set(told) >= NAMES
    assert typed(capsys, LLAMA_8B, "--longest", "--max-length", "9", status=2)["error"] == "RecipeError"


def test_every_flag_of_the_plan_reaches_it(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--method", "lora", "--rank", "8", "--targets", "q_proj,v_proj", "--micro-batch-tokens", "1024", "--max-length", "512",
             "--checkpoint-layers", "3", "--optimizer", "adamw_8bit", "--loss", "full", "--adapter-dtype", "fp32"]  # fmt: skip
    told = typed(capsys, LLAMA_8B, *flags, "--box", "dgx-spark")
    wanted: dict[str, Any] = {"method": "lora", "rank": 8, "targets": ["q_proj", "v_proj"], "micro_batch_tokens": 1024, "max_length": 512,
                              "checkpoint_layers": 3, "optimizer": "adamw_8bit", "loss": "full", "adapter_dtype": "fp32"}  # fmt: skip
    assert {name: told["recipe"][name] for name in wanted} == wanted
    assert {tuple(sorted(line)) for line in told["lines"]} == {("formula", "gib", "name", "phase")}
    for layers in ("all", "none"):
        told = typed(capsys, LLAMA_8B, "--checkpoint-layers", layers, "--method", "lora", "--box", "dgx-spark")
        assert told["recipe"]["checkpoint_layers"] == layers
