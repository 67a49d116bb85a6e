"""Every CUDA path of the engine against plain transformers, PEFT and torch on the same device, in one process and about a minute.

Run: python benchmarks/cuda_parity.py [--only WORD ...] [--out FILE]

Small models with random weights, nothing downloaded; ``--only`` takes the cases whose names hold one of the words. A line a case, as soon as it is known:
what was found, and what is wrong with it. An exception is a line too, with its innermost frames of ours, and the next case begins; the exit status is 1 if
anything is wrong. The reference of an update: stock modules, eager attention, one document at a time, fp32 without TF32, from weights that bf16 holds
exactly. What bf16 computes may be 1.5 times as far from it as stock modules in bf16 are. Without a CUDA device all of it runs on the CPU, smaller,
which proves the script.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import logging
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from engine_cuda import tokenizer_of
from parity_updates import (
    CUDA,
    DEVICE,
    FAMILIES,
    LENGTHS,
    SHAPE,
    Catch,
    Quiet,
    Update,
    base,
    distances,
    documents,
    here,
    our_update,
    recipe_of,
    set_adapters,
    stock_update,
    trainer_of,
)
from torch import Tensor
from transformers import PrinterCallback

from sparklab.box import Box
from sparklab.data.dataset import longest_micro_batch, make_row
from sparklab.engine import attention, cudnn, flex, graphs, liger
from sparklab.engine.answer import continuations
from sparklab.engine.checkpoint import step_path
from sparklab.engine.fast import ready_model
from sparklab.engine.gauge import Gauge, asked_bytes
from sparklab.engine.loss import chunked_cross_entropy, full_cross_entropy
from sparklab.engine.mlp import gate_of
from sparklab.engine.trainer import PackedTrainer, mean_loss
from sparklab.model import expert_kernels
from sparklab.model.blank import blank_base
from sparklab.model.experts import Route
from sparklab.model.load import ATTENTION_LINEARS, causal_lm
from sparklab.planner import plan
from sparklab.planner.items import loss_tile
from sparklab.run.rehearsal import UNSEEN_ANYWHERE

ROOT: Final = Path(__file__).resolve().parent.parent
LOSS_FP32, GRADIENT_FP32 = (2e-6, 2e-5) if CUDA else (1e-6, 1e-5)
NEAR_LOSS, NEAR_GRADIENT = 2e-4, 2e-3  # what bf16 may be off beyond 1.5 times stock's own distance
EXPERTS: Final = ["experts.gate_up_proj", "experts.down_proj"]
LONG: Final = (1500, 20, 7, 1030, 77)  # in two rows: one long document with tokens behind it to be filled up with, one at its row's end
WIDTHS: Final = {"llama, heads of 20": {**FAMILIES["llama"], "head_dim": 20}, "llama, heads of 80": {**FAMILIES["llama"], "head_dim": 80}}
# name: (family, fields of the recipe, options of PEFT's LoraConfig)
KINDS: Final[dict[str, tuple[str, dict[str, Any], dict[str, Any]]]] = {
    "checkpointed": ("llama", {"checkpoint_layers": "all"}, {}),
    "checkpointed in part, all logits": ("llama", {"checkpoint_layers": 1, "loss": "full"}, {}),
    "flex, checkpointed": ("gemma2", {"checkpoint_layers": "all"}, {}),
    "NF4": ("llama", {"method": "qlora"}, {}),
    "NF4, checkpointed": ("llama", {"method": "qlora", "checkpoint_layers": "all", "double_quantization": False}, {}),
    "attention alone": ("llama", {"targets": "attention"}, {"target_modules": list(ATTENTION_LINEARS)}),
    "NF4, attention alone": ("gemma2", {"method": "qlora", "targets": "attention"}, {"target_modules": list(ATTENTION_LINEARS)}),
    "DoRA": ("llama", {"dora": True}, {"use_dora": True}),
    "DoRA on NF4": ("llama", {"dora": True, "method": "qlora"}, {"use_dora": True}),
    "rsLoRA": ("llama", {"rank_stabilized": True}, {"use_rslora": True}),
    "adapters on experts": ("qwen3_moe", {"expert_adapters": True}, {"target_parameters": EXPERTS}),
    "adapters on experts, biases": ("gpt_oss", {"expert_adapters": True}, {"target_parameters": EXPERTS}),
    "full": ("llama", {"method": "full"}, {}),
    "full, tied head": ("gemma2", {"method": "full"}, {}),
    "full, mixture": ("qwen3_moe", {"method": "full", "checkpoint_layers": "all"}, {}),
    "stock engine": ("llama", {"engine": "stock"}, {}),
    "stock engine, soft caps": ("gemma2", {"engine": "stock"}, {}),
    "stock engine, mixture": ("qwen3_moe", {"engine": "stock"}, {}),
}


@contextmanager
def patched(module: Any, name: str, value: Any) -> Iterator[None]:
    """Another value under a module's name, for a while."""
    stock = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, stock)


