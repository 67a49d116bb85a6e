"""A model of a few hundred thousand parameters that is a config.json and nothing else, a recipe for it, and a box to plan it on."""

import json

import sparklab as sl
from sparklab.planner.recipe import Recipe
from sparklab.units import GIB

SHAPE = {
    "model_type": "llama", "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 4,
    "vocab_size": 1000, "max_position_embeddings": 4096, "tie_word_embeddings": False,
}  # fmt: skip
BASE = {"data": "none", "dtype": "bf16", "micro_batch_tokens": 256, "max_length": 64, "answer_tokens": 4}


def box(**changes):
    return sl.Box(**{"name": "test", "chip": "CPU", "memory_bytes": 8 * GIB, "unified": False, "is_gpu": False, "fp32_flops": 1e12, **changes})


def recipe(folder, shape=(), **changes):
    """A recipe of a model that is a config.json and nothing else."""
    path = folder / "model" / "config.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**SHAPE, **dict(shape)}))
    return Recipe(**{**BASE, "model": str(path), **changes})
