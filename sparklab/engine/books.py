"""The books of a training step: which layer holds how many bytes of what at the highest point of every moment.

A moment is the time between two marks: the forward pass of a layer, the loss, the backward pass of a layer, the optimizer's step. The step may
be of a real model or of one that only has shapes (:mod:`sparklab.engine.trace`): nothing here depends on it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._pytree import tree_leaves

from sparklab.data.dataset import longest_micro_batch
from sparklab.data.template import IGNORED
from sparklab.engine.storages import StorageTracker
from sparklab.engine.trainer import collate, row_loss
from sparklab.model.load import decoder_layers
from sparklab.planner.recipe import Recipe

Held = Counter[tuple[int | None, str]]
"""Bytes by holder: (number of the layer, or None outside the layers; what it is)."""


def _unpacked(tensor: Tensor, _: Tensor, shape: list[int], *__: Any, absmax_8bit: Tensor | None = None, **___: Any) -> int:
    """bitsandbytes unpacks the weight [outputs, inputs] into the input's type, and where they are 8-bit its constants into fp32."""
    return prod(shape) * tensor.element_size() + (0 if absmax_8bit is None else absmax_8bit.numel() * 4)


INSIDE: Final[dict[str, Callable[..., int]]] = {
    # subtracts the largest and exponentiates, in a copy of its input
    "aten::logsumexp": lambda tensor, *_, **__: tensor.numel() * tensor.element_size(),
    "bitsandbytes::gemm_4bit": _unpacked,
}
"""Bytes that a kernel allocates inside itself and frees before it returns, from its arguments: no operation returns them."""


@cache
def _inside(operation: Any) -> Callable[..., int] | None:
    return INSIDE.get(operation.name().split(".")[0])


DEVICE: Final = torch.ops.prim.device.default
GROUPED: Final = torch.ops.aten._grouped_mm.default


def _grouped(left: Tensor, right: Tensor, offsets: Tensor, *_: Any, **__: Any) -> Tensor:
    """The shape of a grouped product, which torch tells of bf16 alone while a CPU computes any type: rows by their group's weight, or weights by rows."""
    return left.new_empty((left.shape[0], right.shape[-1]) if right.dim() == 3 else (offsets.shape[0], left.shape[0], right.shape[-1]))


@dataclass(frozen=True)
class Moment:
    """What was held at the highest point between two marks."""

    name: str
    layer: int | None
    """The layer at work, from 0."""
    held: Held

    @property
    def size_bytes(self) -> int:
        return self.held.total()

    def __str__(self) -> str:
        return self.name if self.layer is None else f"{self.name} of layer {self.layer + 1}"


