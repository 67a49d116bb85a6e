"""Named recipes: functions that return a complete :class:`Recipe`.

:func:`full`, :func:`lora` and :func:`qlora` take any model and are sized to the box at hand: tokens per micro-batch and layers to checkpoint
are solved for unless given, and the learning rate is that of the method. The others are for one model each on a 128 GB box, with settings
written out that leave 5 % of its usable memory free; they read nothing and are the same on every machine. All take any field of the recipe
to set otherwise. ``data`` is what :class:`Recipe` says, or records from memory (a pandas DataFrame, a list of dicts, a ``datasets.Dataset``),
which are written to ``runs/data`` once, as a file named by its content.

    >>> lora_8b("chats.jsonl", epochs=3).micro_batch_tokens
    2048
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparklab.box import Box
from sparklab.model.anatomy import Anatomy
from sparklab.planner.kept import kept
from sparklab.planner.recipe import Method, Recipe
from sparklab.planner.solver import ADAPTER_RATE, FULL_RATE, LARGE_ADAPTER_RATE, solve


def full(model: str | Path, data: Any, *, box: Box | str | None = None, **changes: Any) -> Recipe:
    """Every weight is trained. Raises ModelNotFound, ModelError, RecipeError."""
    return sized("full", model, data, box=box, **changes)


def lora(model: str | Path, data: Any, *, box: Box | str | None = None, **changes: Any) -> Recipe:
    """Low-rank adapters on every linear layer of a frozen base. Raises ModelNotFound, ModelError, RecipeError."""
    return sized("lora", model, data, box=box, **changes)


def qlora(model: str | Path, data: Any, *, box: Box | str | None = None, **changes: Any) -> Recipe:
    """Low-rank adapters on a base held in 4 bits. Raises ModelNotFound, ModelError, RecipeError."""
    return sized("qlora", model, data, box=box, **changes)


def sized(method: Method, model: str | Path, data: Any, *, box: Box | str | None = None, **changes: Any) -> Recipe:
    """The fastest recipe of a method that fits ``box`` (default: this one). Raises ModelNotFound, ModelError, RecipeError."""
    anatomy = Anatomy.read(model)
    return solve(anatomy, Box.of(box), method, _written({**changes, "model": str(model), "data": data}))


# For a 128 GB box


def full_1b(data: Any, *, model: str | Path = "meta-llama/Llama-3.2-1B", **changes: Any) -> Recipe:
    """Every weight of a model of one billion. Raises RecipeError."""
    return _complete(changes, model=model, data=data, method="full", learning_rate=FULL_RATE, micro_batch_tokens=8192)


def full_3b(data: Any, *, model: str | Path = "meta-llama/Llama-3.2-3B", **changes: Any) -> Recipe:
    """Every weight of a model of three billion. Raises RecipeError."""
    return _complete(changes, model=model, data=data, method="full", learning_rate=FULL_RATE, micro_batch_tokens=8192)


def full_4b(data: Any, *, model: str | Path = "Qwen/Qwen3-4B", **changes: Any) -> Recipe:
    """Every weight of a model of four billion. Raises RecipeError."""
    return _complete(changes, model=model, data=data, method="full", learning_rate=FULL_RATE, micro_batch_tokens=4096)


def lora_8b(data: Any, *, model: str | Path = "meta-llama/Llama-3.1-8B", **changes: Any) -> Recipe:
    """Adapters on eight billion parameters in bf16. Raises RecipeError."""
    return _complete(changes, model=model, data=data, method="lora", learning_rate=ADAPTER_RATE, micro_batch_tokens=2048)


def lora_14b(data: Any, *, model: str | Path = "Qwen/Qwen3-14B", **changes: Any) -> Recipe:
    """Adapters on fourteen billion parameters in bf16. Raises RecipeError."""
    return _complete(changes, model=model, data=data, method="lora", learning_rate=ADAPTER_RATE, micro_batch_tokens=2048)


def lora_32b(data: Any, *, model: str | Path = "Qwen/Qwen3-32B", **changes: Any) -> Recipe:
    """Adapters on thirty-two billion parameters in bf16. Raises RecipeError."""
    return _complete(changes, model=model, data=data, method="lora", learning_rate=LARGE_ADAPTER_RATE, micro_batch_tokens=2048)


def lora_30b_a3b(data: Any, *, model: str | Path = "Qwen/Qwen3-30B-A3B", **changes: Any) -> Recipe:
    """Adapters on the attention of a mixture of experts, thirty billion parameters in bf16 of which three work on a token. Raises RecipeError."""
    return _complete(changes, model=model, data=data, method="lora", learning_rate=LARGE_ADAPTER_RATE, micro_batch_tokens=8192)


def qlora_70b(data: Any, *, model: str | Path = "meta-llama/Llama-3.3-70B-Instruct", **changes: Any) -> Recipe:
    """Adapters on seventy billion parameters in 4 bits. Raises RecipeError."""
    return _complete(changes, model=model, data=data, method="qlora", learning_rate=LARGE_ADAPTER_RATE, micro_batch_tokens=2048)


def _complete(changes: dict[str, Any], **settings: Any) -> Recipe:
    return Recipe.from_dict(_written({**settings, **changes}))


def _written(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields with records from memory written to files."""
    in_memory = [name for name in ("data", "held_out") if name in fields and not isinstance(fields[name], (str, float, int))]
    return {**fields, **{name: kept(fields[name]) for name in in_memory}}
