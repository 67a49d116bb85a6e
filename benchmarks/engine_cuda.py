"""The training step at real size on one CUDA device, beside TRL with PEFT and Unsloth.

Run: python benchmarks/engine_cuda.py [--case NAME ...] [--by ours trl unsloth] [--updates 6] [--repeats 1] [--unsloth PYTHON] [--out FILE]

Random weights at real size, nothing downloaded but TRL, which goes into a folder of its own. Unsloth wants other versions of some packages: ``--unsloth``
is the interpreter of an environment that has it, and it reads a checkpoint, so random weights are written to disk for it. Whatever is missing, does not
fit or fails is a row that says so.

Each measurement is a process of its own, started ahead so that it only computes once its turn comes; the sides take turns. A row is one document as long
as itself, so nothing is padded, and packing would add nothing for anybody. Adapters of rank 16 on all linear layers (of a mixture: on attention). Ours
checkpoints as many layers as its plan for this device's free memory says; the others none where that fits, else all. TRL comes with Liger's kernels
where they can be imported, fp32 adapters and bf16 autocast (4 bits: bf16 adapters), as it comes. Tokens a second are the median of ``--updates``
after some to warm up (compiling; ours finds out whether CUDA graphs pay), with the slowest and the fastest; beside it the share of the bf16
matrix-product ceiling measured in the same process that the arithmetic makes which LoRA needs (4 x the weights a token meets, head included, and causal
attention's 7 x T x width a layer; recompute not counted), what the plan says of tensors, and the peak that the allocator gave out and held. Without a
CUDA device the toy goes through all of it on the CPU, which proves the script and measures nothing.
"""

# ruff: noqa: PLC0415 - each process imports what it measures, and no more
from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from trl_beside import trl_folder

