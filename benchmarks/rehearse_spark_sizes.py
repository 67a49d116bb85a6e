"""Not yet run on a GPU as it stands: what has is the same training step in ``engine_cuda.py``, planned beside allocated. A test runs ``--small`` on a CPU.

Rehearses the sizes a 128 GB box is bought for, on whatever CUDA device runs this, held to the memory such a box has: 8B and 32B LoRA,
30B-A3B LoRA (mixture of experts) and 70B QLoRA, each at full size with random weights, with the settings the planner chooses for that much
memory. Nothing is downloaded: the shapes are below.

    python benchmarks/rehearse_spark_sizes.py                    # on a CUDA device with at least that much memory
    python benchmarks/rehearse_spark_sizes.py --small            # the same at toy size, on a CPU

Writes one row a model, failures included, to ``rehearse_spark_sizes.md`` and ``.json`` beside this file, or in ``--out``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import sparklab as sl
from sparklab.errors import SparklabError
from sparklab.units import GIB

SPARK_BYTES: Final = 119.0 * GIB  # what a Spark's system sees of its 128 GB, rounded down

LLAMA: Final[dict[str, Any]] = {"model_type": "llama", "vocab_size": 128256, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
                                "max_position_embeddings": 131072, "tie_word_embeddings": False}  # fmt: skip
QWEN: Final[dict[str, Any]] = {"vocab_size": 151936, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "head_dim": 128,
                               "max_position_embeddings": 40960, "tie_word_embeddings": False}  # fmt: skip

# name: (method, config.json)
SIZES: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "8b-lora": ("lora", {**LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                         "num_attention_heads": 32, "num_key_value_heads": 8}),
    "32b-lora": ("lora", {**QWEN, "model_type": "qwen3", "hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64,
                          "num_attention_heads": 64, "num_key_value_heads": 8}),
    "30b-a3b-lora": ("lora", {**QWEN, "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48,
                              "num_attention_heads": 32, "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8,
                              "moe_intermediate_size": 768, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}),
    "70b-qlora": ("qlora", {**LLAMA, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
                            "num_attention_heads": 64, "num_key_value_heads": 8}),
}  # fmt: skip

# The same families at toy size.
SMALL: Final[dict[str, Any]] = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
                                "vocab_size": 512, "head_dim": 16}  # fmt: skip
SMALL_EXPERTS: Final[dict[str, Any]] = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
SMALL_RECIPE: Final[dict[str, Any]] = {"micro_batch_tokens": 256, "max_length": 64, "answer_tokens": 4}


def rehearse_one(name: str, small: bool) -> dict[str, Any]:
    """One row: the rehearsal's JSON, or the error in its place."""
    method, config = SIZES[name]
    if small:
        config = {**config, **SMALL, **(SMALL_EXPERTS if "num_experts" in config else {})}
    here = sl.Box.detect()
    box = here if small else dataclasses.replace(here, name=f"{here.chip} held to a Spark's memory", available_bytes=SPARK_BYTES, reserve_bytes=0.0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(config))
        try:
            recipe = sl.plan(path, box=box, method=method, **(SMALL_RECIPE if small else {})).best().recipe
            content = sl.rehearse(recipe, box=box, on_phase=lambda phase: print(f"{name}: {phase} ...", flush=True)).to_dict()
        except SparklabError as error:
            content = error.to_dict()
    return {"name": name, **content}


def row_of(content: dict[str, Any]) -> list[str]:
    """A row of the table."""
    if "error" in content:
        return [content["name"], f"{content['error']}: {content['fact']}".replace("\n", " ").replace("|", "/"), *[""] * (len(HEADS) - 2)]
    recipe, phases = content["recipe"], content["phases"]
    worst = max(phases.values(), key=lambda phase: abs(phase["ratio"] - 1))
    train = phases["train"]
    with_slack = sum(line["gib"] for line in content["lines"] if line["phase"] == "train" and line["name"] != "runtime")

    def shown(value: float | None, form: str) -> str:
        return "N/A" if value is None else format(value, form)

    return [
        content["name"], f"{recipe['micro_batch_tokens']} tokens, {recipe['checkpoint_layers']} checkpointed", f"{train['planned_gib']:.3f}",
        f"{train['measured_gib']:.3f}", f"{train['ratio']:.1%}", f"{with_slack:.3f}", shown(train["reserved_gib"], ".3f"),
        f"{worst['ratio']:.1%} ({next(name for name, phase in phases.items() if phase is worst)})", f"{content['tokens_per_second_measured']:,.0f}",
        shown(content["tflops"], ".3g"), shown(content["roofline_share"], ".1%"), shown(content["watts"], ".0f"), f"{content['seconds']:.0f}",
    ]  # fmt: skip


HEADS: Final = (
    "model",
    "settings",
    "planned",
    "allocated",
    "of plan",
    "planned with slack",
    "reserved",
    "worst phase",
    "tokens/s",
    "TFLOP/s",
    "of peak",
    "W",
    "s",
)


def table(rows: list[dict[str, Any]], command: str) -> str:
    """The markdown file."""
    device = next((row["device"] for row in rows if "device" in row), platform.processor() or "unknown")
    lines = [
        "# Rehearsals at the sizes of a 128 GB box", "",
        f"`{command}` on {device}, {time.strftime('%Y-%m-%d')}. Sizes in GiB, of the training step: what the plan says of tensors, what the allocator gave out",
        "and what it held. On a CPU tensors are followed storage by storage, and nothing is reserved.", "",
        "| " + " | ".join(HEADS) + " |", "|" + "---|" * len(HEADS),
    ]  # fmt: skip
    return "\n".join([*lines, *("| " + " | ".join(row_of(row)) + " |" for row in rows)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="toy sizes, for a CPU")
    parser.add_argument("--only", nargs="+", choices=tuple(SIZES), default=tuple(SIZES), help="some of the models")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder for the table and the JSON")
    options = parser.parse_args()
    if not options.small and not sl.Box.detect().is_gpu:
        parser.error("no CUDA device here; --small runs the same at toy size")
    rows = []
    stem = "rehearse_spark_sizes" + ("_small" if options.small else "")
    command = "python benchmarks/rehearse_spark_sizes.py" + (" --small" if options.small else "")
    for name in options.only:
        rows.append(rehearse_one(name, options.small))
        # after each one, so that what is known stays known if the next ends it all
        (options.out / f"{stem}.json").write_text(json.dumps(rows, indent=1) + "\n")
        (options.out / f"{stem}.md").write_text(table(rows, command))
    print(table(rows, command))


if __name__ == "__main__":
    main()
