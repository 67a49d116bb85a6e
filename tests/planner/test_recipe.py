"""Recipes: frozen, complete, valid Python, and every fault at once."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from sparklab.errors import RecipeError
from sparklab.planner.recipe import METHODS, Recipe

LEAST: dict[str, Any] = {"model": "tiny", "data": "chats.jsonl"}


def test_the_least_recipe_is_complete() -> None:
    recipe = Recipe(**LEAST)
    assert (recipe.method, recipe.rank, recipe.targets, recipe.learning_rate) == ("lora", 16, "all-linear", 2e-4)
    assert METHODS == ("full", "lora", "qlora")
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.rank = 8  # type: ignore[misc]


def test_repr_and_json_bring_it_back() -> None:
    recipe = Recipe(**LEAST, targets=("q_proj", "v_proj"), betas=(0.9, 0.95), checkpoint_layers=3, held_out="held.jsonl", sample_prompts=("Hi",))
    assert eval(repr(recipe)) == recipe
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))).fingerprint == recipe.fingerprint


def test_paths_become_strings() -> None:
    assert Recipe(model=Path("m"), data=Path("d")).to_dict()["model"] == "m"  # type: ignore[arg-type]


def test_the_fingerprint_changes_with_every_field() -> None:
    changes: dict[str, Any] = {
        "model": "other", "data": "other", "method": "full", "rank": 8, "alpha": 1.0, "dropout": 0.5, "targets": "attention", "adapter_dtype": "fp32",
        "double_quantization": False, "micro_batch_tokens": 4096, "micro_batches_per_update": 2, "max_length": 1024, "on_long": "drop", "epochs": 2.0,
        "max_steps": 5, "learning_rate": 1e-3, "schedule": "linear", "warmup_share": 0.1, "weight_decay": 0.1, "betas": (0.9, 0.95), "clip_norm": 2.0,
        "seed": 1, "dtype": "fp32", "checkpoint_layers": "all", "loss": "full", "engine": "stock", "optimizer": "adamw_8bit", "held_out": 0.2,
        "eval_every": 3, "answer_held_out": 4, "answer_tokens": 64, "sample_prompts": ("Hi",), "save_every": 9, "keep_checkpoints": 1,
        "format": "text", "template": "chatml", "learn": "all", "on_bad": "skip", "overrule": ("mismatch",),
        "rank_stabilized": True, "dora": True, "expert_adapters": True, "skip_bad_updates": 1, "guard": False, "soft_floor_gib": 3.0, "hard_floor_gib": 0.5,
        "keep_best": True, "retry": "smaller",
    }  # fmt: skip
    recipe = Recipe(**LEAST)
    assert set(changes) == {field.name for field in dataclasses.fields(Recipe)}
    prints = {recipe.replace(**{name: value}).fingerprint for name, value in changes.items()} | {recipe.fingerprint}
    assert len(prints) == len(changes) + 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "dora"}, "method is 'dora'; choose one of full, lora, qlora"),
        ({"rank": 0}, "rank is 0"),
        ({"rank": True}, "rank is True"),
        ({"micro_batch_tokens": -5}, "micro_batch_tokens is -5"),
        ({"max_length": 4096}, r"max_length \(4096\) is longer than a packed row"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"learning_rate": 0}, "learning_rate is 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"betas": (0.9,)}, "betas is"),
        ({"checkpoint_layers": "some"}, "checkpoint_layers is 'some'"),
        ({"checkpoint_layers": -1}, "checkpoint_layers is -1"),
        ({"held_out": 1.5}, "held_out is 1.5"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"weight_decay": -1}, "weight_decay is -1"),
        ({"model": ""}, "model is ''"),
        ({"engine": "turbo"}, "engine is 'turbo'; choose one of fast, stock"),
        ({"optimizer": "paged_adamw_8bit"}, "another pool of memory, and here there is one"),
        ({"data": [{"text": "a"}]}, "data is of type list; it must be a path or a name; sl.recipes.lora"),
        ({"format": "xml"}, "format is 'xml'; choose one of auto, messages"),
        ({"template": "mine"}, "template is 'mine'"),
        ({"learn": "user"}, "learn is 'user'"),
        ({"on_bad": "guess"}, "on_bad is 'guess'"),
        ({"overrule": ("all",)}, r"overrule is \('all',\); it must be a tuple of mismatch, special_text"),
    ],
)
def test_what_cannot_be(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        Recipe(**{**LEAST, **changes})


def test_all_faults_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe(**LEAST, rank=0, alpha=-1, epochs=0, seed=-1, loss="other")  # type: ignore[arg-type]
    assert str(caught.value).count("\n  - ") == 5
    assert isinstance(caught.value, ValueError)


def test_unknown_fields_name_the_known_ones() -> None:
    with pytest.raises(RecipeError, match=r"(?s)'learnin_rate'.*learning_rate"):
        Recipe(**LEAST).replace(learnin_rate=1)
    with pytest.raises(RecipeError, match="'lr'"):
        Recipe.from_dict({**LEAST, "lr": 1})
