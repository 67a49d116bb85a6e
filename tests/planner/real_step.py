"""One real training step of a small Llama on the CPU, run as the worker runs it, under the storage tracker."""

from __future__ import annotations

from typing import Any

import bitsandbytes
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from sparklab.engine import attention
from sparklab.engine.loss import chunked_cross_entropy, full_cross_entropy
from sparklab.engine.storages import StorageTracker
from sparklab.model.load import causal_lm, set_checkpointing
from sparklab.planner.recipe import Recipe


def measured_peak(config: dict[str, Any], recipe: Recipe, documents: int) -> int:
    """Peak bytes of the second update (the first makes the optimizer's states) of a row of ``documents`` equal documents."""
    attention.register()
    torch.manual_seed(0)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[recipe.dtype]
    model: Any = AutoModelForCausalLM.from_config(LlamaConfig(**config), attn_implementation=attention.NAME, dtype=dtype)
    if recipe.method != "full":
        model.requires_grad_(False)
        if recipe.method == "qlora":
            _quantise(model, recipe, dtype)
        targets = "all-linear" if recipe.targets == "all-linear" else ["q_proj", "k_proj", "v_proj", "o_proj"]
        peft = LoraConfig(r=recipe.rank, lora_alpha=recipe.alpha, lora_dropout=recipe.dropout, target_modules=targets, task_type="CAUSAL_LM")
        model = get_peft_model(model, peft, autocast_adapter_dtype=False)
        adapter_dtype = {"auto": dtype, "bf16": torch.bfloat16, "fp32": torch.float32}[recipe.adapter_dtype]
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(adapter_dtype)
    set_checkpointing(model, recipe.checkpoint_layers)
    model.train()
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-4, fused=True)
    tracker = StorageTracker()
    for tensor in (*model.parameters(), *model.buffers(), *_constants(model)):
        tracker.watch(tensor)
    with tracker:
        for _update in range(2):
            tracker.peak_bytes = tracker.now_bytes
            for _ in range(recipe.micro_batches_per_update):
                _loss(model, recipe, documents).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return tracker.peak_bytes


def _quantise(model: Any, recipe: Recipe, dtype: torch.dtype) -> None:
    """Every linear layer inside the layers as bitsandbytes' NF4, as transformers does it while loading."""
    for layer in model.model.layers:
        for module in (layer.self_attn, layer.mlp):
            for name, linear in list(module.named_children()):
                if isinstance(linear, torch.nn.Linear):
                    packed = bitsandbytes.nn.Linear4bit(
                        linear.in_features, linear.out_features, bias=False, compute_dtype=dtype,
                        compress_statistics=recipe.double_quantization, quant_type="nf4",
                    )  # fmt: skip
                    packed.weight = bitsandbytes.nn.Params4bit(
                        linear.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=recipe.double_quantization
                    )
                    packed.support_avx512bf16_for_cpu = False  # its repacked weights have no gradient
                    setattr(module, name, packed.to("cpu"))


def _constants(model: Any) -> list[torch.Tensor]:
    """The tensors beside the packed 4-bit weights."""
    states = [parameter.quant_state for parameter in model.parameters() if getattr(parameter, "quant_state", None) is not None]
    states += [state.state2 for state in states if state.state2 is not None]
    return [tensor for state in states for tensor in (state.absmax, state.code, state.offset) if isinstance(tensor, torch.Tensor)]


def _loss(model: Any, recipe: Recipe, documents: int) -> torch.Tensor:
    tokens = recipe.micro_batch_tokens
    length = tokens // documents
    ids = torch.randint(0, causal_lm(model).config.vocab_size, (1, tokens))
    positions = torch.arange(length).repeat(documents)[None]
    borders = torch.arange(0, tokens + 1, length, dtype=torch.int32)
    hidden = causal_lm(model).get_decoder()(
        input_ids=ids, position_ids=positions, use_cache=False, cu_seq_lens_q=borders, cu_seq_lens_k=borders
    ).last_hidden_state[0]  # fmt: skip
    loss = chunked_cross_entropy if recipe.loss == "chunked" else full_cross_entropy
    return loss(hidden, causal_lm(model).get_output_embeddings().weight, ids[0], float(tokens))
