"""Small models of every family, an update of ours and the same update the plain way, on whatever device there is: what cuda_parity.py compares."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PrinterCallback, TrainerCallback

from sparklab.box import Box
from sparklab.data.dataset import make_row
from sparklab.data.template import Document
from sparklab.engine.fast import ready_model
from sparklab.engine.trainer import PackedTrainer
from sparklab.model.blank import blank_base
from sparklab.model.load import ATTENTION_LINEARS, pick_device, torch_dtype
from sparklab.planner.recipe import Recipe

DEVICE: Final = pick_device()
CUDA: Final = DEVICE.type == "cuda"
LENGTHS: Final = (300, 1, 77, 150, 20)
"""Of the documents: one of a single token, some longer than the windows of 64."""

SHAPE: Final[dict[str, Any]] = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1024,
    "max_position_embeddings": 4096, "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_TIED: Final[dict[str, Any]] = {"tie_word_embeddings": True}
_MIXED: Final[dict[str, Any]] = {"num_experts_per_tok": 2, "intermediate_size": 128}
_LATENT: Final[dict[str, Any]] = {"kv_lora_rank": 64, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 48, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 128, "first_k_dense_replace": 1, "num_key_value_heads": 4}  # fmt: skip
FAMILIES: Final[dict[str, dict[str, Any]]] = {family: {**SHAPE, **own, "model_type": family} for family, own in {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 128},
    "mistral": {"sliding_window": 64},
    "gemma": {**_TIED, "head_dim": 256, "num_key_value_heads": 1},
    "gemma2": {**_TIED, "head_dim": 64, "sliding_window": 64},
    "gemma3_text": {**_TIED, "head_dim": 128, "sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {"partial_rotary_factor": 0.75, "sliding_window": 1000},
    "smollm3": {**_TIED, "no_rope_layer_interval": 2},
    "olmo2": {"head_dim": 128},
    "granite": {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 8.0, "attention_multiplier": 0.0625},
    "gpt_neox": {"num_key_value_heads": 4, "rotary_pct": 0.25},
    "mixtral": {**_MIXED, "num_local_experts": 4},
    "qwen3_moe": {"num_experts_per_tok": 2, "num_experts": 4, "moe_intermediate_size": 128, "norm_topk_prob": True, "head_dim": 128, "mlp_only_layers": []},
    "gpt_oss": {**_MIXED, "num_local_experts": 4, "head_dim": 64, "sliding_window": 64},
    "olmoe": {**_MIXED, "num_experts": 4},
    "deepseek_v2": {**_LATENT, "q_lora_rank": None, "n_shared_experts": 2},
    "deepseek_v3": {**_LATENT, "q_lora_rank": 64, "n_shared_experts": 1, "n_group": 2, "topk_group": 1},
}.items()}  # fmt: skip


@dataclass
class Update:
    """One update's loss and, by name, the gradient of every trained weight."""

    loss: float
    gradients: dict[str, Tensor]


class Quiet(TrainerCallback):  # type: ignore[misc]  # transformers is not typed
    """Nothing is saved or evaluated."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_save = control.should_evaluate = False


class Catch(Quiet):
    """Takes the gradients just before the optimizer does, and the loss that is logged."""

    def __init__(self) -> None:
        self.update = Update(float("nan"), {})

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.update.gradients = gradients_of(model)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.update.loss = logs.get("loss", self.update.loss)


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad.detach().clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@cache
def here() -> Box:
    """This machine, asked once; where nvidia-smi does not tell of a GPU that torch has, as torch sees it."""
    box = Box.detect()
    if not CUDA or box.is_gpu:
        return box
    known = torch.cuda.get_device_properties(DEVICE)
    return Box(name="this", chip=known.name, memory_bytes=float(known.total_memory), unified=False, has_native_bf16=True)


def documents(lengths: tuple[int, ...] = LENGTHS) -> list[Document]:
    """Random documents, of which the first third is not learned."""
    draw = torch.Generator().manual_seed(2)
    made = [torch.randint(3, SHAPE["vocab_size"], (length,), generator=draw).tolist() for length in lengths]
    return [Document(ids, [-100 if place <= len(ids) // 3 else token for place, token in enumerate(ids)]) for ids in made]


def recipe_of(folder: Path, config: dict[str, Any], **changes: Any) -> Recipe:
    """A recipe of a model that is a config.json, one update long, whose gradients nothing shortens."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    settings = {"dtype": "fp32", "rank": 8, "alpha": 12.0, "micro_batch_tokens": 1024, "max_length": 512, "clip_norm": 1e9, "max_steps": 1, "held_out": 0.0}
    return Recipe(**{"model": str(folder), "data": "none", **settings, **changes})


def base(recipe: Recipe, dtype: torch.dtype, device: torch.device, attention: str) -> nn.Module:
    """The same weights every time, in every type and on every device: numbers that bf16 holds; norms, biases and sinks are random too."""
    model: Any = blank_base(recipe, dtype, device, attention)
    draw = torch.Generator().manual_seed(1)
    for name, module in sorted(model.named_modules()):
        for own, parameter in sorted(module.named_parameters(recurse=False)):
            packed = getattr(parameter, "quant_state", None)
            shape = parameter.shape if packed is None else packed.shape
            noise = torch.randn(shape, generator=draw) * (0.02 if len(shape) == 1 else 0.05)
            if packed is None:
                whole = noise if len(shape) > 1 else parameter.data.float().round().cpu() + noise
                parameter.data.copy_(whole.to(torch.bfloat16))
            else:
                kind = type(parameter)
                setattr(module, own, kind(noise.to(torch.bfloat16).to(device, dtype), requires_grad=False, quant_type=parameter.quant_type,
                                          compress_statistics=parameter.compress_statistics, module=module).to(device))  # fmt: skip
                assert getattr(module, own).quant_state is not None, name
    return model