def compare(
    folder: Path, config: dict[str, Any], dtype: str, changes: dict[str, Any], adapter: dict[str, Any], lengths: tuple[int, ...] = LENGTHS
) -> tuple[str, str]:
    """An update of ours beside the reference, in bf16 beside stock's too: what was found, and what is wrong with it."""
    told, rows = documents(lengths), 2
    if dtype == "bf16":  # a near tie sends a token to another expert: here it goes to all of them
        most = next((config[name] for name in ("num_experts", "num_local_experts", "n_routed_experts") if name in config), None)
        config = {**config, **({"num_experts_per_tok": most} if most else {}), **({"topk_group": config["n_group"]} if "n_group" in config else {})}
    recipe = recipe_of(folder, config, dtype=dtype, **changes)
    wanted = stock_update(recipe, torch.float32, told, adapter)
    with patched(flex, "DEVICE", "none" if dtype == "fp32" and config["model_type"] != "gemma2" else "cuda"):  # a variant compiles for seconds
        loss, together, worst, name = distances(wanted, our_update(recipe, told, folder, rows))
    if dtype == "fp32":
        wrong = f"over {LOSS_FP32:g}, {GRADIENT_FP32:g}" if not (loss < LOSS_FP32 and max(worst, together) < GRADIENT_FP32) else ""
        return f"loss {loss:.1e}, worst gradient {worst:.1e} ({short(name)}), together {together:.1e}", wrong
    stock_loss, stock_together, stock_worst, _ = distances(wanted, stock_update(recipe, torch.bfloat16, told, adapter))
    good = loss <= 1.5 * stock_loss + NEAR_LOSS and together <= 1.5 * stock_together + NEAR_GRADIENT
    return (f"loss {loss:.1e} (stock {stock_loss:.1e}), together {together:.1e} ({stock_together:.1e}), worst {worst:.1e} ({stock_worst:.1e}; {short(name)})",
            "" if good else "farther off than stock")  # fmt: skip


def short(name: str) -> str:
    return name.removeprefix("base_model.model.").removeprefix("model.").replace(".default", "").replace(".weight", "")


def learns(folder: Path, changes: dict[str, Any], dtype: str) -> tuple[str, str]:
    """What has no reference to be compared with: that it runs, is finite and moves its weights; 8-bit moments are 8 bits."""
    recipe = recipe_of(folder, FAMILIES["llama"], dtype=dtype, warmup_share=0.0, **changes)
    trainer = trainer_of(recipe, documents(), folder, catch := Catch())
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    finite = all(bool(gradient.isfinite().all()) for gradient in catch.update.gradients.values()) and catch.update.loss == catch.update.loss
    still = [name for name, old in before.items() if torch.equal(old, after[name])]
    optimizer: Any = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    kinds = sorted({str(value.dtype) for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor) and value.numel() > 256})
    wrong = "" if finite else "not finite"
    if still:
        wrong = f"{len(still)} weights did not move, such as {short(still[0])}"
    if recipe.optimizer == "adamw_8bit" and "torch.uint8" not in kinds:
        wrong = "no moments in 8 bits"
    return f"loss {catch.update.loss:.4f}, moments {', '.join(kinds)}", wrong


def box_case(folder: Path) -> tuple[str, str]:
    """What detection says of this machine."""
    box = Box.detect()
    wrong = "" if box.is_gpu == CUDA else f"torch has {'a' if CUDA else 'no'} CUDA device"
    return f"{box.chip}, {box.memory_bytes / 2**30:.1f} GiB, {box.usable_bytes / 2**30:.1f} usable, bf16 {box.resolve_dtype('auto')}", wrong


