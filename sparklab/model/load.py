"""A model ready to train: the base in its type (or NF4), the adapters on it, the layers that recompute marked."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sparklab.box import Box
from sparklab.errors import ModelError, ModelNotFound, SparklabError
from sparklab.model.experts import target_experts
from sparklab.model.source import check_trainable
from sparklab.model.stream import Tell, fetched, load_streamed
from sparklab.planner.recipe import Recipe
from sparklab.text import first_line
from sparklab.units import NA

# Of all families; PEFT takes those that a model has. Phi's and GPT-NeoX' are fused, DeepSeek's come out of a latent.
ATTENTION_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "query_key_value", "dense", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")


def pick_device() -> torch.device:
    """The first CUDA device, of several processes (torchrun) each one's own; or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def torch_dtype(name: str) -> torch.dtype:
    """torch's own name for ``"bf16"`` or ``"fp32"``."""
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]


BaseMaker = Callable[[Recipe, torch.dtype, torch.device, str], nn.Module]


def load_model(recipe: Recipe, box: Box, attention: str, make_base: BaseMaker | None = None) -> nn.Module:
    """The recipe's model on this machine's device, ready to train: base, adapters unless the method is full, layers marked to recompute.

    ``make_base`` stands in for :func:`load_base`, to make a base that was never saved.
    """
    base_dtype = box.resolve_dtype(recipe.dtype)
    model = (make_base or load_base)(recipe, torch_dtype(base_dtype), pick_device(), attention)
    if recipe.method != "full":
        model = add_adapters(model, recipe, torch_dtype(base_dtype if recipe.adapter_dtype == "auto" else recipe.adapter_dtype))
    set_checkpointing(model, recipe.checkpoint_layers)
    return model


def load_tokenizer(model: str) -> Any:
    """The tokenizer beside the weights. Raises :class:`ModelError` where it has no chat template or no end-of-turn token."""
    from transformers import AutoTokenizer  # noqa: PLC0415 - takes seconds; only the worker pays

    source = check_trainable(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, local_files_only=os.path.isdir(source))
    except (OSError, ValueError) as error:
        raise _not_loadable(model, source, error) from error
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer of {model!r} has no end-of-text token", "set eos_token in its tokenizer_config.json")
    return tokenizer


def load_base(recipe: Recipe, dtype: torch.dtype, device: torch.device, attention: str, tell: Tell | None = None) -> nn.Module:
    """The base model on the device, frozen unless the method is full; 4-bit for qlora. No pickle is ever read.

    ``tell`` hears how far it is. Raises :class:`ModelError` that names what is missing, damaged or does not belong together.
    """
    from transformers import AutoConfig  # noqa: PLC0415

    source = check_trainable(recipe.model)
    quantization = nf4_config(recipe, dtype) if recipe.method == "qlora" else None
    try:
        if not os.path.isdir(source):
            if tell is not None:
                tell("from the hub, or its local cache", NA, NA)
            source = fetched(source)
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, local_files_only=True)
        # A model of text inside a larger one, or one that was saved quantised, takes turns of the library's own.
        plain = not hasattr(config, "text_config") and getattr(config, "quantization_config", None) is None
        if not plain and tell is not None:
            tell("the library's own way, which may hold the files a second time", NA, NA)
        load = load_streamed if plain else _load_stock
        model: nn.Module = load(source, config, dtype, device, attention, quantization, tell)
    except SparklabError:
        raise
    except (OSError, ValueError) as error:
        raise _not_loadable(recipe.model, source, error) from error
    if hasattr(model.config, "text_config"):
        raise ModelError(f"model {recipe.model!r} reads more than text, and only text can be trained on", "train a model of text alone")
    return keep_trainable(model, recipe)


def _load_stock(source: str, config: Any, dtype: torch.dtype, device: torch.device, attention: str, quantization: Any, tell: Tell | None) -> nn.Module:
    """As :func:`sparklab.model.stream.load_streamed`, by transformers alone."""
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    options: dict[str, Any] = {} if quantization is None else {"quantization_config": quantization}
    if device.type == "cuda":
        options["device_map"] = {"": device.index or 0}
    model: nn.Module = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, attn_implementation=attention, use_safetensors=True, trust_remote_code=False,
                                                            local_files_only=True, **options)  # fmt: skip
    return model


