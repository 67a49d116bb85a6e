"""A model of full size with random weights, made straight on the device from ``config.json`` alone: for rehearsing, nothing is downloaded.

Its tensors have the names, shapes and types of the real ones, and nothing else is ever held: the model is first put together on torch's
``meta`` device, which stores nothing, then each tensor is made in its place. For 4-bit bases each linear layer is quantised as it is made,
so neither a second copy nor the whole in bf16 exists at any time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sparklab.errors import ModelError
from sparklab.model.hub import load_config
from sparklab.model.load import keep_trainable, nf4_config
from sparklab.planner.recipe import Recipe
from sparklab.text import first_line

META = torch.device("meta")


def blank_base(recipe: Recipe, dtype: torch.dtype, device: torch.device, attention: str) -> nn.Module:
    """As :func:`sparklab.model.load.load_base`, with random weights: frozen unless the method is full; 4-bit for qlora.

    Raises :class:`ModelError` where transformers cannot make a language model of the config.
    """
    model, quantizer = on_meta(recipe, dtype, attention)
    _fill(model, dtype, device)
    model.tie_weights()
    if quantizer is not None:
        quantizer.postprocess_model(model)
        model.hf_quantizer = quantizer  # Trainer asks it whether such a model can be trained
    return keep_trainable(model, recipe)


def on_meta(recipe: Recipe, dtype: torch.dtype, attention: str) -> tuple[Any, Any]:
    """The base without storage, its linear layers 4-bit ones for qlora; and the quantiser that made them so, which has a last word, or None.

    Raises :class:`ModelError` where transformers cannot make a language model of the config.
    """
    from transformers import AutoConfig, AutoModelForCausalLM  # noqa: PLC0415 - takes seconds; only who rehearses or traces pays

    values = dict(load_config(recipe.model))
    values.pop("auto_map", None)  # code of the model's own never runs
    values.pop("quantization_config", None)  # the recipe says what is quantised
    try:
        config = AutoConfig.for_model(values.pop("model_type"), **values)
        with META:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    except (KeyError, ValueError, TypeError) as error:
        reason = first_line(error)
        raise ModelError(f"transformers cannot make a language model of {recipe.model!r}: {reason}", "check its config.json") from error
    if recipe.method != "qlora":
        return model, None
    from transformers.quantizers import AutoHfQuantizer  # noqa: PLC0415

    # transformers' own choice of what becomes 4-bit, so that it is the same as in a model read from files
    quantizer = AutoHfQuantizer.from_config(nf4_config(recipe, dtype), pre_quantized=False)
    quantizer.preprocess_model(model=model, device_map=None)
    return model, quantizer


def _fill(model: Any, dtype: torch.dtype, device: torch.device) -> None:
    """Gives every tensor its place on the device and a random value; a tensor that several modules share is made once."""
    from bitsandbytes.nn import Linear4bit  # noqa: PLC0415

    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        if isinstance(module, Linear4bit):
            _fill_4bit(module, dtype, device)
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in made:
                made[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=parameter.requires_grad)
            setattr(module, name, made[id(parameter)])
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty_like(buffer, device=device)
    model.initialize_weights()


def _fill_4bit(linear: Any, dtype: torch.dtype, device: torch.device) -> None:
    """One linear layer: random weights in ``dtype``, packed at once."""
    from bitsandbytes.nn import Params4bit  # noqa: PLC0415

    weight = torch.empty(linear.out_features, linear.in_features, dtype=dtype, device=device).normal_(0, 0.02)
    old = linear.weight
    packed = Params4bit(weight, requires_grad=False, quant_type=old.quant_type, compress_statistics=old.compress_statistics, module=linear)
    del weight
    linear.weight = packed.to(device)
    if linear.bias is not None:
        linear.bias = nn.Parameter(torch.zeros(linear.out_features, dtype=dtype, device=device), requires_grad=False)
    linear._is_hf_initialized = True  # or transformers would fill the packed bytes with random numbers
