"""LoRA on the experts of one layer at its real width: what is kept for the backward pass, the most held, and the time, beside PEFT's own path.

Run: python benchmarks/expert_adapters.py [--tokens N] [--repeat N]

One layer of Qwen3-30B-A3B (128 experts of 768, 8 a token, width 2,048) in bf16 with random weights, LoRA of rank 16. Bytes are storages followed by
sparklab's own tracker; the layer's weights and adapters are left out. Repetitions alternate.
"""

import argparse
import statistics
import time
import warnings
from types import SimpleNamespace

import torch
from peft import LoraConfig, get_peft_model
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from sparklab.engine.storages import StorageTracker
from sparklab.model.experts import target_experts

MIB = 2**20


def layer(fast: bool) -> torch.nn.Module:
    """The adapted experts."""
    config = SimpleNamespace(num_experts=128, hidden_size=2048, moe_intermediate_size=768, hidden_act="silu", _experts_implementation="grouped_mm")
    with torch.device("meta"):
        module = torch.nn.ModuleDict({"experts": Qwen3MoeExperts(config)}).to(torch.bfloat16)
    module = module.to_empty(device="cpu").requires_grad_(False)
    for parameter in module.parameters():
        parameter.data.normal_(std=0.02)
    chosen = LoraConfig(r=16, lora_alpha=32, target_modules=[])
    target_experts(chosen, module, fast=fast)
    return get_peft_model(module, chosen, autocast_adapter_dtype=False)


def measure(model: torch.nn.Module, tokens: int) -> tuple[float, float, float]:
    """(kept, most held, seconds) of a forward and a backward pass; the seconds are of a second pass, which nobody follows."""
    experts = model.base_model.model["experts"]
    torch.manual_seed(0)
    x = torch.randn(tokens, 2048, dtype=torch.bfloat16, requires_grad=True)
    index = torch.stack([torch.randperm(128)[:8] for _ in range(tokens)])
    shares = torch.rand(tokens, 8, dtype=torch.bfloat16, requires_grad=True)

    def run() -> None:
        experts(x, index, shares).sum().backward()
        model.zero_grad(set_to_none=True)

    tracker = StorageTracker()
    for tensor in (*model.parameters(), x, index, shares):
        tracker.watch(tensor)
    stays = tracker.now_bytes
    with tracker:
        out = experts(x, index, shares).sum()
        kept = tracker.now_bytes - stays
        out.backward()
    model.zero_grad(set_to_none=True)
    del out
    began = time.perf_counter()
    run()
    return kept, tracker.peak_bytes - stays, time.perf_counter() - began


def main() -> None:
    """Prints a row for each path."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    models = {"PEFT": layer(fast=False), "sparklab": layer(fast=True)}
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in models}
    for _ in range(options.repeat):
        for name, model in models.items():
            found[name].append(measure(model, options.tokens))
    for name, rows in found.items():
        kept, peak, seconds = (statistics.median(column) for column in zip(*rows, strict=True))
        print(f"{name:<10} {options.tokens} tokens: kept {kept / MIB:8.1f} MiB, most held {peak / MIB:8.1f} MiB, {seconds * 1e3:8.0f} ms")


if __name__ == "__main__":
    main()
