"""One update twice: by sparklab's own Trainer over packed rows, and the plain way, stock transformers and PEFT, one document after the other."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PrinterCallback, TrainerCallback

from sparklab.box import Box
from sparklab.data.dataset import Row, make_row
from sparklab.data.template import Document
from sparklab.engine.fast import ready_model
from sparklab.engine.trainer import PackedTrainer
from sparklab.model.blank import blank_base
from sparklab.model.load import ATTENTION_LINEARS
from sparklab.planner.recipe import Recipe

CPU = torch.device("cpu")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
LENGTHS = (5, 50, 1, 37)
"""Of the documents: one of a single token, some longer than the small configs' windows of 32."""
BOX = Box(name="test", chip="CPU", memory_bytes=2**35, unified=False, is_gpu=False)


@dataclass
class Update:
    """What one update computed: its loss and, by PEFT's (or transformers') name, the gradient of every trained weight."""

    loss: float
    gradients: dict[str, torch.Tensor]


def documents(vocabulary: int = 1000, lengths: tuple[int, ...] = LENGTHS) -> list[Document]:
    """Random documents, of which the first third is not learned."""
    torch.manual_seed(2)
    made = [torch.randint(3, vocabulary, (length,)).tolist() for length in lengths]
    return [Document(ids, [-100 if place <= len(ids) // 3 else token for place, token in enumerate(ids)]) for ids in made]


def recipe_of(folder: Path, config: dict[str, Any], **changes: Any) -> Recipe:
    """A recipe of a model that is a config.json, one update long, whose gradients nothing shortens."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    settings = {"dtype": "fp32", "rank": 4, "alpha": 6.0, "micro_batch_tokens": 128, "max_length": 64, "clip_norm": 1e9, "max_steps": 1, "held_out": 0.0}
    return Recipe(**{"model": str(folder), "data": "none", **settings, **changes})


def base(recipe: Recipe, dtype: torch.dtype, device: torch.device, implementation: str) -> nn.Module:
    """The same random weights every time; norms, biases and sinks, which begin as ones and zeros and so hide what they do, random too."""
    torch.manual_seed(1)
    model = blank_base(recipe, dtype, device, implementation)
    draw = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data.add_((torch.randn(parameter.shape, generator=draw) * 0.02).to(parameter.dtype))
    return model


def set_adapters(model: nn.Module) -> None:
    """The same A and B every time; B begins as zeros, which would hide A."""
    draw = torch.Generator().manual_seed(4)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name:
            around = 1.0 if "magnitude" in name else 0.0
            noise = torch.randn(parameter.shape, generator=draw) * 0.05
            parameter.data.copy_(parameter.data * (1 + noise) if around else noise)


def stock_update(recipe: Recipe, told: list[Document], **adapter: Any) -> Update:
    """Stock modules, eager attention, one document at a time, the model's own loss over its labels, gradients summed by autograd."""
    model: Any = base(recipe, DTYPES[recipe.dtype], CPU, "eager")
    if recipe.method != "full":
        mixture = any(parameter.dim() == 3 for parameter in model.parameters())
        chosen: Any = list(ATTENTION_LINEARS) if mixture else "all-linear"
        options = {"r": recipe.rank, "lora_alpha": recipe.alpha, "target_modules": chosen, "task_type": "CAUSAL_LM", **adapter}
        model = get_peft_model(model, LoraConfig(**options), autocast_adapter_dtype=False)
        set_adapters(model)
    model.train()
    count = sum(document.supervised for document in told)
    total = 0.0
    for document in told:
        if document.supervised:
            loss = model(input_ids=torch.tensor([document.input_ids]), labels=torch.tensor([document.labels]), num_items_in_batch=count, use_cache=False).loss
            loss.backward()
            total += loss.item()
    return Update(total, gradients_of(model))


def gradients_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """By name, copied."""
    return {name: parameter.grad.detach().clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


class _Catch(TrainerCallback):  # type: ignore[misc]
    """Takes the gradients just before the optimizer does."""

    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}
        self.loss = float("nan")

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.gradients = gradients_of(model)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.loss = logs.get("loss", self.loss)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_save = control.should_evaluate = False


def sparklab_update(recipe: Recipe, rows: list[Row], folder: Path) -> Update:
    """The worker's own model and Trainer over the rows, which are one update."""
    model = ready_model(recipe, BOX, base)
    if recipe.method != "full":
        set_adapters(model)
    catch = _Catch()
    trainer = PackedTrainer(model, recipe.replace(micro_batches_per_update=len(rows)), folder, rows, (), callback=catch)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return Update(catch.loss, catch.gradients)


def rows_of(told: list[Document], packed: bool, rows: int) -> list[Row]:
    """All documents in ``rows`` packed rows, or each in a row of its own."""
    if not packed:
        return [make_row([document]) for document in told if document.supervised]
    return [make_row(told[start::rows]) for start in range(rows)]


def worst(wanted: dict[str, torch.Tensor], given: dict[str, torch.Tensor]) -> tuple[float, str]:
    """The largest distance of a gradient from what it should be, in that gradient's norm, and whose it is. A gradient of zero must be zero."""
    assert wanted.keys() == given.keys()
    found = []
    for name, gradient in wanted.items():
        norm = float(gradient.double().norm())
        distance = float((given[name].double() - gradient.double()).norm())
        found.append((distance / norm if norm > 1e-9 else distance, name))
    return max(found)
