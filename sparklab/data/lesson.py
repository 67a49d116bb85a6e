"""The quickstart's lesson: the bundled model learns to note an order as JSON, which it cannot do before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sparklab.data.world import orders
from sparklab.errors import RecipeError
from sparklab.planner.recipe import METHODS, Method, Recipe

EXAMPLES = 1000
HELD_OUT = 200

# Measured, not derived: see benchmarks/LOG.md.
LEARNING_RATES: dict[str, float] = {"full": 7e-4, "lora": 2e-3, "qlora": 2e-3}


def lesson(method: Method | str, seed: int, folder: str | Path) -> Recipe:
    """Writes ``train`` and ``held_out`` JSONL files (the same for the same seed) into ``folder`` and returns the recipe that learns them.

    Raises RecipeError on an unknown method.
    """
    if method not in METHODS:
        raise RecipeError(f"method is {method!r}", f"choose one of {', '.join(METHODS)}")
    folder = Path(folder)
    train = _write(folder / f"orders-train-{seed}.jsonl", orders("train", EXAMPLES, seed))
    held_out = _write(folder / "orders-held-out.jsonl", orders("held_out", HELD_OUT, 0))
    return Recipe(
        model="tiny", data=str(train), held_out=str(held_out), method=method, rank=16, alpha=32, learning_rate=LEARNING_RATES[method], betas=(0.9, 0.95),
        micro_batch_tokens=640, max_length=128, epochs=1.5, warmup_share=0.08, seed=seed, eval_every=72, answer_held_out=HELD_OUT, answer_tokens=110,
        sample_prompts=(orders("held_out", 1, 0)[0]["messages"][0]["content"],),
    )  # fmt: skip


def _write(file: Path, records: list[dict[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f".{file.name}.new")
    draft.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    draft.replace(file)
    return file
