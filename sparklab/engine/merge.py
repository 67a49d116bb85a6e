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
    """What one weight [O, I] learned: it changes by ``scaling * b_OR @ a_RI``; or what a stack of experts' weights did, each with its own A and B."""

    a_RI: Tensor  # noqa: N815 - names carry shapes
    b_OR: Tensor  # noqa: N815
    scaling: float
    magnitude_O: Tensor | None = None  # noqa: N815
    """DoRA: the length that each row of the changed weight has."""
    experts: int = 0
    """Of a stack [E, O, I] (0: no stack): A is [E * R, I], expert after expert, and B [O, R * E], rank after rank, as PEFT keeps them."""
    transposed: bool = False
    """The stack is [E, I, O]."""

    def merge_into(self, weight: Tensor) -> Tensor:
        """Adds the change in the weight's own memory, rounded once; the change itself is never held (with DoRA the lengths are put right after)."""
        a, b = self.a_RI.to(weight.dtype), self.b_OR.to(weight.dtype)
        if self.experts:
            a_ERI, b_EOR = a.view(self.experts, -1, a.shape[1]), b.view(b.shape[0], -1, self.experts).permute(2, 0, 1)
            left, right = (a_ERI.transpose(1, 2), b_EOR.transpose(1, 2)) if self.transposed else (b_EOR, a_ERI)
            return weight.baddbmm_(left, right, alpha=self.scaling)
        weight.addmm_(b, a, alpha=self.scaling)
        if self.magnitude_O is None:
            return weight
        lengths = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)
        return weight.mul_((self.magnitude_O.float() / lengths).to(weight.dtype)[:, None])

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        outputs, inputs = self.b_OR.shape[0], self.a_RI.shape[1]
        if not self.experts:
            return outputs, inputs
        return (self.experts, inputs, outputs) if self.transposed else (self.experts, outputs, inputs)


def adapters_of(model: nn.Module) -> dict[str, Adapter]:
    """The adapters of a PEFT model by the base's name of the layer (``model.layers.0.mlp.up_proj``), or of the experts' parameter."""
    found = {}
    module: Any
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            a, b = module.lora_A["default"].weight.detach(), module.lora_B["default"].weight.detach()
            magnitudes, plain = module.lora_magnitude_vector, name.removeprefix("base_model.model.")
            stack = getattr(module, "parameter_name", None)
            if stack is None:
                found[plain] = Adapter(a, b, module.scaling["default"], magnitudes["default"].weight.detach() if "default" in magnitudes else None)
            else:
                experts = module.get_base_layer()
                plain = f"{plain.replace('.base_layer', '')}.{stack}"
                found[plain] = Adapter(a, b, module.scaling["default"], None, experts.num_experts, bool(getattr(experts, "is_transposed", False)))
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
