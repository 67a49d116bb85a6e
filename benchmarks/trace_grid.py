"""The ledger against the trace: every family at its real widths, on paper and by following the storages of the real step.

    python benchmarks/trace_grid.py [MODEL ...]

Prints every point more than 2 % apart and the worst, and ends with status 1 where there is one; all models take about six minutes on two cores.
Not yet a test, because it is not yet clean: benchmarks/LOG.md, "Ledger against trace".
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from sparklab.box import Box
from sparklab.engine.trace import STAYS, trace
from sparklab.model.anatomy import Anatomy
from sparklab.planner.ledger import Ledger
from sparklab.planner.recipe import Recipe

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from family_configs import REAL

LAYERS = 3  # what many more add is tested in test_trace.py, and the trace takes as long as it has different layers
BOX = Box(name="test", chip="CPU", memory_bytes=2**50, unified=False, is_gpu=False)
GPU = Box(name="test", chip="GPU", memory_bytes=2**50, unified=False, is_gpu=True)
UNSEEN = {"runtime": 1.0, "allocator slack": 1.0, "library workspace": 1.0}
ALL = {"checkpoint_layers": "all"}

# Changes of a recipe of 2048 tokens in bf16.
RECIPES: list[dict[str, Any]] = [
    {},
    {**ALL, "micro_batch_tokens": 8192},
    {"checkpoint_layers": 2, "rank": 64, "micro_batch_tokens": 4096, "max_length": 1024},
    {"rank": 8, "targets": "attention", "micro_batch_tokens": 1024, "max_length": 512},
    {"adapter_dtype": "fp32", **ALL},
    {"adapter_dtype": "fp32", "targets": "attention", "micro_batch_tokens": 3000},
    {"dropout": 0.1, "checkpoint_layers": 1},
    {"loss": "full", "micro_batch_tokens": 1024, "max_length": 1024},
    {"dtype": "fp32", "checkpoint_layers": 3},
    {"micro_batches_per_update": 2, "rank": 256, **ALL},
    {"method": "qlora"},
    {"method": "qlora", **ALL, "micro_batch_tokens": 8192, "max_length": 1024},
    {"method": "qlora", "double_quantization": False, "rank": 64, "checkpoint_layers": 3},
    {"method": "qlora", "adapter_dtype": "fp32", "dropout": 0.1, **ALL},
    {"method": "full"},
    {"method": "full", **ALL, "micro_batch_tokens": 8192, "max_length": 1024},
    {"method": "full", "dtype": "fp32", "loss": "full", "micro_batch_tokens": 512, "max_length": 512, "micro_batches_per_update": 2},
]
MOST_APART = 0.02


def thinned(values: dict[str, Any]) -> dict[str, Any]:
    """The text part of a config, with few layers; families that alternate show both kinds among them."""
    return {**values.get("text_config", values), "num_hidden_layers": LAYERS}


def compared(path: str, changes: dict[str, Any]) -> tuple[float, float]:
    """Ledger / trace: of all bytes that have a storage, and of those among them that come and go."""
    warnings.simplefilter("ignore")  # in a process of its own, transformers has opinions on configs
    recipe = Recipe(**{"model": path, "data": "none", "dtype": "bf16", "micro_batch_tokens": 2048, "max_length": 512, **changes})
    box = GPU if recipe.dropout else BOX
    seen = [line for line in trace(recipe, box).lines if line.name not in UNSEEN]
    ledger = Ledger(Anatomy.read(path), recipe, box)
    planned, stays = ledger.seen_bytes("train", UNSEEN), sum(item.size_bytes for item in (*ledger.weights, *ledger.states))
    moving = sum(line.bytes for line in seen if line.name not in STAYS)
    return planned / sum(line.bytes for line in seen), (planned - stays) / moving


def main() -> int:
    models = sys.argv[1:] or list(REAL)
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        found = {}
        for model in models:
            path = Path(folder) / model.replace("/", "--") / "config.json"
            path.parent.mkdir()
            path.write_text(json.dumps(thinned(REAL[model])), encoding="utf-8")
            found |= {(model, number): pool.submit(compared, str(path), changes) for number, changes in enumerate(RECIPES)}
        apart, failed = {}, 0
        for (model, number), point in found.items():
            try:
                apart[model, number] = point.result()[0]
            except Exception as error:  # noqa: BLE001 - whatever torch cannot trace is a failure to show
                failed += 1
                print(f"{model} {RECIPES[number]}: {type(error).__name__}: {error}")
                continue
            if abs(apart[model, number] - 1) > MOST_APART:
                print(f"{model} {RECIPES[number]}: ledger / trace {apart[model, number]:.4f}", flush=True)
    wrong = sum(abs(ratio - 1) > MOST_APART for ratio in apart.values())
    worst = max(apart, key=lambda point: abs(apart[point] - 1))
    print(f"{len(found)} points, {wrong} more than {MOST_APART:.0%} apart, {failed} not traced; worst {apart[worst]:.4f} ({worst[0]}, {RECIPES[worst[1]]})")
    return int(wrong + failed > 0)


if __name__ == "__main__":
    sys.exit(main())
