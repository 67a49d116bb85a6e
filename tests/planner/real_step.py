"""One real training step of a small model of any family on the CPU, run as the worker runs it, under the storage tracker."""

from __future__ import annotations

from typing import Any

import bitsandbytes
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sparklab.engine import attention
from sparklab.engine.fast import fit
from sparklab.engine.storages import StorageTracker
from sparklab.engine.trainer import row_loss
from sparklab.model.load import add_adapters, causal_lm, decoder_layers, set_checkpointing
from sparklab.planner.recipe import Recipe

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def measured_peak(config: dict[str, Any], recipe: Recipe, documents: int, tracker: StorageTracker | None = None) -> int:
    """Peak bytes of the second update (the first makes the optimizer's states) of a row of ``documents`` equal documents."""
    attention.register()
    torch.manual_seed(0)
    values, dtype = dict(config), DTYPES[recipe.dtype]
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values), attn_implementation=attention.NAME, dtype=dtype)
    if recipe.method != "full":
        model.requires_grad_(False)
        if recipe.method == "qlora":
            _quantise(model, recipe, dtype)
        model = add_adapters(model, recipe, DTYPES.get(recipe.adapter_dtype, dtype))
    set_checkpointing(model, recipe.checkpoint_layers)
    fit(model, recipe)
    model.train()
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-4, fused=True)
    tracker = tracker or StorageTracker()
    for tensor in (*model.parameters(), *model.buffers(), *_constants(model)):
        tracker.watch(tensor)
    with tracker:
        for _update in range(2):
            tracker.peak_bytes = tracker.now_bytes
            for _ in range(recipe.micro_batches_per_update):
                row_loss(model, _row(model, recipe, documents), float(recipe.micro_batch_tokens), recipe.loss).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return tracker.peak_bytes


def _quantise(model: Any, recipe: Recipe, dtype: torch.dtype) -> None:
    """Every linear layer inside the layers as bitsandbytes' NF4, as transformers does it while loading."""
    owners = [module for layer in decoder_layers(model) for module in layer.modules()]
    for module in owners:
        for name, linear in list(module.named_children()):
            if type(linear) is torch.nn.Linear:
                packed = bitsandbytes.nn.Linear4bit(
                    linear.in_features, linear.out_features, bias=linear.bias is not None, compute_dtype=dtype,
                    compress_statistics=recipe.double_quantization, quant_type="nf4",
                )  # fmt: skip
                packed.weight = bitsandbytes.nn.Params4bit(
                    linear.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=recipe.double_quantization
                )
                packed.bias = linear.bias
                packed.support_avx512bf16_for_cpu = False  # its repacked weights have no gradient
                setattr(module, name, packed.to("cpu"))


def _constants(model: Any) -> list[torch.Tensor]:
    """The tensors beside the packed 4-bit weights."""
    states = [parameter.quant_state for parameter in model.parameters() if getattr(parameter, "quant_state", None) is not None]
    states += [state.state2 for state in states if state.state2 is not None]
    return [tensor for state in states for tensor in (state.absmax, state.code, state.offset) if isinstance(tensor, torch.Tensor)]


def _row(model: Any, recipe: Recipe, documents: int) -> dict[str, torch.Tensor]:
    tokens = recipe.micro_batch_tokens
    length = tokens // documents
    ids = torch.randint(0, causal_lm(model).config.vocab_size, (1, tokens))
    borders = torch.arange(0, tokens + 1, length, dtype=torch.int32)
    return {"input_ids": ids, "position_ids": torch.arange(length).repeat(documents)[None], "labels": ids, "cu_seq_lens_q": borders}