def liger_trial(folder: Path) -> tuple[str, str]:
    """Liger's kernels, accepted or refused by their own trial."""
    if not CUDA:
        return "nothing of it is asked for on a CPU", ""
    kernels, refused = liger._decide()
    try:
        version = importlib.metadata.version("liger-kernel")
    except importlib.metadata.PackageNotFoundError:
        return "liger-kernel is not installed", ""
    return (f"{version}: norm, rotary positions, gates {sorted(kernels.gated)}" if kernels else version), refused


def experts_trial(folder: Path) -> tuple[str, str]:
    """Our Triton kernels for experts, accepted or refused by their own trial; then each in bf16 beside torch's operations, for 16,384 rows on CUDA."""
    rows, inner, width, k = (16384, 768, 2048, 8) if CUDA else (64, 24, 32, 8)
    draw = {"generator": torch.Generator(DEVICE).manual_seed(5), "device": DEVICE, "dtype": torch.bfloat16}
    gate_up, grad, whole = (torch.randn(rows, many, **draw) for many in (2 * inner, inner, width))
    route = Route.of(torch.arange(rows, device=DEVICE).view(-1, k) % 7, 7, False)
    shares, act = torch.rand(rows // k, k, **draw), gate_of(torch.nn.SiLU())
    assert act is not None
    work = {"gate": lambda: act.halves_product(gate_up), "its gradients": lambda: act.halves_gradients_(grad, gate_up.clone()),
            "sum": lambda: route.gather_sum(whole, shares)}  # fmt: skip
    said, wrong = [], expert_kernels.refusal(DEVICE)
    for name, ours in work.items():
        with patched(expert_kernels, "DEVICE", "none"):
            theirs, plain = ours(), seconds_of(ours)
        distance = float((ours().float() - theirs.float()).norm() / theirs.float().norm())
        said.append(f"{name} {1e6 * seconds_of(ours):.0f} us (torch {1e6 * plain:.0f}), {distance:.1e} apart")
        wrong = wrong or (f"{name} is off" if not distance < 1e-2 else "")
    return "; ".join(said), wrong


def seconds_of(work: Callable[[], Any], times: int = 20) -> float:
    """Of one call, the device waited for at both ends; the first does not count."""
    wait = torch.cuda.synchronize if CUDA else (lambda: None)
    work()
    wait()
    began = time.perf_counter()
    for _ in range(times):
        work()
    wait()
    return (time.perf_counter() - began) / times


FLEX: list[tuple[str, str]] = []
TRIAL: Final = flex._trial


def flex_timed(variant: Any, *given: Any) -> str:
    """A trial of flex_attention, its time with the compiler's and its verdict noted in ``FLEX``."""
    began = time.perf_counter()
    said = TRIAL(variant, *given)
    FLEX.append((f"{time.perf_counter() - began:.1f} s: {str(variant.dtype)[6:]} {list(variant.shapes[0])}, window {variant.window}, cap {variant.cap}, "
                 f"sinks {variant.sinks}, gradients {any(variant.learns)}", said))  # fmt: skip
    return said


def flex_case(folder: Path) -> tuple[str, str]:
    """All trials of the cases before this one."""
    if not CUDA:
        return "flex_attention is for CUDA", ""
    wrong = [f"{what}: {said}" for what, said in FLEX if said]
    return f"{len(FLEX)} trials; " + "; ".join(what for what, _ in FLEX), "; ".join(wrong) or ("" if FLEX else "no trial was made")


def long_case(folder: Path, changes: dict[str, Any]) -> tuple[str, str]:
    """Documents that cuDNN may take, beside short ones; on CUDA what its trials said, which kernel each document took, and that both did something."""
    config, most = {**FAMILIES["llama"], "head_dim": 128}, {"micro_batch_tokens": 2048, "max_length": 2048}
    found, wrong = compare(folder, config, "bf16", {**most, **changes}, {}, LONG)
    if not CUDA:
        return found, wrong
    tried = {kind: verdict for kind, verdict in cudnn.decided.items() if kind.width == 128}
    for kind, verdict in tried.items():
        by = "cuDNN" if verdict.used else "flash attention"
        found += f"; heads {kind.heads}/{kind.kv_heads}, {'from' if kind.long else 'below'} {cudnn.LONG:,} tokens by {by}: {verdict.said}"
    return found, wrong or ("" if tried else "no trial of cuDNN was made")


def cudnn_case(folder: Path, tokens: int) -> tuple[str, str]:
    """The trial of one document with the heads of an 8B: a report, for flash attention is right too."""
    if not CUDA:
        return "cuDNN is for CUDA", ""
    q, k, v = (torch.randn(1, tokens, heads, 128, device=DEVICE, dtype=torch.bfloat16).transpose(1, 2) for heads in (32, 8, 8))
    verdict = cudnn._trial(cudnn.Kind(32, 8, 128, torch.bfloat16, tokens >= cudnn.LONG), [q, k, v], 128**-0.5, attention._varlen)
    return f"by {'cuDNN' if verdict.used else 'flash attention'}: {verdict.said}", ""


def loss_case(folder: Path, dtype: torch.dtype, scale: float, cap: float | None) -> tuple[str, str]:
    """The chunked loss beside all logits at once, both in ``dtype``, against fp32; and the most that it holds beside the plan's figure for it."""
    tokens, hidden, vocabulary = (2048, 1024, 128256) if CUDA else (300, 64, 2000)
    draw = {"generator": torch.Generator(DEVICE).manual_seed(5), "device": DEVICE}
    states = torch.randn(tokens, hidden, **draw).to(torch.bfloat16).to(dtype)
    head = (torch.randn(vocabulary, hidden, **draw) * 0.1).to(torch.bfloat16).to(dtype)
    labels = torch.randint(0, vocabulary, (tokens,), **draw)
    labels[::5] = -100

    def run(function: Callable[..., Tensor], kind: torch.dtype) -> Update:
        leaves = {"states": states.to(kind, copy=True).requires_grad_(), "head": head.to(kind, copy=True).requires_grad_()}
        loss = function(*leaves.values(), labels, 1000.0, scale=scale, cap=cap)
        loss.backward()
        return Update(float(loss), {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None})

    wanted = run(full_cross_entropy, torch.float32)
    ours, stock = (distances(wanted, run(function, dtype)) for function in (chunked_cross_entropy, full_cross_entropy))
    del wanted
    gauge, leaf = Gauge(DEVICE), states.detach().requires_grad_()
    before = asked_bytes(DEVICE, "current") if CUDA else 0
    with gauge.phase("loss"):
        chunked_cross_entropy(leaf, head, labels, 1000.0, scale=scale, cap=cap).backward()
    made = gauge.readings["loss"].tensors_bytes - before
    sizes, width = loss_tile(CUDA), dtype.itemsize
    each = (4 if width < 4 else 0) + (4 if cap else 0)
    counted = min(sizes.tokens, tokens) * vocabulary * width + each * min(sizes.rows, tokens) * vocabulary + tokens * (2 * hidden * width + 32)
    near = LOSS_FP32, GRADIENT_FP32
    good = ours[0] <= near[0] and ours[2] <= near[1] if width == 4 else ours[0] <= 1.5 * stock[0] + NEAR_LOSS and ours[1] <= 1.5 * stock[1] + NEAR_GRADIENT
    wrong = "" if good else "numbers are off"
    if made > counted * 1.02 + 2**20:
        wrong += f" more than the plan's {counted / 2**20:.1f} MiB"
    return f"loss {ours[0]:.1e} (full {stock[0]:.1e}), gradients {ours[1]:.1e} ({stock[1]:.1e}); {made / 2**20:.1f} MiB, planned {counted / 2**20:.1f}", wrong


def answers(folder: Path, family: str, changes: dict[str, Any]) -> tuple[str, str]:
    """Greedy answers of a model that trains, to prompts of two lengths together, beside stock's, one prompt at a time."""
    recipe = recipe_of(folder, FAMILIES[family], **changes)
    model = ready_model(recipe, here(), base)
    model.train()
    prompts, new = [one.input_ids for one in documents((40, 90))], 24
    given = continuations(model, prompts, new, 2, 0, ())
    plain: Any = base(recipe, torch.float32, DEVICE, "eager").eval()
    plain.generation_config.eos_token_id = None
    wanted = [plain.generate(input_ids=torch.tensor([ids], device=DEVICE), max_new_tokens=new, do_sample=False, pad_token_id=0)[0, len(ids):].tolist()
              for ids in prompts]  # fmt: skip
    same = sum(one == other for ours, theirs in zip(given, wanted, strict=True) for one, other in zip(ours, theirs, strict=True))
    back = causal_lm(model).config._attn_implementation == "sparklab_packed" and model.training
    return f"{same} of {2 * new} tokens", "" if same == 2 * new and back else "other tokens" if back else "the model was not put back"


def from_files(folder: Path, method: str) -> tuple[str, str]:
    """A checkpoint read by our loader, trained an update, saved and read again; its held-out loss beside stock's reading of the same files."""
    recipe = recipe_of(folder, FAMILIES["llama"], method=method, warmup_share=0.0, learning_rate=1e-2)
    base(recipe.replace(method="full"), torch.float32, DEVICE, "eager").save_pretrained(folder, max_shard_size="2MB")  # type: ignore[operator]
    tokenizer_of(SHAPE["vocab_size"]).save_pretrained(folder)
    read, made = (ready_model(recipe, here(), maker) for maker in (None, base))
    rows = [make_row(documents())]
    first, second = (mean_loss(model, rows, "chunked", DEVICE)["loss"] for model in (read, made))
    trainer = PackedTrainer(read, recipe, folder / "run", rows, (), callback=Quiet())
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer._save_checkpoint(read, None)
    after = trainer.state.global_step
    moved = mean_loss(read, rows, "chunked", DEVICE)["loss"]
    again = PackedTrainer(ready_model(recipe, here()), recipe.replace(max_steps=after + 1), folder / "run", rows * 2, (), callback=Quiet())
    again._load_from_checkpoint(str(step_path(folder / "run", after)))
    resumed = mean_loss(again.model, rows, "chunked", DEVICE)["loss"]
    wrong = "" if abs(first / second - 1) < 1e-5 else "read weights differ"
    if abs(resumed / moved - 1) > 1e-6 or moved == first:
        wrong = "resumed weights differ" if moved != first else "nothing was learned"
    return f"loss read {first:.6f}, made {second:.6f}; after an update {moved:.6f}, resumed {resumed:.6f}", wrong


def waits(folder: Path, family: str, changes: dict[str, Any]) -> tuple[str, str]:
    """Where an update of two rows waits for the device, by torch's own count (a report: nothing is wrong with a few)."""
    recipe = recipe_of(folder, FAMILIES[family], dtype="bf16", **changes)
    trainer = trainer_of(recipe, documents(), folder, Quiet(), rows=2)
    if not CUDA:
        return "a CPU waits for nothing", ""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            trainer.train()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found: dict[str, int] = {}
    for one in said:
        if "called a synchronizing" in str(one.message):
            place = f"{'/'.join(Path(one.filename).parts[-2:])}:{one.lineno}"
            found[place] = found.get(place, 0) + 1
    many = sorted(found.items(), key=lambda item: -item[1])
    return f"{sum(found.values())} waits: " + ", ".join(f"{place} x{count}" for place, count in many[:12]), ""


def memory(folder: Path, method: str, layers: str) -> tuple[str, str]:
    """The most that two updates hold beside what the plan says of it."""
    size = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 8, "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 32000}
    tokens = 4096
    if not CUDA:
        size, tokens = {"num_hidden_layers": 3, "vocab_size": 8000}, 256
    recipe = recipe_of(folder, {**FAMILIES["llama"], **size}, method=method, dtype="bf16", checkpoint_layers=layers, micro_batch_tokens=tokens,
                       max_length=tokens // 2, max_steps=2, rank=16)  # fmt: skip
    box = here()
    planned = plan(recipe, box=box)
    gauge = Gauge(DEVICE)
    if CUDA:
        torch._C._cuda_clearCublasWorkspaces()  # or that of the cases before stays, and is not seen
    held = asked_bytes(DEVICE, "current") if CUDA else 0
    with gauge.phase("load"):
        model = ready_model(recipe, box, blank_base)
    row = longest_micro_batch(recipe, lambda count: torch.randint(3, 8000, (count,)).tolist())
    with gauge.phase("train"):
        trainer = PackedTrainer(model, recipe, folder / "run", [row] * 2, (), callback=Quiet())
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    unseen = UNSEEN_ANYWHERE if box.is_gpu else {**UNSEEN_ANYWHERE, "library workspace": 1.0}
    reading, counted = gauge.readings["train"], planned.ledger.seen_bytes("train", unseen)
    ratio = (reading.tensors_bytes - held) / counted
    reserved = f", reserved {reading.reserved_bytes / 2**30:.3f}" if CUDA else ""
    return (f"{(reading.tensors_bytes - held) / 2**30:.4f} GiB of {counted / 2**30:.4f} planned ({ratio:.1%}; {planned.ledger.phases['train'][0]}){reserved}",
            "" if 0.9 <= ratio <= 1.0 else "more than planned" if ratio > 1 else "far less than planned")  # fmt: skip


def recorded(folder: Path, family: str, changes: dict[str, Any]) -> tuple[str, str]:
    """Twelve updates, of which CUDA graphs make the later ones, beside the same computed plainly, twice: flash attention adds up in any order."""
    updates, lengths = (12, ((1024,), (300, 260, 250, 128), (512, 500), (64,) * 15)) if CUDA else (1, ((20, 10),))
    each = changes.get("micro_batches_per_update", 2)
    recipe = recipe_of(folder, FAMILIES[family], dtype="bf16", max_steps=updates, learning_rate=1e-3, **{**changes, "micro_batches_per_update": each})

    def train(recording: bool) -> tuple[list[float], Tensor, str]:
        model = ready_model(recipe, here(), base)
        set_adapters(model)
        rows = [make_row(documents(lengths[place % len(lengths)])) for place in range(updates)] * each
        trainer = PackedTrainer(model, recipe, folder / "run", rows, (), callback=Quiet())
        trainer.remove_callback(PrinterCallback)
        if not recording:
            trainer.graphs.refuse("to compare with")
        trainer.train()
        told = [f"{kind}: plainly {min(trial.plain[1:]) * 1e3:.0f} ms, replayed {min(trial.replayed) * 1e3:.0f} ms"
                for kind, trial in trainer.graphs._trials.items() if trial.decided and not trainer.graphs.why_not]  # fmt: skip
        said = trainer.graphs.why_not or "; ".join(told)
        return [line["loss"] for line in trainer.state.log_history if "loss" in line], torch.cat([one.detach().flatten() for one in trainer._learned]), said

    with must_gain(float("inf")):
        (losses, weights, said), (plain, first, _), (_, second, _) = train(True), train(False), train(False)
    off = max(abs(one - other) / other for one, other in zip(losses, plain, strict=True))
    apart, noise = (float((one - other).float().norm() / other.float().norm()) for one, other in ((weights, first), (second, first)))
    wrong = "" if off < 5e-3 and apart <= 2 * noise + 2e-2 else "other numbers"
    return f"{said}; losses {off:.1e} apart, weights {apart:.1e} (two plain runs {noise:.1e})", wrong


@contextmanager
def must_gain(share: float) -> Iterator[None]:
    """Keeps recordings however slow they are."""
    kept = graphs.MUST_GAIN
    graphs.MUST_GAIN = share  # type: ignore[misc]
    try:
        yield
    finally:
        graphs.MUST_GAIN = kept  # type: ignore[misc]


RECORDED: Final[tuple[tuple[str, dict[str, Any]], ...]] = (
    ("llama", {}), ("llama", {"micro_batches_per_update": 1}), ("llama", {"method": "qlora"}), ("qwen2", {}), ("olmo2", {}),
    ("qwen3_moe", {}), ("mixtral", {}), ("deepseek_v3", {}), ("qwen3_moe", {"expert_adapters": True}), ("gemma2", {}), ("gpt_oss", {}),
)  # fmt: skip
Case = Callable[[Path], tuple[str, str]]


def cases() -> dict[str, Case]:
    """Name to what is to be done, in order: what says most first."""
    found: dict[str, Case] = {"box": box_case, "liger's trial": liger_trial, "experts' trial": experts_trial}
    for dtype in ("bf16", "fp32"):
        for family, config in {**FAMILIES, **WIDTHS}.items():
            found[f"{family} {dtype}"] = lambda folder, config=config, dtype=dtype: compare(folder, config, dtype, {}, {})
    for name, (family, changes, adapter) in KINDS.items():
        for dtype in ("fp32", "bf16"):
            given = FAMILIES[family], dtype, changes, adapter
            found[f"{name} {family} {dtype}"] = lambda folder, given=given: compare(folder, *given)
    found |= long_cases()
    for name, changes in {"dropout": {"dropout": 0.1}, "dropout NF4": {"dropout": 0.1, "method": "qlora", "checkpoint_layers": "all"},
                          "adamw_8bit": {"method": "full", "optimizer": "adamw_8bit", "learning_rate": 1e-2}}.items():  # fmt: skip
        found[name] = lambda folder, changes=changes: learns(folder, changes, "bf16")
    for dtype in (torch.float32, torch.bfloat16):
        for scale, cap in ((1.0, None), (0.125, None), (1.0, 30.0)):
            found[f"loss {str(dtype)[6:]}, scale {scale:g}, cap {cap}"] = lambda folder, given=(dtype, scale, cap): loss_case(folder, *given)
    for family, changes in (("llama", {}), ("gemma2", {}), ("gpt_oss", {}), ("qwen3_moe", {}), ("llama", {"method": "qlora"})):
        found[f"answers {family} {changes.get('method', 'lora')}"] = lambda folder, given=(family, changes): answers(folder, *given)
    for method in ("lora", "qlora", "full"):
        found[f"files {method}"] = lambda folder, method=method: from_files(folder, method)
    for family, changes in (("llama", {}), ("llama", {"method": "qlora", "checkpoint_layers": "all"}), ("qwen3_moe", {"expert_adapters": True})):
        found[f"waits {family} {changes.get('method', 'lora')}"] = lambda folder, given=(family, changes): waits(folder, *given)
    for method in ("lora", "qlora", "full"):
        for layers in ("none", "all"):
            found[f"memory {method}, {layers} checkpointed"] = lambda folder, given=(method, layers): memory(folder, *given)
    found |= {f"graphs {family} {' '.join(changes)}".strip(): lambda folder, given=(family, changes): recorded(folder, *given) for family, changes in RECORDED}
    found["flex's trials"] = flex_case
    return found


def long_cases() -> dict[str, Case]:
    """Those of long documents."""
    found: dict[str, Case] = {}
    for name, changes in {"long documents": {}, "long documents, checkpointed": {"checkpoint_layers": "all"}}.items():
        found[name] = lambda folder, changes=changes: long_case(folder, changes)
    for tokens in (1024, 1500, 2048, 4096, 8192, 8000):
        found[f"cuDNN, {tokens:,} tokens"] = lambda folder, tokens=tokens: cudnn_case(folder, tokens)
    return found


def told_of(error: BaseException) -> str:
    """Type, message and the innermost frames of ours."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(str(ROOT)) and "site-packages" not in frame.filename]
    places = " < ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames[-3:][::-1])
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]} [{places}]"


def one(case: Case) -> tuple[str, str]:
    """What a case found and what is wrong with it; nothing of it stays behind."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            return case(Path(folder))
    except Exception as error:  # noqa: BLE001 - whatever it is, it is a line, and the next case begins
        return "", told_of(error)
    finally:
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()


def run(words: list[str], out: Path) -> bool:
    """All cases whose names hold one of the words; whether nothing is wrong."""
    names = ("torch", "transformers", "peft", "triton", "bitsandbytes", "liger-kernel")
    have = {dist.metadata["Name"].lower().replace("_", "-"): dist.version for dist in importlib.metadata.distributions()}
    where = torch.cuda.get_device_name(DEVICE) if CUDA else "no CUDA device: the script's own proof"
    lines = ["# The engine's paths beside plain transformers, PEFT and torch", "", f"`python benchmarks/cuda_parity.py`; {where}; "
             + ", ".join(f"{name} {have[name]}" for name in names if name in have) + ".", "", "| case | found | wrong | s |", "|---|---|---|---|"]  # fmt: skip
    good, began = 0, time.perf_counter()
    chosen = {name: case for name, case in cases().items() if not words or any(word in name for word in words)}
    with patched(flex, "_trial", flex_timed):
        for name, case in chosen.items():
            start = time.perf_counter()
            found, wrong = one(case)
            good += not wrong
            cells = (name, found.replace("|", "/"), wrong.replace("|", "/"), f"{time.perf_counter() - start:.1f}")
            lines.append("| " + " | ".join(cells) + " |")
            print(f"{'FAIL' if wrong else 'ok  '} {cells[3]:>5} s  {name}: {found} {wrong}".rstrip(), flush=True)
            out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    said = f"{good} of {len(chosen)} are right; {time.perf_counter() - began:.0f} s."
    out.write_text("\n".join([*lines, "", said]) + "\n", encoding="utf-8")
    print(said)
    return good == len(chosen) > 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="words of the names of cases")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("sparklab.engine.flex").setLevel(logging.ERROR)  # the last case tells
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    gc.collect()
    gc.freeze()  # what was imported is not looked through again after each case
    sys.exit(0 if run(asked.only, asked.out) else 1)


if __name__ == "__main__":
    main()