def set_adapters(model: nn.Module) -> None:
    """The same A and B every time; B begins as zeros, which would hide A. DoRA's magnitudes stay near what they are."""
    draw = torch.Generator().manual_seed(4)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name:
            noise = torch.randn(parameter.shape, generator=draw) * 0.05
            if "magnitude" in name:
                parameter.data.mul_(1 + noise.to(parameter.device, parameter.dtype))
            else:
                parameter.data.copy_(noise.to(torch.bfloat16))


def unpacked(recipe: Recipe, dtype: torch.dtype) -> dict[str, Tensor]:
    """What the 4-bit weights of the base stand for, by name, as a model of ``dtype`` computes with them."""
    from bitsandbytes.functional import dequantize_4bit  # noqa: PLC0415

    parameters = base(recipe, dtype, DEVICE, "eager").named_parameters()
    return {name: dequantize_4bit(one.data, state) for name, one in parameters if (state := getattr(one, "quant_state", None)) is not None}


KNOWN: dict[str, Update] = {}


def stock_update(recipe: Recipe, dtype: torch.dtype, told: list[Document], adapter: dict[str, Any]) -> Update:
    """The update of stock code, made once for all cases that ask for the same."""
    packed = (recipe.dtype, recipe.double_quantization) if recipe.method == "qlora" else ()
    key = repr((Path(recipe.model, "config.json").read_text(encoding="utf-8"), recipe.method, packed, dtype, adapter))
    if key not in KNOWN:
        KNOWN[key] = _stock_update(recipe, dtype, told, adapter)
    return KNOWN[key]


def _stock_update(recipe: Recipe, dtype: torch.dtype, told: list[Document], adapter: dict[str, Any]) -> Update:
    """Stock modules, eager attention, one document at a time, the model's own loss over its labels, gradients summed by autograd."""
    plain = recipe.replace(method="full" if recipe.method == "full" else "lora")
    model: Any = base(plain, dtype, DEVICE, "eager")
    if recipe.method == "qlora":
        found = unpacked(recipe, torch_dtype(recipe.dtype))
        for name, parameter in model.named_parameters():
            if name in found:
                parameter.data.copy_(found.pop(name))
        assert not found, f"4-bit weights that a plain model lacks: {list(found)[:3]}"
    if recipe.method != "full":
        mixture = any(parameter.dim() == 3 for parameter in model.parameters())
        chosen: Any = list(ATTENTION_LINEARS) if mixture else "all-linear"
        options = {"r": recipe.rank, "lora_alpha": recipe.alpha, "target_modules": chosen, "task_type": "CAUSAL_LM", **adapter}
        model = get_peft_model(model, LoraConfig(**options), autocast_adapter_dtype=False)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
        set_adapters(model)
    model.train()
    count, total = sum(document.supervised for document in told), 0.0
    for document in told:
        if document.supervised:
            ids, labels = (torch.tensor([values], device=DEVICE) for values in (document.input_ids, document.labels))
            loss = model(input_ids=ids, labels=labels, num_items_in_batch=count, use_cache=False).loss
            loss.backward()
            total += loss.item()
    return Update(total, gradients_of(model))


def trainer_of(recipe: Recipe, told: list[Document], folder: Path, callback: TrainerCallback, rows: int = 1) -> PackedTrainer:
    """The worker's own model and Trainer over the documents in packed rows, which are one update."""
    model = ready_model(recipe, here(), base)
    if recipe.method != "full":
        set_adapters(model)
    packed = [make_row(told[start::rows]) for start in range(rows)]
    trainer = PackedTrainer(model, recipe.replace(micro_batches_per_update=rows), folder / "run", packed, (), callback=callback)
    trainer.remove_callback(PrinterCallback)
    return trainer


def our_update(recipe: Recipe, told: list[Document], folder: Path, rows: int = 1) -> Update:
    catch = Catch()
    trainer_of(recipe, told, folder, catch, rows).train()
    return catch.update


def distances(wanted: Update, given: Update) -> tuple[float, float, float, str]:
    """How far the loss is; how far all gradients together are, and the worst one, in their own norms, and whose that is."""
    if wanted.gradients.keys() != given.gradients.keys():
        odd = sorted(wanted.gradients.keys() ^ given.gradients.keys())
        raise AssertionError(f"gradients of other weights: {len(odd)}, {odd[:3]}")
    found, apart, whole = [], 0.0, 0.0
    for name, gradient in wanted.gradients.items():
        norm, distance = float(gradient.double().norm()), float((given.gradients[name].double() - gradient.double()).norm())
        apart, whole = apart + distance**2, whole + norm**2
        found.append((distance / norm if norm > 1e-9 else distance, name))
    return abs(given.loss / wanted.loss - 1), (apart / whole) ** 0.5, *max(found)
