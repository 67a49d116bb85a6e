"""sparklab's training step beside TRL's on a CPU: the same model, the same documents, the same machine, taking turns.

Run: python benchmarks/engine_cpu.py [--repeats 3] [--updates 5] [--suite speed|memory|losses|qlora|135m|growth|all]   writes benchmarks/engine_cpu.md

TRL goes into a folder of its own on top of this environment (``pip install --no-deps --target``), so torch, transformers and PEFT are the same on both
sides. Each measurement is a process of its own: model of random weights, ragged chats of 16 to 1,024 random tokens (log-normal, median 134), LoRA
of rank 16 on all linear layers, bf16. Tokens per second are those of documents, padding left out, from the second update on. ``trl`` is SFTTrainer
as it comes (batch 8, gradient checkpointing, fp32 adapters under bf16 autocast); ``trl-packed`` packs to rows of 2,048 without checkpointing;
``trl-best`` has bf16 adapters and no autocast as well. ``products`` is what remains if nothing but the frozen layers' own matrix products is done.
In the suite ``losses`` both sides take the same eight documents an update in the same order, from the same weights and adapters, and learn them.
"""

# ruff: noqa: PLC0415 - each process imports what it measures, and no more
from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import SequentialSampler
from trl_beside import TRL, trl_folder

HERE = Path(__file__).resolve().parent
ROW = 2048
BATCH = 8  # documents an update, as TRL comes
LEARNING_RATE = 2e-3
SHAPES: dict[str, dict[str, Any]] = {
    "41m": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 32000},
    "135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152},
    "toy": {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 500},
}  # fmt: skip
# (variants, shape, length of every document or None for ragged ones, whether storages are followed)
SUITES: dict[str, list[tuple[list[str], str, int | None, bool]]] = {
    "speed": [(["ours", "trl", "trl-packed", "trl-best", "products"], "41m", None, False)],
    "memory": [(["ours", "trl", "trl-best"], "41m", None, True)],
    "losses": [(["ours-ordered", "trl-ordered"], "41m", None, False)],
    "qlora": [(["ours-qlora", "trl-qlora"], "41m", None, False)],
    "135m": [(["ours", "trl-best", "products"], "135m", None, False)],
    "growth": [(["ours", "trl-best"], "41m", length, False) for length in (512, 1024, 2048, 4096, 8192)],
}


def config(shape: str, row: int) -> Any:
    """A Llama of that shape."""
    from transformers import LlamaConfig

    return LlamaConfig(**SHAPES[shape], max_position_embeddings=max(4096, row), tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=0)


def documents(vocabulary: int, length: int | None, count: int = 512, learnable: bool = False) -> list[list[int]]:
    """Random tokens in documents of one length, or of ragged ones; ``learnable``: a few of them often (Zipf's law)."""
    draw = np.random.default_rng(0)
    lengths = np.clip(draw.lognormal(4.9, 0.7, count).astype(int), 16, 1024) if length is None else [length] * count
    if learnable:
        return [np.minimum(2 + draw.zipf(1.2, size), vocabulary - 1).tolist() for size in lengths]
    return [draw.integers(3, vocabulary, size).tolist() for size in lengths]