HERE = Path(__file__).resolve().parent
SIDES = ("ours", "trl", "unsloth")
WARM = {"ours": 7, "trl": 3, "unsloth": 3}
"""Updates that are left out. Ours times rows plainly and from CUDA graphs in the first six."""
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
DENSE = {"model_type": "llama", "vocab_size": 128256, "max_position_embeddings": 16384, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2}
LLAMA_8B = {**DENSE, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
LLAMA_70B = {**DENSE, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8}
QWEN_32B = {**DENSE, "vocab_size": 151936, "hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64, "num_attention_heads": 64,
            "num_key_value_heads": 8, "head_dim": 128}  # fmt: skip
QWEN_30B_A3B = {"model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "moe_intermediate_size": 768, "intermediate_size": 6144,
                "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
                "num_experts_per_tok": 8, "norm_topk_prob": True, "max_position_embeddings": 16384, "tie_word_embeddings": False}  # fmt: skip
TOY = {**DENSE, "vocab_size": 500, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
TOY_MIXTURE = {**QWEN_30B_A3B, "vocab_size": 500, "hidden_size": 64, "moe_intermediate_size": 32, "intermediate_size": 160, "num_hidden_layers": 2,
               "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 8, "num_experts_per_tok": 2,
               "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
# name: (config, method, tokens in a row, which is one document, layers that the others checkpoint: "fits" is none, and all where memory runs out)
CASES: dict[str, tuple[dict[str, Any], str, int, str]] = {
    "8b-lora-2048": (LLAMA_8B, "lora", 2048, "fits"),
    "8b-lora-8192": (LLAMA_8B, "lora", 8192, "all"),
    "8b-qlora-2048": (LLAMA_8B, "qlora", 2048, "fits"),
    "8b-qlora-8192": (LLAMA_8B, "qlora", 8192, "all"),
    "32b-lora-2048": (QWEN_32B, "lora", 2048, "all"),
    "70b-qlora-2048": (LLAMA_70B, "qlora", 2048, "all"),
    "30b-a3b-lora-2048": (QWEN_30B_A3B, "lora", 2048, "fits"),
    "toy": (TOY, "lora", 128, "none"),
    "toy-qlora": (TOY, "qlora", 128, "all"),
    "toy-mixture": (TOY_MIXTURE, "lora", 128, "all"),
}
TOYS = [name for name in CASES if name.startswith("toy")]


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


def ends_of_updates() -> tuple[Any, list[float]]:
    """A callback, and the times at which updates end, which it fills."""
    from transformers import TrainerCallback

    ends: list[float] = []

    class Told(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            wait()
            ends.append(time.perf_counter())
            control.should_save = control.should_evaluate = False

    return Told(), ends


def write_config(config: dict[str, Any], folder: Path) -> None:
    from transformers import AutoConfig

    values = dict(config)
    AutoConfig.for_model(values.pop("model_type"), **values).save_pretrained(folder)


def tokenizer_of(vocabulary: int) -> Any:
    """Words t0, t1 ...: the trainers of others ask for a tokenizer though the rows are tokens already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"t{number}": number for number in range(vocabulary)}, unk_token="t0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0", bos_token="t1", eos_token="t2", unk_token="t0")


def tokens_of(config: dict[str, Any], tokens: int, updates: int) -> list[list[int]]:
    torch.manual_seed(0)
    rows: list[list[int]] = torch.randint(3, config["vocab_size"], (updates, tokens)).tolist()
    return rows


def recipe_of(folder: Path, method: str, layers: str, tokens: int, updates: int) -> Any:
    from sparklab.planner.recipe import Recipe

    settings: dict[str, Any] = {"method": method, "checkpoint_layers": layers, "micro_batch_tokens": tokens, "max_length": tokens, "max_steps": updates}
    return Recipe(model=str(folder), data="none", dtype="bf16", held_out=0.0, rank=16, alpha=32.0, **settings)


def planned_recipe(config: dict[str, Any], method: str, tokens: int, layers: str, updates: int, folder: Path) -> tuple[Any, float]:
    """Our recipe, with as many layers checkpointed as ``layers`` says or, where it is "plan", as the plan for this machine does; and GiB of tensors planned."""
    from sparklab.planner.solver import plan
    from sparklab.run.rehearsal import UNSEEN_ANYWHERE
    from sparklab.units import GIB

    write_config(config, folder)
    recipe = recipe_of(folder, method, "none" if layers == "plan" else layers, tokens, updates)
    if layers == "plan":
        kept = {key: value for key, value in recipe.to_dict().items() if key not in ("model", "method", "checkpoint_layers")}
        recipe = plan(str(folder), method=recipe.method, **kept).best().recipe
    return recipe, plan(recipe).ledger.seen_bytes("train", UNSEEN_ANYWHERE) / GIB


def ours(config: dict[str, Any], method: str, tokens: int, layers: str, updates: int, folder: Path) -> tuple[list[float], dict[str, Any]]:
    """Seconds of each update by the worker's own model and Trainer; and what was planned."""
    from transformers import PrinterCallback

    from sparklab.box import Box
    from sparklab.data.dataset import make_row
    from sparklab.data.template import Document
    from sparklab.engine.fast import ready_model
    from sparklab.engine.trainer import PackedTrainer
    from sparklab.model.blank import blank_base

    recipe, planned_gib = planned_recipe(config, method, tokens, layers, updates, folder)
    rows = [make_row([Document(ids, [-100, *ids[1:]])]) for ids in tokens_of(config, tokens, updates)]
    told, ends = ends_of_updates()
    trainer = PackedTrainer(ready_model(recipe, Box.detect(), blank_base), recipe, folder, rows, (), callback=told)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    notes = [told_of_graphs(trainer.graphs)]
    if torch.cuda.is_available():  # what tensors asked for, which is what a plan counts: a block may be up to 1 MiB larger
        notes.append(f"{torch.cuda.memory_stats()['requested_bytes.all.peak'] / 2**30:.2f} GiB asked for")
    return durations(ends), {"checkpointed": str(recipe.checkpoint_layers), "planned_gib": planned_gib, "note": "; ".join(filter(None, notes))}


def told_of_graphs(graphs: Any) -> str:
    """What the trial of CUDA graphs found."""
    if graphs.why_not:
        return f"no CUDA graphs: {graphs.why_not}"
    rows = [trial for trial in graphs._trials.values() if trial.decided]
    return "; ".join(f"a row plainly {1e3 * min(trial.plain[1:]):.0f} ms, from graphs {1e3 * min(trial.replayed):.0f} ms" for trial in rows)


def durations(ends: list[float]) -> list[float]:
    return [later - earlier for earlier, later in itertools.pairwise(ends)]


def trl(config: dict[str, Any], method: str, tokens: int, layers: str, updates: int, folder: Path) -> list[float]:
    """The same through TRL and PEFT. Weights are made in place, in 4 bits by transformers' own quantiser, since TRL would read them from files."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    from sparklab.model.blank import blank_base

    write_config(config, folder)
    attention = "flash_attention_2" if torch.cuda.is_available() and find_spec("flash_attn") is not None else "sdpa"
    model: Any = blank_base(recipe_of(folder, method, layers, tokens, updates), torch.bfloat16, device(), attention)
    told, ends = ends_of_updates()
    targets: Any = ATTENTION if "num_experts" in config else "all-linear"
    arguments = SFTConfig(
        output_dir=str(folder), max_steps=updates, per_device_train_batch_size=1, max_length=tokens, gradient_checkpointing=layers == "all", bf16=True,
        use_liger_kernel=torch.cuda.is_available() and find_spec("liger_kernel") is not None, report_to=[], save_strategy="no", disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM")
    data = Dataset.from_dict({"input_ids": tokens_of(config, tokens, updates)})
    SFTTrainer(model, args=arguments, train_dataset=data, processing_class=tokenizer_of(config["vocab_size"]), peft_config=lora, callbacks=[told]).train()
    return durations(ends)


def unsloth(config: dict[str, Any], method: str, tokens: int, layers: str, updates: int, folder: Path) -> list[float]:
    """The same through Unsloth, which reads weights from files and works on its own versions of transformers and TRL.

    What it sets otherwise than TRL does is set back where it would change the work: two rows an update, AdamW in 8 bits, a line of log each update.
    """
    FastLanguageModel = import_module("unsloth").FastLanguageModel  # before the others: it changes what comes after it
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    folder = Path(tempfile.gettempdir()) / f"sparklab-bench-{zlib.crc32(json.dumps(config).encode())}"  # one checkpoint for all cases of a model
    folder.mkdir(exist_ok=True)
    write_checkpoint(config, folder)
    recompute: Any = "unsloth" if layers == "all" else False
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=tokens, dtype=torch.bfloat16, load_in_4bit=method == "qlora", load_in_16bit=method != "qlora",
        use_exact_model_name=True, use_gradient_checkpointing=recompute, local_files_only=True,
    )  # fmt: skip
    modules = ATTENTION if "num_experts" in config else [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
    model = FastLanguageModel.get_peft_model(
        model, r=16, target_modules=modules, lora_alpha=32, lora_dropout=0.0, bias="none", use_gradient_checkpointing=recompute, random_state=0
    )
    told, ends = ends_of_updates()
    arguments = SFTConfig(
        output_dir=str(folder), max_steps=updates, per_device_train_batch_size=1, gradient_accumulation_steps=1, max_length=tokens, bf16=True,
        gradient_checkpointing=layers == "all", optim="adamw_torch_fused", logging_steps=10, report_to=[], save_strategy="no", disable_tqdm=True,
        dataset_num_proc=1, use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    data = Dataset.from_dict({"input_ids": tokens_of(config, tokens, updates)})
    SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer, callbacks=[told]).train()
    return durations(ends)


def on_meta(config: dict[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    values = dict(config)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values), dtype=torch.bfloat16)


def checkpoint_bytes(config: dict[str, Any]) -> int:
    return 2 * sum(parameter.numel() for parameter in on_meta(config).parameters())


def write_checkpoint(config: dict[str, Any], folder: Path) -> None:
    """Random weights as files, some GB at a time, with a tokenizer; once a folder. Ends the process where the disk has no room for them."""
    from safetensors.torch import save_file

    index = folder / "model.safetensors.index.json"
    if index.exists():
        return
    model = on_meta(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    size = checkpoint_bytes(config)
    if (free := shutil.disk_usage(folder).free) < 1.05 * size:
        raise SystemExit(f"its checkpoint of random weights takes {size / 1e9:.0f} GB and {free / 1e9:.0f} GB of disk are free")
    write_config(config, folder)
    tokenizer_of(config["vocab_size"]).save_pretrained(folder)
    places: dict[str, str] = {}
    waiting: dict[str, torch.Tensor] = {}
    for number, (name, shape) in enumerate(shapes.items()):
        made = torch.ones(shape, dtype=torch.bfloat16) if len(shape) == 1 else torch.empty(shape, dtype=torch.bfloat16, device=device()).normal_(0, 0.02)
        waiting[name] = made.cpu()
        if number == len(shapes) - 1 or sum(tensor.nbytes for tensor in waiting.values()) > 4e9:
            file = f"model-{len(set(places.values())) + 1:05}.safetensors"
            save_file(waiting, folder / file, metadata={"format": "pt"})
            places |= dict.fromkeys(waiting, file)
            waiting = {}
    index.write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": places}), encoding="utf-8")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def one(name: str, updates: int, by: str) -> dict[str, Any]:
    """One measurement of so many updates, in this process."""
    config, method, tokens, peers = CASES[name]
    updates += WARM[by]
    top = ceiling(8192 if torch.cuda.is_available() else 256)
    told: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if by == "ours":
            seconds, told = ours(config, method, tokens, "plan" if torch.cuda.is_available() else peers.replace("fits", "none"), updates, folder)
        else:
            for layers in ("none", "all") if peers == "fits" else (peers,):
                start_afresh()
                try:
                    seconds = {"trl": trl, "unsloth": unsloth}[by](config, method, tokens, layers, updates, folder)
                    break
                except torch.OutOfMemoryError:
                    if layers == "all":
                        raise
            told = {"checkpointed": layers}
    rates = sorted(tokens / each for each in seconds[WARM[by] - 1 :])
    rate = statistics.median(rates)
    gib = [peak() / 2**30 for peak in (torch.cuda.max_memory_allocated, torch.cuda.max_memory_reserved)] if torch.cuda.is_available() else [float("nan")] * 2
    return {
        "tokens_per_second": rate,
        "least": rates[0],
        "most": rates[-1],
        "share": rate * needed_flops(config, tokens) / top,
        "ceiling_tflops": top / 1e12,
        "planned_gib": float("nan"),
        "allocated_gib": gib[0],
        "reserved_gib": gib[1],
        **told,
        "versions": {package: version_of(package) for package in ("torch", "transformers", "peft", "trl", "unsloth", "liger-kernel", "bitsandbytes")},
    }


def start_afresh() -> None:
    """Gives back what an attempt that ran out of memory left, and forgets its peak."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def version_of(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def started(name: str, by: str, updates: int, python: str, extra: Path | None) -> subprocess.Popen[str] | OSError:
    """The process of a measurement, which loads what it needs and waits for its turn; what the system says where it cannot be."""
    command = [python, __file__, "--case", name, "--one", by, "--updates", str(updates)]
    folders = [str(HERE.parent), *([str(extra)] if extra is not None else []), *filter(None, [os.environ.get("PYTHONPATH")])]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    try:
        return subprocess.Popen(command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    except OSError as error:
        return error


def measure(process: subprocess.Popen[str] | OSError) -> dict[str, Any]:
    """What a process measures once it is its turn; where it fails, ``{"failed": why}``."""
    if isinstance(process, OSError):
        return {"failed": str(process)[:200]}
    try:
        stdout, stderr = process.communicate("go\n", timeout=3600)
    except subprocess.TimeoutExpired as error:
        process.kill()
        return {"failed": str(error)[:200]}
    if process.returncode:
        said = stderr.strip().splitlines() or ["no word"]
        out = [line for line in said if "out of memory" in line.lower()]
        return {"failed": f"out of memory: {out[-1][:160]}" if out else said[-1][:200] if process.returncode > 0 else f"ended by signal {-process.returncode}"}
    found: dict[str, Any] = json.loads(stdout.strip().splitlines()[-1])
    return found


def loaded(by: str) -> None:
    """Imports what a side needs, so that its turn begins with its work."""
    for module in {"ours": ("sparklab.engine.trainer", "sparklab.engine.fast", "bitsandbytes"), "trl": ("trl", "bitsandbytes"), "unsloth": ("unsloth",)}[by]:
        import_module(module)


HEADS = ("case", "by", "layers checkpointed", "tokens/s, median (least to most)", "ours is", "share of the ceiling", "ceiling TFLOP/s", "planned GiB",
         "allocated GiB", "reserved GiB", "notes")  # fmt: skip


def row(name: str, by: str, found: list[dict[str, Any]], base: list[dict[str, Any]]) -> str:
    """A line of the table: medians of what went well, what went wrong in words."""
    good, wrong = ([one for one in found if ("failed" in one) is failed] for failed in (False, True))
    said = f"{len(wrong)} of {len(found)} failed: {wrong[0]['failed']}" if wrong else good[0].get("note", "")
    said = said.replace("|", "/")
    if not good:
        return f"| {name} | {by} {'| ' * (len(HEADS) - 3)}| {said} |"
    told = {key: statistics.median(one[key] for one in good) for key, value in good[0].items() if isinstance(value, float)}
    ours = [one["tokens_per_second"] for one in base if "failed" not in one]
    ratio = f"{statistics.median(ours) / told['tokens_per_second']:.2f}x" if ours and by != "ours" else ""
    spread = f"{min(one['least'] for one in good):,.0f} to {max(one['most'] for one in good):,.0f}"
    planned = "" if told["planned_gib"] != told["planned_gib"] else f"{told['planned_gib']:.2f}"
    return (f"| {name} | {by} | {good[0]['checkpointed']} | {told['tokens_per_second']:,.0f} ({spread}) | {ratio} | {told['share']:.1%} "
            f"| {told['ceiling_tflops']:.4g} | {planned} | {told['allocated_gib']:.2f} | {told['reserved_gib']:.2f} | {said} |")  # fmt: skip


def lacking(by: str, python: str, name: str) -> str:
    """Why a side cannot be measured here at all, in words; "" where it can."""
    if by == "unsloth" and not torch.cuda.is_available():
        return "needs a GPU"
    if by == "unsloth" and (size := checkpoint_bytes(CASES[name][0])) > (free := shutil.disk_usage(tempfile.gettempdir()).free):
        return f"reads weights from files, and those take {size / 1e9:.0f} GB where {free / 1e9:.0f} GB of disk are free"
    if by == "unsloth":
        done = subprocess.run(
            [python, "-c", "import importlib.util as u; print(u.find_spec('unsloth') is not None)"], capture_output=True, text=True, check=False
        )
        if "True" not in done.stdout:
            return "not installed: python -m venv unsloth && unsloth/bin/pip install unsloth, then --unsloth unsloth/bin/python"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=list(CASES))
    parser.add_argument("--by", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--updates", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--unsloth", default=sys.executable, help="interpreter of an environment with Unsloth")
    parser.add_argument("--out", type=Path, default=HERE / "engine_cuda.md")
    parser.add_argument("--one", choices=SIDES, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        loaded(asked.one)
        sys.stdin.readline()
        print(json.dumps(one(asked.case[0], asked.updates, asked.one)))
        return
    names = asked.case or ([case for case in CASES if case not in TOYS] if torch.cuda.is_available() else TOYS)
    take_turns(names, asked)
    print(asked.out.read_text(encoding="utf-8"))


def take_turns(names: list[str], asked: argparse.Namespace) -> None:
    """Measures all that is asked for, the next process loading while the one before computes; writes the table anew after each."""
    where = (
        f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}, CUDA {torch.version.cuda}"
        if torch.cuda.is_available()
        else "no CUDA device: the script's own proof"
    )
    lines = [
        "# The engine on CUDA",
        "",
        f"`python benchmarks/engine_cuda.py {' '.join(sys.argv[1:])}`; {where}.",
        "",
        f"| {' | '.join(HEADS)} |",
        "|---" * len(HEADS) + "|",
    ]
    extra = trl_folder() if "trl" in asked.by else None
    missing = {(name, by): lacking(by, asked.unsloth, name) for name in names for by in asked.by}
    turns = [(name, by) for name in names for _ in range(asked.repeats) for by in asked.by if not missing[name, by]]
    found: dict[tuple[str, str], list[dict[str, Any]]] = {turn: [{"failed": why}] if why else [] for turn, why in missing.items()}
    versions: dict[str, Any] = {}

    def start(turn: tuple[str, str]) -> subprocess.Popen[str] | OSError:
        name, by = turn
        return started(name, by, asked.updates, asked.unsloth if by == "unsloth" else sys.executable, extra if by == "trl" else None)

    waiting = [start(turn) for turn in turns[:1]]
    for number, turn in enumerate(turns):
        waiting += [start(after) for after in turns[number + 1 : number + 2]]
        began = time.perf_counter()
        found[turn].append(measure(waiting.pop(0)))
        print(f"{' by '.join(turn)}: {time.perf_counter() - began:.0f} s", flush=True)
        versions |= {turn[1]: found[turn][-1].get("versions", versions.get(turn[1]))}
        rows = [row(name, by, found[name, by], found.get((name, "ours"), [])) for name in names for by in asked.by if found[name, by]]
        told = "; ".join(f"{by}: {', '.join(f'{k} {v}' for k, v in each.items() if v)}" for by, each in versions.items() if each)
        asked.out.write_text("\n".join([*lines, *rows, "", f"Versions. {told}", ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
