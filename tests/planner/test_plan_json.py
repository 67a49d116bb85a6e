"""What ``sparklab plan``, ``trace`` and ``rehearse`` take and print: names that scripts rely on."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support import ROOT

from sparklab import cli
from sparklab.planner.traced import Traced, TracedLine
from sparklab.units import NA

MODEL = str(ROOT / "tests" / "planner" / "configs" / "llama-3.1-8b.json")
FLAGS = ["--method", "lora", "--rank", "8", "--targets", "attention", "--micro-batch-tokens", "1024", "--max-length", "512", "--checkpoint-layers", "all",
         "--optimizer", "adamw_8bit", "--engine", "stock", "--loss", "full", "--adapter-dtype", "fp32", "--box", "dgx-spark", "--json"]  # fmt: skip
KEYS = {"fits", "peak_gib", "usable_gib", "peak_phase", "lines", "tokens_per_second", "hours", "wh", "fixes"}


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert cli.main(list(arguments)) == 0
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    return answer


def test_a_plan_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    plan = printed(capsys, "plan", MODEL, *FLAGS)
    assert plan.keys() >= KEYS
    assert plan["fits"] is True and plan["peak_gib"] < plan["usable_gib"] and plan["fixes"] == []
    recipe = plan["recipe"]
    assert (recipe["rank"], recipe["targets"], recipe["micro_batch_tokens"], recipe["max_length"]) == (8, "attention", 1024, 512)
    assert (recipe["checkpoint_layers"], recipe["optimizer"], recipe["engine"], recipe["loss"]) == ("all", "adamw_8bit", "stock", "full")
    assert recipe["adapter_dtype"] == "fp32"
    assert {tuple(line) for line in plan["lines"]} == {("name", "phase", "gib", "formula")}
    sums = dict.fromkeys(("load", "train", "evaluate", "sample", "save", "merge"), 0.0)
    for line in plan["lines"]:
        sums[line["phase"]] += line["gib"]
    assert plan["peak_gib"] == pytest.approx(max(sums.values())) and plan["peak_phase"] == max(sums, key=sums.__getitem__)
    for name in ("tokens_per_second", "hours", "wh"):
        low, high = plan[name]
        assert 0 < low < high
    assert [one["method"] for one in plan["plans"]] == ["lora"]


def test_what_would_make_it_fit_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    plan = printed(capsys, "plan", MODEL, "--method", "full", "--micro-batch-tokens", "32768", "--checkpoint-layers", "none", "--box", "dgx-spark", "--json")
    assert plan["fits"] is False and plan["peak_gib"] > plan["usable_gib"]
    assert plan["fixes"] and all(set(fix) == {"change", "changes", "peak_gib"} and fix["peak_gib"] <= plan["usable_gib"] for fix in plan["fixes"])


@pytest.mark.parametrize("count", ["0", "7", "all", "none"])
def test_layers_to_checkpoint(capsys: pytest.CaptureFixture[str], count: str) -> None:
    plan = printed(capsys, "plan", MODEL, "--method", "lora", "--checkpoint-layers", count, "--box", "dgx-spark", "--json")
    assert str(plan["recipe"]["checkpoint_layers"]) == count


def test_a_trace_takes_the_same_and_adds_what_was_traced(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def trace(recipes: Any, box: Any) -> list[Traced]:
        asked.extend(recipes)
        return [Traced(lines=(TracedLine("weights", 2.0**34, "followed"),), moment="loss", layers=5, seconds=1.0) for _ in recipes]

    monkeypatch.setattr("sparklab.run.tracing.trace", trace)
    plan = printed(capsys, "trace", MODEL, *FLAGS)
    assert plan.keys() >= KEYS and plan["traced_gib"] == 16
    assert [(recipe.engine, recipe.rank) for recipe in asked] == [("stock", 8)]


def test_a_rehearsal_takes_the_same_and_adds_what_was_measured(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from sparklab.run import rehearsal

    asked: list[Any] = []

    def rehearse(plan: Any, on_phase: Any, profile: bool) -> Any:
        asked.append(plan.recipe)
        phases = tuple(rehearsal.Phase(name=name, planned_bytes=2.0**30, measured_bytes=2.0**31, reserved_bytes=NA, process_bytes=2.0**32, seconds=1.0)
                       for name in ("load", "train"))  # fmt: skip
        return rehearsal.Rehearsal(plan=plan, phases=phases, step_seconds=(1.0,), watts=NA, seconds=2.0, device="a test", here=plan.box)

    monkeypatch.setattr(rehearsal, "rehearse_plan", rehearse)
    result = printed(capsys, "rehearse", MODEL, "--force", *FLAGS)
    assert result.keys() >= KEYS and result["measured_gib"] == 2 and result["reserved_gib"] is None
    assert [(recipe.engine, recipe.rank) for recipe in asked] == [("stock", 8)]
