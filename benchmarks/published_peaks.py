"""Peaks that others have published, against the ledger of the stack they ran: writes benchmarks/published_peaks.md.

    python benchmarks/published_peaks.py

Nothing is run: each row is a figure somebody measured on an A100 with stock transformers and PEFT, and what the closed form says for the same
recipe. Where a choice of theirs is not published, the row says which was assumed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparklab.box import Box
from sparklab.model.anatomy import from_config
from sparklab.planner.recipe import Recipe
from sparklab.planner.stock import Stack, StockLedger
from sparklab.units import GIB

BAR = 0.05
BOX = Box(name="a100", chip="A100", memory_bytes=80 * GIB, unified=False, is_gpu=True)
NAMES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")


def shape(*numbers: int, tied: bool = False) -> dict[str, Any]:
    """A Llama-like config from its six numbers."""
    return {"model_type": "llama", **dict(zip(NAMES, numbers, strict=True)), "tie_word_embeddings": tied}


def fused(config: dict[str, Any]) -> dict[str, Any]:
    """The same with one weight for queries, keys and values (and, which holds as much, one for gate and up)."""
    return {**config, "model_type": "phi3", "pad_token_id": 0}


MISTRAL_7B = shape(4096, 14336, 32, 32, 8, 32000)
LLAMA2_7B = shape(4096, 11008, 32, 32, 32, 32000)
LLAMA2_13B = shape(5120, 13824, 40, 40, 40, 32000)
LLAMA2_70B = shape(8192, 28672, 80, 64, 8, 32000)
LLAMA3_8B = shape(4096, 14336, 32, 32, 8, 128256)
LLAMA32_3B = shape(3072, 8192, 28, 24, 8, 128256, tied=True)


@dataclass(frozen=True, kw_only=True)
class Published:
    """One figure."""

    what: str
    config: dict[str, Any]
    batch: int
    length: int
    gib: float
    stack: Stack
    recipe: dict[str, Any]
    reserved: bool = False
    """The figure is what the allocator had reserved, not what was allocated."""
    note: str = ""


ATTENTION = {"rank": 16, "targets": "attention", "checkpoint_layers": "all"}
OLD = Stack(version="4.48")
GB = 1e9 / GIB
LITGPT = Stack(version="4.48", autocast=False, adapter_dtype="auto", copies_attention=True, keeps_unpacked_inputs=True)
ITS_NOTE = "LitGPT of October 2023: one weight for queries, keys and values, dropout 0.05, bf16 adapters, bitsandbytes 0.41; its loss taken for that of 4.48"
ROWS = [
    Published(what="Mistral-7B LoRA r16 q/k/v/o", config=MISTRAL_7B, batch=4, length=4096, gib=24.87, stack=OLD, recipe=ATTENTION),
    Published(what="Mistral-7B QLoRA r16 q/k/v/o", config=MISTRAL_7B, batch=4, length=4096, gib=15.25, stack=OLD, recipe={**ATTENTION, "method": "qlora"}),
    Published(what="Llama-2-70B QLoRA r16 q/k/v/o", config=LLAMA2_70B, batch=4, length=4096, gib=63.45, stack=OLD, recipe={**ATTENTION, "method": "qlora"}),
    Published(what="Llama-3-8B LoRA r16 q/k/v/o", config=LLAMA3_8B, batch=4, length=4096, gib=35.06, stack=Stack(version="4.45 with a fused loss"),
              recipe=ATTENTION, note="fused kernels: taken for a loss in place; fused norms are not modelled"),
    Published(what="Llama-3.2-3B LoRA r32 q/v, no checkpointing", config=LLAMA32_3B, batch=4, length=768, gib=20.76, stack=Stack(version="4.48", masked=True),
              recipe={"rank": 32, "targets": ("q_proj", "v_proj")}, reserved=True, note="up to 768 tokens: padded to 768 assumed, and the version"),
    *(Published(what=f"Llama-2-{size}B {what}", config=config, batch=batch, length=1304, gib=decimal * GB, stack=LITGPT, note=ITS_NOTE,
                recipe={"rank": 8, "targets": "qkv_proj", "dropout": 0.05, **more})
      for size, config, what, batch, decimal, more in (
          (7, fused(LLAMA2_7B), "LoRA r8 q/v", 1, 21.30, {}),
          (7, fused(LLAMA2_7B), "LoRA r8 q/v", 2, 29.07, {}),
          (7, fused(LLAMA2_7B), "QLoRA r8 q/v, NF4", 1, 14.14, {"method": "qlora", "double_quantization": False}),
          (7, fused(LLAMA2_7B), "QLoRA r8 q/v, NF4 double", 1, 13.84, {"method": "qlora"}),
          (13, fused(LLAMA2_13B), "LoRA r8 q/v", 1, 38.12, {}),
          (13, fused(LLAMA2_13B), "QLoRA r8 q/v, NF4", 1, 23.14, {"method": "qlora", "double_quantization": False}),
          (13, fused(LLAMA2_13B), "QLoRA r8 q/v, NF4 double", 1, 22.55, {"method": "qlora"}),
      )),
]  # fmt: skip


def planned_gib(row: Published) -> float:
    """What the ledger says was allocated (or reserved) at the highest moment of the training step."""
    tokens = row.batch * row.length
    recipe = Recipe(**{"model": row.what, "data": "theirs", "dtype": "bf16", "micro_batch_tokens": tokens, "max_length": row.length, **row.recipe})
    ledger = StockLedger(from_config(row.config, row.what), recipe, BOX, row.stack)
    return ledger.seen_bytes("train", {"runtime": 0.0, **({} if row.reserved else {"allocator slack": 0.0})}) / GIB


def table() -> str:
    """The figures side by side, the failures in."""
    lines = ["| what | batch x length | transformers | published GiB | planned GiB | ratio | |", "|---|---|---|---|---|---|---|"]
    for row in ROWS:
        planned = planned_gib(row)
        missed = "" if abs(planned / row.gib - 1) <= BAR else "missed; "
        kind = " reserved" if row.reserved else ""
        lines.append(f"| {row.what} | {row.batch} x {row.length} | {row.stack.version} | {row.gib:.2f}{kind} | {planned:.2f} | {planned / row.gib:.3f} | "
                     f"{missed}{row.note} |")  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    """Writes the table."""
    text = f"""# Published peaks against the closed form

Written by `python benchmarks/published_peaks.py`. Published: measured by others on an A100. Planned: `sparklab.planner.stock.StockLedger`, nothing run.
Allocated unless it says reserved; the bar is {BAR:.0%}.

{table()}
"""
    Path(__file__).with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