def tokenizer(vocabulary: int) -> Any:
    """One whose words are t0, t1, ...; the documents are numbers already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"t{number}": number for number in range(vocabulary)}, unk_token="t0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0", eos_token="t2", bos_token="t1")


def set_adapters(model: Any) -> None:
    """A of every adapter from its own name, so that both sides begin alike."""
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            made = np.random.default_rng(zlib.crc32(name.split("model.", 1)[-1].encode())).normal(0, 0.02, tuple(parameter.shape))
            parameter.data.copy_(torch.from_numpy(made))


class Clock:
    """Times between updates, the document tokens of each, and its loss."""

    def __init__(self) -> None:
        self.ends: list[float] = [time.perf_counter()]
        self.worked: list[float] = [time.process_time()]
        self.tokens: list[int] = []
        self.losses: list[float] = []

    def rate(self) -> float:
        return sum(self.tokens[1:]) / (self.ends[-1] - self.ends[1])

    def rate_of_work(self) -> float:
        """Tokens a second that the process was given of a core: what holds where others use the machine too (with one thread)."""
        return sum(self.tokens[1:]) / (self.worked[-1] - self.worked[1])


def callback(clock: Clock) -> Any:
    """Tells the clock when an update ends."""
    from transformers import TrainerCallback

    class Told(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            clock.ends.append(time.perf_counter())
            clock.worked.append(time.process_time())
            control.should_save = control.should_evaluate = False

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            clock.losses += [float(logs["loss"])] if "loss" in (logs or {}) else []

    return Told()


def packed(documents: list[list[int]], row: int) -> list[list[list[int]]]:
    """Documents in rows, the longest first, each in the first row with room; the rows in an order by chance."""
    packs: list[list[list[int]]] = []
    for document in sorted(documents, key=len, reverse=True):
        place = next((pack for pack in packs if sum(map(len, pack)) + len(document) <= row), None)
        packs.append([document]) if place is None else place.append(document)
    return [packs[index] for index in np.random.default_rng(1).permutation(len(packs))]


def ours(shape: str, length: int | None, updates: int, method: str, ordered: bool) -> Clock:
    """The worker's own model, rows and Trainer."""
    from transformers import AutoModelForCausalLM, PrinterCallback

    from sparklab.box import Box
    from sparklab.data.dataset import make_row
    from sparklab.data.template import Document
    from sparklab.engine.fast import ready_model
    from sparklab.engine.trainer import PackedTrainer
    from sparklab.model.blank import blank_base
    from sparklab.planner.recipe import Recipe

    folder = Path(tempfile.mkdtemp())
    row = max(ROW, length or 0)
    recipe = Recipe(model=str(folder), data="none", micro_batch_tokens=row, max_length=row, max_steps=updates, dtype="bf16", held_out=0.0)
    torch.manual_seed(0)
    if ordered:
        AutoModelForCausalLM.from_config(config(shape, row), dtype=torch.bfloat16).save_pretrained(folder)
        tokenizer(SHAPES[shape]["vocab_size"]).save_pretrained(folder)
        learned = documents(SHAPES[shape]["vocab_size"], length, learnable=True)
        packs = [learned[at : at + BATCH] for at in range(0, updates * BATCH, BATCH)]
        recipe = recipe.replace(micro_batch_tokens=max(sum(map(len, pack)) for pack in packs), max_length=1024, learning_rate=LEARNING_RATE)
    else:
        config(shape, row).save_pretrained(folder)
        packs = packed(documents(SHAPES[shape]["vocab_size"], length), row)[:updates]
    rows = [make_row([Document(ids, [-100, *ids[1:]]) for ids in pack]) for pack in packs]
    model = ready_model(recipe.replace(method=method), Box.detect(), None if ordered else blank_base)
    if ordered:
        set_adapters(model)
    clock = Clock()
    trainer = PackedTrainer(model, recipe, folder, rows, (), callback=callback(clock))
    trainer.remove_callback(PrinterCallback)
    if ordered:
        trainer._get_train_sampler = lambda *_: SequentialSampler(rows)
    step = trainer.training_step
    trainer.training_step = lambda model, inputs, *rest: (clock.tokens.append(inputs["input_ids"].numel()), step(model, inputs, *rest))[1]
    clock.ends = [time.perf_counter()]
    trainer.train()
    return clock


def trl(shape: str, length: int | None, updates: int, variant: str) -> Clock:
    """SFTTrainer on the same documents."""
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    from sparklab.engine.trainer import training_arguments
    from sparklab.planner.recipe import Recipe

    row = max(ROW, length or 0)
    vocabulary = SHAPES[shape]["vocab_size"]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(shape, row), dtype=torch.bfloat16, attn_implementation="sdpa")
    lora: Any = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    settings: dict[str, Any] = {"per_device_train_batch_size": BATCH, "max_length": 1024, "bf16": True}
    if variant in ("trl-packed", "trl-best"):
        settings = {"packing": True, "per_device_train_batch_size": 1, "max_length": row, "gradient_checkpointing": False, "bf16": True}
    if variant == "trl-ordered":
        ours_says = training_arguments(Recipe(model="none", data="none", max_steps=updates, learning_rate=LEARNING_RATE), Path(), updates, held_out=False)
        alike = ("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "adam_beta1", "adam_beta2", "max_grad_norm", "optim")
        settings |= {"per_device_train_batch_size": BATCH, **{name: getattr(ours_says, name) for name in alike}}
    if variant == "trl-qlora":
        folder = tempfile.mkdtemp()
        model.save_pretrained(folder)
        packed = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16, bnb_4bit_use_double_quant=True)
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=packed, dtype=torch.bfloat16, attn_implementation="sdpa")
        model = prepare_model_for_kbit_training(model)
    if variant == "trl-best":
        model = get_peft_model(model.requires_grad_(False), lora, autocast_adapter_dtype=False)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
        lora, settings["bf16"] = None, False
    arguments = SFTConfig(
        output_dir=tempfile.mkdtemp(), max_steps=updates, report_to=[], logging_steps=1, save_strategy="no", disable_tqdm=True, use_cpu=True, **settings
    )
    clock = Clock()
    data = Dataset.from_dict({"input_ids": documents(vocabulary, length, learnable=variant == "trl-ordered")})
    trainer = SFTTrainer(model, args=arguments, train_dataset=data, processing_class=tokenizer(vocabulary), peft_config=lora, callbacks=[callback(clock)])
    if variant == "trl-ordered":
        set_adapters(trainer.model)
        trainer._get_train_sampler = lambda *_: SequentialSampler(data)
    step = trainer.training_step

    def counted(model: Any, inputs: Any, *rest: Any) -> Any:
        mask = inputs.get("attention_mask")
        clock.tokens.append(inputs["input_ids"].numel() if mask is None else int(mask.sum()))
        return step(model, inputs, *rest)

    trainer.training_step = counted
    clock.ends = [time.perf_counter()]
    trainer.train()
    return clock