class Books(StorageTracker):
    """Follows storages, each with its holder, and keeps the highest point of every moment.

    Where an operation gets tensors and none of them is fake it is done in earnest, fake mode or not: what a row is made of stays real.
    """

    def __init__(self) -> None:
        super().__init__()
        self.moments: list[Moment] = []
        self._held: Held = Counter()
        self._layer: int | None = None
        self._holders: dict[int, tuple[int | None, str]] = {}

    def enter(self, name: str, layer: int | None = None) -> None:
        """From here on it is another moment, and what is made belongs to ``layer``."""
        self._layer = layer
        self.peak_bytes = self.now_bytes
        self.moments.append(Moment(name, layer, self._held.copy()))

    def own(self, tensors: Iterable[Tensor | None], kind: str, layer: int | None = None) -> None:
        """Counts tensors made before, or says what those are that were made under these books."""
        for tensor in tensors:
            if tensor is not None:
                self.watch(tensor)
                key = tensor.untyped_storage()._cdata
                size = self._alive[key]
                self._held[self._holders[key]] -= size
                self._held[layer, kind] += size
                self._holders[key] = (layer, kind)

    def _count(self, key: int, size: int) -> None:
        super()._count(key, size)
        self._held[self._holders.setdefault(key, (self._layer, "activations"))] += size
        if size < 0:
            del self._holders[key]
        elif self.moments and self.now_bytes >= self.peak_bytes:
            last = self.moments[-1]
            self.moments[-1] = Moment(last.name, last.layer, self._held.copy())

    def run(self, operation: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """As in :class:`StorageTracker`; where tensors go in and none of them is fake, in earnest."""
        if operation is DEVICE and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # asked for all the time
        inside = _inside(operation)
        if operation is GROUPED and isinstance(args[0], FakeTensor):
            operation = _grouped
        if (args and isinstance(args[0], FakeTensor)) or not _is_real(args, kwargs):
            result = super().run(operation, args, kwargs)
        else:
            with unset_fake_temporarily():  # type: ignore[no-untyped-call]
                result = super().run(operation, args, kwargs)
        if inside is not None:  # beside what it returns
            size = inside(*args, **kwargs)
            self._count(0, size)
            self._count(0, -size)
        return result


def _is_real(args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether tensors go in, none of which is fake."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    return bool(tensors) and not any(isinstance(tensor, FakeTensor) for tensor in tensors)


def longest_row(recipe: Recipe) -> dict[str, Tensor]:
    """The longest micro-batch of a recipe, ready for the model."""
    return collate([longest_micro_batch(recipe, lambda length: [0] * length)])


def follow(model: nn.Module, recipe: Recipe, row: dict[str, Tensor], books: Books) -> list[Moment]:
    """The moments of one update as all but a run's first are: the optimizer has its states. ``row`` is every micro-batch of it."""
    layers = decoder_layers(model.train())
    home = {id(tensor): index for index, layer in enumerate(layers) for tensor in (*layer.parameters(), *layer.buffers())}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = _optimizer(model, recipe)
    for tensor in (*model.parameters(), *model.buffers()):
        kind = "adapters" if tensor.requires_grad and recipe.method != "full" else "weights"
        books.own([tensor], kind, home.get(id(tensor)))
        books.own(_constants(tensor), "quantisation constants", home.get(id(tensor)))
    for parameter, state in optimizer.state.items():
        books.own((value for value in state.values() if isinstance(value, Tensor)), "optimizer", home.get(id(parameter)))
        watched: Any = parameter
        watched.register_post_accumulate_grad_hook(lambda tensor: books.own([tensor.grad], "gradients", home.get(id(tensor))))
    books.own(row.values(), "inputs")
    _mark(layers, books)
    with books:
        count = float((row["labels"][:, 1:] != IGNORED).sum())
        for _ in range(min(2, recipe.micro_batches_per_update)):  # from the second on, gradients are there from the start
            books.enter("embedding")
            loss = row_loss(model, row, count, recipe.loss)
            books.enter("last norm's backward pass")
            loss.backward()  # type: ignore[no-untyped-call]
            del loss
        books.enter("optimizer step")
        nn.utils.clip_grad_norm_(trained, recipe.clip_norm)
        optimizer.step()
    return books.moments


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimizer after a first step, which makes its states."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer: Any
    if recipe.optimizer == "adamw":
        optimizer = torch.optim.AdamW(trained, fused=True)
    else:
        from bitsandbytes.optim import AdamW8bit, GlobalOptimManager  # noqa: PLC0415 - loads only where it is used

        manager = GlobalOptimManager.get_instance()
        manager.initialize()
        for module in model.modules():  # as the Trainer does: embeddings keep fp32 states
            if isinstance(module, nn.Embedding):
                manager.register_module_override(module, "weight", {"optim_bits": 32})
        with unset_fake_temporarily():
            optimizer = AdamW8bit(trained)
            optimizer.fill_qmap()
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    found: torch.optim.Optimizer = optimizer
    return found


def _constants(tensor: Tensor) -> list[Tensor]:
    """The tensors beside a packed 4-bit weight."""
    state = getattr(tensor, "quant_state", None)
    states = [] if state is None else [state] if state.state2 is None else [state, state.state2]
    return [value for one in states for value in (one.absmax, one.code, one.offset) if isinstance(value, Tensor)]


def _mark(layers: list[nn.Module], books: Books) -> None:
    """Has the books told where in the model the step is. Running a layer again is part of its backward pass."""

    def before(index: int, hidden: Any) -> None:
        if _goes_back():
            return
        if index == 0 and hidden.requires_grad:
            hidden.register_hook(lambda _: books.enter("embedding's backward pass"))
        books.enter("forward pass", index)

    def after(index: int, out: Any) -> None:
        if _goes_back():
            return
        hidden: Any = out if isinstance(out, Tensor) else out[0]
        hidden.register_hook(lambda _: books.enter("backward pass", index))
        if index == len(layers) - 1:
            books.enter("loss")

    for index, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda _, arguments, index=index: before(index, arguments[0]))
        layer.register_forward_hook(lambda _, __, out, index=index: after(index, out))


def _goes_back() -> bool:
    """Within a backward pass."""
    return bool(torch._C._current_graph_task_id() != -1)
