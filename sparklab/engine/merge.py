"""Adapters added into their base, one weight at a time, and written as they come: neither model is ever whole in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

_NAMES: Final = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}  # of types, in safetensors' header


@dataclass(frozen=True)
class Adapter:
    """What one linear layer learned: its weight [O, I] changes by ``scaling * b_OR @ a_RI``."""

    a_RI: Tensor  # noqa: N815 - names carry shapes
    b_OR: Tensor  # noqa: N815
    scaling: float

    def merge_into(self, weight_OI: Tensor) -> Tensor:
        """Adds the change in the weight's own memory, rounded once; the change itself is never held."""
        return weight_OI.addmm_(self.b_OR.to(weight_OI.dtype), self.a_RI.to(weight_OI.dtype), alpha=self.scaling)


def adapters_of(model: nn.Module) -> dict[str, Adapter]:
    """The adapters of a PEFT model by the base's name of the layer (``model.layers.0.mlp.up_proj``)."""
    found = {}
    module: Any
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            a, b = module.lora_A["default"].weight.detach(), module.lora_B["default"].weight.detach()
            found[name.removeprefix("base_model.model.")] = Adapter(a, b, module.scaling["default"])
    return found


def write_streamed(file: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, make: Callable[[str], Tensor]) -> None:
    """A safetensors file of tensors that ``make(name)`` hands over one after the other; no more than one is held.

    The format is a header of names, types, shapes and offsets, all known beforehand, and then the bytes (https://github.com/huggingface/safetensors).
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            tensor = make(name).detach().cpu().contiguous()
            assert tensor.shape == shape and tensor.dtype == dtype, name
            opened.write(tensor.flatten().view(torch.uint8).numpy().data)
            del tensor