def products(shape: str, updates: int, dtype: torch.dtype = torch.bfloat16) -> float:
    """Tokens a second if a step were its frozen matrix products alone: each layer's forward and dX, the head's twice."""
    values = SHAPES[shape]
    hidden, inner = values["hidden_size"], values["intermediate_size"]
    head_dim = hidden // values["num_attention_heads"]
    keys = values["num_key_value_heads"] * head_dim
    pairs = [(hidden, hidden, 2), (hidden, keys, 2), (hidden, inner, 3)]
    seconds = 0.0
    for inputs, outputs, often in [*((i, o, n * values["num_hidden_layers"]) for i, o, n in pairs), (hidden, values["vocab_size"], 1)]:
        x, weight, back = torch.randn(ROW, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype), torch.randn(ROW, outputs).to(dtype)
        timed = []
        for _ in range(max(3, updates)):
            began = time.perf_counter()
            torch.mm(x, weight.t())
            torch.mm(back, weight)
            timed.append(time.perf_counter() - began)
        seconds += often * statistics.median(timed[1:])
    return ROW / seconds


def one(variant: str, shape: str, length: int | None, updates: int, follow: bool) -> dict[str, Any]:
    """One measurement, in this process."""
    if variant == "products":
        return {"rate": products(shape, updates), "rate_fp32": products(shape, updates, torch.float32)}
    from sparklab.engine.storages import StorageTracker

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracker = StorageTracker()
    if follow:
        tracker.__enter__()  # type: ignore[no-untyped-call]
    if variant.startswith("ours"):
        clock = ours(shape, length, updates, "qlora" if variant.endswith("qlora") else "lora", variant.endswith("ordered"))
    else:
        clock = trl(shape, length, updates, variant)
    if follow:
        tracker.__exit__(None, None, None)  # type: ignore[no-untyped-call]
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "rate": clock.rate(), "rate_of_work": clock.rate_of_work(), "losses": clock.losses,
        "storages_gib": tracker.peak_bytes / 2**30 if follow else None, "rss_gib": rss / 2**20,
        "growth_gib": (rss - before) / 2**20, "tokens": clock.tokens,
    }  # fmt: skip


def measure(variant: str, shape: str, length: int | None, updates: int, follow: bool, extra: Path | None) -> dict[str, Any]:
    """One measurement in a process of its own."""
    command = [sys.executable, __file__, "--one", variant, "--shape", shape, "--updates", str(updates), *(["--length", str(length)] if length else [])]
    path = os.pathsep.join([str(HERE.parent), *filter(None, [str(extra or ""), os.environ.get("PYTHONPATH")])])
    environ = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run([*command, *(["--follow"] if follow else [])], env=environ, capture_output=True, text=True, check=False, timeout=1800)
    if result.returncode:
        raise SystemExit(f"{variant}: {result.stderr[-3000:]}")
    values: dict[str, Any] = json.loads(result.stdout.strip().splitlines()[-1])
    print(variant, shape, length or "ragged", {key: value for key, value in values.items() if key != "tokens"}, flush=True)
    return values


