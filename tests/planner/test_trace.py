"""The trace against reality: its peak and that of the same recipe's real step on the CPU, from saved weights, by the same books."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import sparklab as sl
from sparklab.box import Box
from sparklab.engine import trace
from sparklab.engine.books import Books, longest_row
from sparklab.engine.fast import ready_model
from sparklab.engine.trainer import row_loss
from sparklab.errors import ModelError
from sparklab.planner.recipe import Recipe

SHAPE: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 1000,
    "max_position_embeddings": 4096, "tie_word_embeddings": False,
}  # fmt: skip
BOX = Box(name="test", chip="CPU", memory_bytes=2**40, unified=False, is_gpu=False, runtime_bytes=0.0)
ALL = {"checkpoint_layers": "all"}

# (changes of the shape, changes of the recipe)
GRID: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({}, {"dtype": "fp32"}),
    ({}, {"max_length": 256}),
    ({}, {"max_length": 200, "dropout": 0.1}),
    ({}, {**ALL, "dtype": "fp32"}),
    ({}, {"checkpoint_layers": 1, "rank": 64}),
    ({}, {"targets": "attention"}),
    ({}, {"targets": ("q_proj", "down_proj"), **ALL}),
    ({}, {"adapter_dtype": "fp32", **ALL}),
    ({}, {"adapter_dtype": "fp32", "dropout": 0.1}),
    ({}, {"loss": "full"}),
    ({}, {"micro_batches_per_update": 2, "rank": 64}),
    ({"num_hidden_layers": 8, "intermediate_size": 512}, {"micro_batch_tokens": 512, "checkpoint_layers": 6}),
    ({"num_key_value_heads": 8, "vocab_size": 8000}, {"micro_batch_tokens": 1280, "max_length": 256}),
    ({}, {"method": "full"}),
    ({}, {"method": "full", "dtype": "fp32", "checkpoint_layers": 2}),
    ({"num_hidden_layers": 9}, {"method": "full", **ALL}),
    ({"tie_word_embeddings": True}, {"method": "full"}),
    ({"tie_word_embeddings": True}, {"method": "full", "micro_batches_per_update": 3, **ALL}),
    ({}, {"method": "qlora"}),
    ({}, {"method": "qlora", "double_quantization": False, "dtype": "fp32", **ALL}),
    ({"num_hidden_layers": 7, "attention_bias": True}, {"method": "qlora", "adapter_dtype": "fp32", "targets": "attention"}),
    ({"hidden_size": 256, "tie_word_embeddings": True}, {"method": "qlora", "checkpoint_layers": 2, "micro_batches_per_update": 2}),
    ({}, {"optimizer": "adamw_8bit", "rank": 64}),
]


@pytest.fixture(scope="module")
def recipe_of(tmp_path_factory):
    """A recipe on a model of random weights that lies on the disk: ``recipe_of(shape, changes)``."""
    saved: dict[str, str] = {}

    def make(shape, changes):
        if str(shape) not in saved:
            folder = tmp_path_factory.mktemp("model")
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(LlamaConfig(**{**SHAPE, **shape})).save_pretrained(folder)
            (folder / "tokenizer.json").write_text("{}")
            saved[str(shape)] = str(folder)
        settings = {"data": "none", "micro_batch_tokens": 256, "max_length": 64, "dtype": "bf16", **changes}
        return Recipe(model=saved[str(shape)], **settings)

    return make


def measured(recipe: Recipe) -> int:
    """Peak bytes of the second update of the real model, which is done here without any of the marks that the trace sets."""
    model = ready_model(recipe, BOX).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer: Any = torch.optim.AdamW(trained, fused=True)
    if recipe.optimizer == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit

        optimizer = AdamW8bit(trained)
    row, books = longest_row(recipe), Books()
    states = [parameter.quant_state for parameter in model.parameters() if getattr(parameter, "quant_state", None) is not None]
    states += [state.state2 for state in states if state.state2 is not None]
    books.own((*model.parameters(), *model.buffers(), *row.values()), "before")
    books.own([tensor for state in states for tensor in (state.absmax, state.code, state.offset)], "constants")
    with books:
        for _update in range(2):
            books.peak_bytes = books.now_bytes
            for _ in range(recipe.micro_batches_per_update):
                row_loss(model, row, 200.0, recipe.loss).backward()
            torch.nn.utils.clip_grad_norm_(trained, recipe.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
    return books.peak_bytes


def traced(recipe: Recipe, box: Box = BOX) -> float:
    """Peak bytes of the trace, as far as storages go."""
    return sum(line.bytes for line in trace.trace(recipe, box).lines if line.name not in ("allocator slack", "library workspace"))


def test_the_grid_is_wide():
    assert len(GRID) >= 20
    assert {recipe.get("method", "lora") for _, recipe in GRID} == {"full", "lora", "qlora"}


@pytest.mark.parametrize(("shape", "changes"), GRID)
def test_traced_is_measured(recipe_of, shape, changes):
    recipe = recipe_of(shape, changes)
    assert traced(recipe) == pytest.approx(measured(recipe), rel=0.01)


DEEP = {"num_hidden_layers": 13, "hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    "changes", [{}, {"checkpoint_layers": 7}, {"method": "full", "micro_batches_per_update": 2}, {"method": "full", **ALL, "max_length": 16}]
)
def test_layers_left_out_are_counted_exactly(recipe_of, monkeypatch, changes):
    """The highest point of the whole and where it is, moment by moment and kind by kind, against a trace of every layer."""
    recipe = recipe_of(DEEP, changes)
    thin = trace.trace(recipe, BOX)
    monkeypatch.setattr(trace, "TRACED", 99)
    every = trace.trace(recipe, BOX)
    assert thin.layers < every.layers == 13
    assert (thin.lines, thin.moment) == (every.lines, every.moment)


def test_a_model_of_any_size_needs_no_memory(tmp_path):
    """70 billion parameters, 80 layers of them checkpointed."""
    config = LlamaConfig(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8, vocab_size=128256)
    config.save_pretrained(tmp_path)
    found = trace.trace(Recipe(model=str(tmp_path), data="none", micro_batch_tokens=4096, dtype="bf16", **ALL), BOX)
    assert found.layers == 5
    assert {line.name: line.bytes for line in found.lines}["weights"] == pytest.approx(2 * 70_553_706_496, rel=1e-6)
    assert found.moment == "backward pass of layer 80"


def test_dropout_keeps_a_byte_a_number_on_a_gpu(recipe_of):
    """One mask each for the inputs of q, k, v, o, gate, up (128 wide) and down (352), in three layers: bf16 on a CPU, one byte on a GPU."""
    plain, recipe = recipe_of({}, {}), recipe_of({}, {"dropout": 0.5})
    gpu = Box(name="test", chip="GPU", memory_bytes=2**40, unified=False, is_gpu=True, runtime_bytes=0.0)
    saved = 256 * (2 * 128 * 6 + 2 * 352 - 128 * 6 - 352)
    on_cpu, on_gpu = traced(recipe) - traced(plain), traced(recipe, gpu) - traced(plain, gpu)
    assert on_cpu - on_gpu == pytest.approx(3 * saved, rel=0.15)  # but for the last layer's, some of which come after the peak


def test_a_config_that_transformers_cannot_make_is_said_so(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "nonsense"}')
    with pytest.raises(ModelError, match="nonsense"):
        trace.trace(Recipe(model=str(tmp_path), data="none"), BOX)


def test_a_plan_carries_its_trace(recipe_of):
    """The trace runs in a process of its own; the closed form and it say the same, and the notes tell."""
    recipe = recipe_of({}, {"dtype": "fp32"})
    plan: Any = sl.plan(recipe, box=BOX, tokens=1e6, trace=True)
    assert plan.traced.peak_bytes == pytest.approx(plan.phases["train"], rel=0.01)
    assert plan.to_dict()["traced_gib"] == plan.traced.peak_bytes / 2**30
    assert any("traced" in note for note in plan.notes)
    assert "traced_gib" not in sl.plan(recipe, box=BOX).to_dict()


def test_an_unknown_family_is_traced_and_said_to_be_so(tmp_path):
    """Starcoder 2 stands for all that nobody itemised. Its weights by arithmetic: embedding, three layers with biases, LayerNorms, untied head."""
    values = {"model_type": "starcoder2", "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
              "num_key_value_heads": 2, "vocab_size": 500, "tie_word_embeddings": False}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(values))
    plan: Any = sl.plan(tmp_path, box=BOX, dtype="fp32", micro_batch_tokens=128, max_length=64)
    attention_numbers = 2 * (64 * 64 + 64) + 2 * (64 * 32 + 32)
    numbers = 2 * 500 * 64 + 3 * (attention_numbers + 2 * 64 * 256 + 256 + 64 + 4 * 64) + 2 * 64
    lines = {line["name"]: line["gib"] * 2**30 for line in plan.to_dict()["lines"]}
    assert lines["weights"] == pytest.approx(4 * numbers, rel=0.002)  # and a few numbers of the rotary tables
    assert plan.best().fits and plan.to_dict()["hours"] == [None, None]
    assert "traced, not itemised" in str(plan) and "traced, not itemised" in plan._repr_html_()
    with pytest.raises(sl.errors.UnknownFamily):
        sl.plan([tmp_path], box=BOX)


def test_what_cannot_be_traced_is_said(tmp_path):
    """GPT-2 keeps its layers elsewhere; the message names the model as it was asked for."""
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ModelError, match=str(tmp_path)):
        sl.plan(tmp_path, box=BOX)
