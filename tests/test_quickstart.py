"""The promise of the README: the model cannot do it before and can after, by every method."""

import json

import pytest
from support import run_cli

from sparklab.data.lesson import lesson
from sparklab.data.read import read_records

KEYS = {"exact_match_before", "exact_match_after", "held_out", "seconds", "tokens_per_second", "planned_gib", "measured_gib", "run"}


@pytest.mark.slow
@pytest.mark.parametrize(("method", "seed"), [("qlora", 1), ("full", 2)])  # lora: the notebook, executed by test_notebooks.py
def test_it_helps(method, seed, tmp_path):
    result = run_cli("quickstart", "--method", method, "--seed", seed, "--json", cwd=tmp_path, timeout=600)
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout)
    assert set(told) >= KEYS
    assert told["held_out"] >= 200
    assert told["exact_match_before"] <= 0.05
    assert told["exact_match_after"] >= 0.90
    assert told["tokens_per_second"] > 0
    assert 0.3 < told["measured_gib"] / told["planned_gib"] < 3  # the same order: most of it is the libraries themselves


@pytest.mark.parametrize("seed", range(5))
def test_nothing_held_out_is_trained_on(seed, tmp_path):
    recipe = lesson("lora", seed, tmp_path)
    train, held_out = read_records(recipe.data), read_records(recipe.held_out)
    assert (len(train), len(held_out)) == (1000, 200)
    assert not {chat.key for chat in train} & {chat.key for chat in held_out}
    assert not {chat.prompt[0]["content"] for chat in train} & {chat.prompt[0]["content"] for chat in held_out}

    def pair(chat):
        _, _, name, city, _ = json.loads(chat.answer).values()
        return name, city

    assert not {pair(chat) for chat in train} & {pair(chat) for chat in held_out}