def keep_trainable(model: nn.Module, recipe: Recipe) -> nn.Module:
    """The base, frozen unless the method is full, and kept from what would make it untrainable later."""
    module: Any
    for module in model.modules():
        # On a CPU bitsandbytes repacks 4-bit weights at the first forward without gradients, and later training runs through a kernel
        # that has no gradient. Evaluating before training must not change what training computes, so that path stays off.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.requires_grad_(recipe.method == "full")


def add_adapters(model: nn.Module, recipe: Recipe, dtype: torch.dtype) -> nn.Module:
    """The model with trainable LoRA adapters in ``dtype``, seeded by the recipe; PEFT owns them: its names, its saved files."""
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415

    targets: str | list[str] = "all-linear"
    # Of a mixture, PEFT takes the names of the MLP's linear layers for those of the experts, here and wherever the adapter is loaded again, and
    # would change a whole 3-D stack of weights anew in every pass. Anatomy.targeted leaves them out too.
    mixture = any(parameter.dim() == 3 for parameter in model.parameters())
    if recipe.targets == "attention" or (mixture and recipe.targets == "all-linear"):
        targets = list(ATTENTION_LINEARS)
    elif recipe.targets != "all-linear":
        targets = [recipe.targets] if isinstance(recipe.targets, str) else list(recipe.targets)
    config = LoraConfig(
        r=recipe.rank, lora_alpha=recipe.alpha, lora_dropout=recipe.dropout, target_modules=targets, task_type="CAUSAL_LM",
        use_rslora=recipe.rank_stabilized, use_dora=recipe.dora,
    )  # fmt: skip
    if recipe.expert_adapters:
        if not mixture:
            raise ModelError(f"expert_adapters is true, and {recipe.model!r} has no experts", "leave it out")
        target_experts(config, model, fast=recipe.engine == "fast")
    torch.manual_seed(recipe.seed)  # A is random: the same recipe starts from the same adapters
    try:
        adapted: nn.Module = get_peft_model(model, config, autocast_adapter_dtype=False)
    except ValueError as error:
        names = sorted({name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)})
        raise ModelError(f"no layer of {recipe.model!r} matches targets={recipe.targets!r}: {error}", f"use 'all-linear' or some of {names}") from error
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return adapted


def set_checkpointing(model: nn.Module, layers: int | str) -> int:
    """Marks the first ``layers`` decoder layers to recompute in the backward pass; returns how many that are."""
    blocks = decoder_layers(model)
    wanted = len(blocks) if layers == "all" else 0 if layers == "none" else min(int(layers), len(blocks))
    if wanted:
        base: Any = causal_lm(model)
        if hasattr(base, "activation_checkpointing_enable"):  # its name since transformers 5.2x; the old one warns there
            base.activation_checkpointing_enable({"use_reentrant": False})
        else:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        for index, block in enumerate(blocks):
            block.gradient_checkpointing = index < wanted  # type: ignore[assignment]
    return wanted


def causal_lm(model: nn.Module) -> Any:
    """The transformers model inside, with or without adapters around its linears."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder's blocks, first to last."""
    return list(causal_lm(model).get_decoder().layers)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(all, trainable) parameters; a packed 4-bit weight counts as what it stands for."""
    total = trainable = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        count = int(state.shape.numel()) if state is not None else parameter.numel()
        total += count
        trainable += count if parameter.requires_grad else 0
    return total, trainable


def nf4_config(recipe: Recipe, dtype: torch.dtype) -> Any:
    """The recipe's 4-bit base in transformers' words: NF4, computed in ``dtype``."""
    from transformers import BitsAndBytesConfig  # noqa: PLC0415

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=recipe.double_quantization)


def _not_loadable(model: str, source: str, error: Exception) -> ModelError:
    """transformers' error in the user's words."""
    logging.getLogger(__name__).debug("loading %s failed", source, exc_info=error)
    reason = first_line(error)
    if os.path.isdir(source):
        return ModelError(f"model {model!r} cannot be loaded: {reason}", "check that config.json, weights and tokenizer belong together")
    return ModelNotFound(f"model {model!r} is neither a directory nor a model the hub gives: {reason}", "check the name, or the network")
