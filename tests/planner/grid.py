"""The ledger against the trace: every family at its real widths, on paper and by following the storages of the real step.

Two layers, and in families that alternate both kinds among them: what many more add is held exact in test_trace.py.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from family_configs import REAL

from sparklab.box import Box
from sparklab.engine.trace import STAYS, trace
from sparklab.model.anatomy import Anatomy
from sparklab.planner.ledger import Ledger
from sparklab.planner.recipe import Recipe

LAYERS = 2
BOX = Box(name="test", chip="CPU", memory_bytes=2**50, unified=False, is_gpu=False)
GPU = Box(name="test", chip="GPU", memory_bytes=2**50, unified=False, is_gpu=True)
UNSEEN = {"runtime": 1.0, "allocator slack": 1.0, "library workspace": 1.0}
ALL = {"checkpoint_layers": "all"}
# so that two layers show what many do: a window that is shorter than a document, and layers with and without one, positions, experts
BOTH_KINDS = {
    "gemma2": {"sliding_window": 384},
    "gemma3_text": {"sliding_window": 384, "sliding_window_pattern": 2},
    "mistral": {"sliding_window": 384},
    "smollm3": {"no_rope_layer_interval": 2},
    "deepseek_v2": {"first_k_dense_replace": 1},
    "deepseek_v3": {"first_k_dense_replace": 1},
    "qwen3_moe": {"mlp_only_layers": [0]},
}

# Changes of a recipe of 2048 tokens in bf16, documents of at most 512.
RECIPES: list[dict[str, Any]] = [
    {},
    {**ALL, "micro_batch_tokens": 3072, "max_length": 1536, "optimizer": "adamw_8bit"},
    {"checkpoint_layers": 1, "rank": 64, "micro_batch_tokens": 2560, "max_length": 1280},
    {"adapter_dtype": "fp32", **ALL, "engine": "stock"},
    {"adapter_dtype": "fp32", "rank": 8, "targets": "attention", "micro_batch_tokens": 1500, "max_length": 750},
    {"loss": "full", "micro_batch_tokens": 1024, "max_length": 1024, "engine": "stock"},
    {"dtype": "fp32", "checkpoint_layers": 1, "rank": 128, "optimizer": "adamw_8bit"},
    {"micro_batches_per_update": 2, "rank": 256, **ALL, "max_length": 2048},
    {"method": "qlora"},
    {"method": "qlora", **ALL, "micro_batch_tokens": 3072, "max_length": 1024, "rank": 32},
    {"method": "qlora", "double_quantization": False, "rank": 64, "checkpoint_layers": 1, "optimizer": "adamw_8bit", "engine": "stock"},
    {"method": "qlora", "adapter_dtype": "fp32", "dropout": 0.1, **ALL},
    {"method": "full"},
    {"method": "full", **ALL, "micro_batch_tokens": 3072, "max_length": 1024, "optimizer": "adamw_8bit"},
    {"method": "full", "dtype": "fp32", "loss": "full", "micro_batch_tokens": 512, "micro_batches_per_update": 2, "checkpoint_layers": 1},
]


MOST_APART = 0.02
_DENSE = ("llama", "mistral", "qwen2", "qwen3", "gemma", "smollm3", "olmo2", "granite", "phi3", "gpt_neox")
MODELS = tuple([model for model, values in REAL.items() if (values["model_type"] in _DENSE) is dense] for dense in (True, False))


class Compared(NamedTuple):
    """Ledger / trace."""

    peak: float
    """Of all bytes that have a storage."""
    moving: float
    """Of those among them that come and go."""


def thinned(values: dict[str, Any]) -> dict[str, Any]:
    """The text part of a config, with few layers."""
    values = values.get("text_config", values)
    return {**values, "num_hidden_layers": LAYERS, **BOTH_KINDS.get(values["model_type"], {})}


def write_config(folder: Path, model: str) -> str:
    """The thinned config of one of REAL; its path."""
    path = folder / model.replace(" ", "-") / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(thinned(REAL[model])), encoding="utf-8")
    return str(path)


def compared(path: str, changes: dict[str, Any]) -> Compared:
    """One point of the grid."""
    warnings.simplefilter("ignore")  # transformers has opinions on configs
    recipe = Recipe(**{"model": path, "data": "none", "dtype": "bf16", "micro_batch_tokens": 2048, "max_length": 512, **changes})
    box = GPU if recipe.dropout else BOX
    seen = [line for line in trace(recipe, box).lines if line.name not in UNSEEN]
    ledger = Ledger(Anatomy.read(path), recipe, box)
    planned, stays = ledger.seen_bytes("train", UNSEEN), sum(item.size_bytes for item in (*ledger.weights, *ledger.states))
    moving = sum(line.bytes for line in seen if line.name not in STAYS)
    return Compared(planned / sum(line.bytes for line in seen), (planned - stays) / moving)


def check(model: str, folder: Path) -> None:
    """Every recipe with one model: no peak may be more than 2 % apart; prints the worst."""
    path = write_config(folder, model)
    ratios = [compared(path, changes) for changes in RECIPES]
    worst = max(range(len(ratios)), key=lambda number: abs(ratios[number].peak - 1))
    print(f"{model}: worst of {len(ratios)} is {ratios[worst].peak:.4f} (of what comes and goes {ratios[worst].moving:.4f}), {RECIPES[worst]}")
    apart = [(ratio.peak, changes) for ratio, changes in zip(ratios, RECIPES, strict=True) if abs(ratio.peak - 1) > MOST_APART]
    assert not apart, f"{model}: {apart}"