def machine() -> str:
    """Chip, threads and versions."""
    from importlib.metadata import version

    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    chip = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown CPU")
    flags = next((line for line in lines if line.startswith("flags")), "")
    has = ", ".join(name for name in ("avx512_bf16", "amx_bf16") if name in flags) or "neither avx512_bf16 nor amx_bf16"
    return f"{chip} ({has}), {torch.get_num_threads()} threads; " + ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))


def report(suite: str, results: dict[tuple[str, str, int | None], list[dict[str, Any]]], how: str) -> list[str]:
    """The suite's table: medians of all repetitions, and how many times each other one's rate and peaks ours are."""
    lines = [
        "",
        how,
        "",
        "| variant | shape | documents | tokens/s, median (all) | ours is | peak storages GiB | peak RSS GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for (variant, shape, length), found in results.items():
        base = next((rows for (name, one, size), rows in results.items() if name.startswith("ours") and (one, size) == (shape, length)), found)
        each = ", ".join(f"{row['rate']:.0f}" for row in found)
        more = f" (fp32: {_median(found, 'rate_fp32'):.0f})" if "rate_fp32" in found[0] else ""
        lines.append(
            f"| {variant} | {shape} | {length or 'ragged'} | {_median(found, 'rate'):.0f} ({each}){more} | {_times(base, found, 'rate')} "
            f"| {_peak(base, found, 'storages_gib')} | {_peak(base, found, 'rss_gib')} |"
        )
    if suite == "losses":
        lines += ["", *side_by_side([found[0] for found in results.values()])]
    return [*lines, ""]


def _median(found: list[dict[str, Any]], name: str) -> float:
    return statistics.median(row[name] for row in found)


def _times(base: list[dict[str, Any]], found: list[dict[str, Any]], name: str) -> str:
    return "" if base is found else f"{_median(base, name) / _median(found, name):.2f}x"


def _peak(base: list[dict[str, Any]], found: list[dict[str, Any]], name: str) -> str:
    if found[0].get(name) is None:
        return ""
    return f"{_median(found, name):.2f}" + (f" ({times})" if (times := _times(base, found, name)) else "")


def side_by_side(sides: list[dict[str, Any]]) -> list[str]:
    """Every update's tokens and losses, ours first, and how far apart they are."""
    ours, theirs = sides
    apart = [abs(one / other - 1) for one, other in zip(ours["losses"], theirs["losses"], strict=True)]
    same = "the same" if ours["tokens"] == theirs["tokens"] else "NOT the same"
    lines = [f"Largest difference of an update's loss: {max(apart):.2e} of it; the tokens are {same}."]
    lines += ["", "| update | " + " | ".join(str(number + 1) for number in range(len(apart))) + " |", "|---" * (len(apart) + 1) + "|"]
    return lines + [f"| {name} | " + " | ".join(f"{loss:.4f}" for loss in side["losses"]) + " |" for name, side in (("ours", ours), ("TRL", theirs))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--updates", type=int, default=5)
    parser.add_argument("--suite", default="all", choices=[*SUITES, "all"])
    parser.add_argument("--out", type=Path, default=HERE / "engine_cpu.md")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--shape", default="41m", choices=list(SHAPES), help=argparse.SUPPRESS)
    parser.add_argument("--length", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--follow", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(one(asked.one, asked.shape, asked.length, asked.updates, asked.follow)))
        return
    extra = trl_folder()
    asked.out.touch()
    sections = dict(part.split("\n", 1) for part in asked.out.read_text(encoding="utf-8").split("\n## ")[1:])
    for suite in SUITES if asked.suite == "all" else [asked.suite]:
        results: dict[tuple[str, str, int | None], list[dict[str, Any]]] = {}
        for variants, shape, length, follow in SUITES[suite]:
            for _ in range(1 if follow or suite == "losses" else asked.repeats):  # taking turns; bytes and losses do not vary
                for variant in variants:
                    results.setdefault((variant, shape, length), []).append(measure(variant, shape, length, asked.updates, follow, extra))
        how = f"`python benchmarks/engine_cpu.py --suite {suite} --repeats {asked.repeats} --updates {asked.updates}`; {machine()}; {TRL}."
        sections[suite] = "\n".join(report(suite, results, how))
        kept = [f"## {name}\n{sections[name]}" for name in SUITES if name in sections]
        asked.out.write_text("# The engine on a CPU, beside TRL\n\n" + "\n".join(kept), encoding="utf-8")
    print(asked.out.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
