"""The training step at real size on one CUDA device: random weights, nothing downloaded. Not run yet: no device could be had when it was written.

Run: python benchmarks/engine_cuda.py [--case NAME] [--updates 6] [--peers]   writes benchmarks/engine_cuda.md

Each case is a process of its own. It prints tokens per second (no padding: rows are full), the share of the bf16 matrix-product ceiling measured in the
same process that the arithmetic LoRA needs makes of it (4 x linear weights + head's 4 + causal attention's 7 x T x width a layer; recompute not counted),
and the peak that the allocator gave out and held. With ``--peers`` the same model goes through TRL and PEFT (Liger where it can be imported).
"""

# ruff: noqa: PLC0415 - each process imports what it measures, and no more
from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

DENSE = {"model_type": "llama", "vocab_size": 128256, "max_position_embeddings": 16384, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2}
LLAMA_8B = {**DENSE, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
LLAMA_70B = {**DENSE, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8}
QWEN_32B = {**DENSE, "vocab_size": 151936, "hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64, "num_attention_heads": 64,
            "num_key_value_heads": 8, "head_dim": 128}  # fmt: skip
QWEN_30B_A3B = {"model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "moe_intermediate_size": 768, "intermediate_size": 6144,
                "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
                "num_experts_per_tok": 8, "norm_topk_prob": True, "max_position_embeddings": 16384, "tie_word_embeddings": False}  # fmt: skip
TOY = {**DENSE, "vocab_size": 500, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
# name: (config, method, tokens in a row, which is one document, layers checkpointed)
CASES: dict[str, tuple[dict[str, Any], str, int, str]] = {
    "8b-lora-2048": (LLAMA_8B, "lora", 2048, "none"),
    "8b-lora-8192": (LLAMA_8B, "lora", 8192, "all"),
    "8b-qlora-2048": (LLAMA_8B, "qlora", 2048, "none"),
    "8b-qlora-8192": (LLAMA_8B, "qlora", 8192, "all"),
    "32b-lora-2048": (QWEN_32B, "lora", 2048, "all"),
    "70b-qlora-2048": (LLAMA_70B, "qlora", 2048, "all"),
    "30b-a3b-lora-2048": (QWEN_30B_A3B, "lora", 2048, "all"),
    "toy": (TOY, "lora", 128, "none"),
}


def device() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ceiling(size: int) -> float:
    """bf16 matrix products a second, in FLOP/s: the best of ten of ``size`` cubed."""
    a, b = (torch.randn(size, size, device=device(), dtype=torch.bfloat16) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        wait()
        began = time.perf_counter()
        torch.mm(a, b)
        wait()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def needed_flops(config: dict[str, Any], tokens: int) -> float:
    """FLOP a token that a LoRA step needs: forward and dX of every weight a token meets (4 N), and of causal attention 2 T width x (1 + 2.5)."""
    hidden, layers, heads = config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]
    head_dim = config.get("head_dim", hidden // heads)
    attention = hidden * head_dim * (2 * heads + 2 * config["num_key_value_heads"])
    inner = config["num_experts_per_tok"] * config["moe_intermediate_size"] if "num_experts" in config else config["intermediate_size"]
    weights = layers * (attention + 3 * hidden * inner) + hidden * config["vocab_size"]
    return float(4 * weights + 7 * tokens * heads * head_dim * layers)


def ours(config: dict[str, Any], method: str, tokens: int, layers: str, updates: int) -> list[float]:
    """Seconds of each update by the worker's own model and Trainer."""
    from transformers import AutoConfig, PrinterCallback, TrainerCallback

    from sparklab.box import Box
    from sparklab.data.dataset import make_row
    from sparklab.data.template import Document
    from sparklab.engine.fast import ready_model
    from sparklab.engine.trainer import PackedTrainer
    from sparklab.model.blank import blank_base
    from sparklab.planner.recipe import Recipe

    folder = Path(tempfile.mkdtemp())
    values = dict(config)
    AutoConfig.for_model(values.pop("model_type"), **values).save_pretrained(folder)
    settings: dict[str, Any] = {"method": method, "checkpoint_layers": layers, "micro_batch_tokens": tokens, "max_length": tokens, "max_steps": updates}
    recipe = Recipe(model=str(folder), data="none", dtype="bf16", held_out=0.0, **settings)
    ids = torch.randint(3, config["vocab_size"], (tokens,)).tolist()
    ends = []

    class Told(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            wait()
            ends.append(time.perf_counter())
            control.should_save = False

    rows = [make_row([Document(ids, [-100, *ids[1:]])])] * updates
    trainer = PackedTrainer(ready_model(recipe, Box.detect(), blank_base), recipe, folder, rows, (), callback=Told())
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return [later - earlier for earlier, later in itertools.pairwise(ends)]


def peer(config: dict[str, Any], method: str, tokens: int, layers: str, updates: int) -> list[float]:
    """The same through TRL and PEFT, rows full, Liger's kernels where they can be imported."""
    from importlib.util import find_spec

    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    if method == "qlora":
        raise SystemExit("TRL loads 4-bit weights from files only; compare QLoRA on a model that is there")
    values = dict(config)
    with device():
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values), dtype=torch.bfloat16)
    ends = []

    class Told(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            wait()
            ends.append(time.perf_counter())

    data = Dataset.from_dict({"input_ids": torch.randint(3, config["vocab_size"], (updates, tokens)).tolist()})
    arguments = SFTConfig(
        output_dir=tempfile.mkdtemp(), max_steps=updates, per_device_train_batch_size=1, max_length=tokens, gradient_checkpointing=layers == "all", bf16=True,
        use_liger_kernel=find_spec("liger_kernel") is not None, report_to=[], save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    SFTTrainer(model, args=arguments, train_dataset=data, peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"), callbacks=[Told()]).train()
    return [later - earlier for earlier, later in itertools.pairwise(ends)]


def one(name: str, updates: int, by: str) -> dict[str, float]:
    """One case in this process."""
    config, method, tokens, layers = CASES[name]
    top = ceiling(8192 if torch.cuda.is_available() else 256)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    seconds = sorted((ours if by == "ours" else peer)(config, method, tokens, layers, updates))
    rate = tokens / seconds[len(seconds) // 2]
    gib = (torch.cuda.max_memory_allocated() / 2**30, torch.cuda.max_memory_reserved() / 2**30) if torch.cuda.is_available() else (float("nan"),) * 2
    return {
        "tokens_per_second": rate,
        "share": rate * needed_flops(config, tokens) / top,
        "ceiling_tflops": top / 1e12,
        "allocated_gib": gib[0],
        "reserved_gib": gib[1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=list(CASES))
    parser.add_argument("--updates", type=int, default=6)
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--one", choices=["ours", "peer"], help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(one(asked.case, asked.updates, asked.one)))
        return
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device here")
    lines = ["# The engine on CUDA", "", f"`python benchmarks/engine_cuda.py`; {torch.cuda.get_device_name(0)}, torch {torch.__version__}.", ""]
    lines += ["| case | by | tokens/s | share of the ceiling | ceiling TFLOP/s | allocated GiB | reserved GiB |", "|---|---|---|---|---|---|---|"]
    for name in [asked.case] if asked.case else [name for name in CASES if name != "toy"]:
        for by in ("ours", "peer") if asked.peers else ("ours",):
            command = [sys.executable, __file__, "--case", name, "--one", by, "--updates", str(asked.updates)]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode:
                lines.append(f"| {name} | {by} | failed: {(result.stderr.strip().splitlines() or ['no word'])[-1][:200]} | | | | |")
                continue
            found = json.loads(result.stdout.strip().splitlines()[-1])
            lines.append(f"| {name} | {by} | {found['tokens_per_second']:,.0f} | {found['share']:.1%} | {found['ceiling_tflops']:.0f} "
                         f"| {found['allocated_gib']:.2f} | {found['reserved_gib']:.2f} |")  # fmt: skip
        (Path(__file__).parent / "engine_cuda.md").write_text("\n".join([*lines, ""]), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
