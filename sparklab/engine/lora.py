"""Linear layers with adapters, as few matrix products and kept tensors as the arithmetic allows.

Shapes: T tokens, I inputs, O outputs, R rank; ``y = x W' + s (x A') B'`` with a frozen W [O, I], A [R, I] and B [O, R].

One autograd function does all layers that read the same x: the low-rank products ``x A'`` of all are one product, ``y += s low B'`` goes into the
base's own output, and so do the gradients: ``dLow = s dY B``, ``dA = dLow' x``, ``dB = s dY' low``, ``dX = sum dY W + dLow A``, each addend
added in place. W gets no gradient, B A is never formed. Kept for the backward pass: x, which the layers share, and low [T, R] of each.

PEFT stays the owner: the layers are its own, with their names, parameters and files. An instance's class becomes a subclass whose forward pass takes
this path when the layer is *plain* (one active adapter, nothing merged or switched off, no dropout at work) and PEFT's own otherwise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sparklab.engine.device import on_gpu

_aten: Final = torch.ops.aten


class Frozen:
    """The base of an adapted layer: W, in its own type or packed in 4 bits, and a bias."""

    def __init__(self, linear: nn.Module, buffer: Buffer) -> None:
        self.linear: Any = linear
        self.packed = hasattr(linear, "quant_state") or hasattr(linear.weight, "quant_state")
        self.buffer = buffer

    @property
    def weight(self) -> Tensor:
        """[O, I] in the type it computes in. A 4-bit one is unpacked into the shared buffer: it is good until the next one is asked for."""
        weight: Tensor = self.linear.weight
        return self.buffer.unpack(weight) if self.packed else weight

    @property
    def dtype(self) -> torch.dtype | None:
        """The type it computes in; None while 4-bit weights are not packed yet."""
        if not self.packed:
            found: torch.dtype = self.linear.weight.dtype
            return found
        state = getattr(self.linear.weight, "quant_state", None)
        return None if state is None or self.linear.compute_dtype not in (None, state.dtype) else state.dtype

    def __call__(self, x: Tensor) -> Tensor:
        """x W' + bias, without a graph."""
        bias = self.linear.bias
        return F.linear(x, self.weight, bias if bias is None else bias.to(x.dtype))


class Buffer:
    """The memory that 4-bit weights of one model are unpacked into, one at a time; on a CPU, whose kernel takes none, a passing tensor."""

    def __init__(self) -> None:
        self.memory: Tensor | None = None
        self.numbers = 0

    def unpack(self, packed: Any) -> Tensor:
        """The weight [O, I] in the type that it was packed from."""
        from bitsandbytes.functional import dequantize_4bit  # noqa: PLC0415 - loads only where it is used

        state = packed.quant_state
        if packed.device.type == "cpu":
            whole: Tensor = dequantize_4bit(packed.data, state)
            return whole
        self.numbers = max(self.numbers, state.shape.numel())
        if self.memory is None or self.memory.numel() < self.numbers or self.memory.dtype != state.dtype:
            self.memory = torch.empty(self.numbers, dtype=state.dtype, device=packed.device)
        place = self.memory[: state.shape.numel()].view(state.shape)
        dequantize_4bit(packed.data, state, out=place)
        return place


class Adapters:
    """What one call needs of one layer: its base, its A and B, its scaling."""

    __slots__ = ("a", "b", "base", "scaling")

    def __init__(self, base: Frozen, a: Tensor, b: Tensor, scaling: float) -> None:
        self.base, self.a, self.b, self.scaling = base, a, b, scaling


def low_rank(x_TI: Tensor, a: Sequence[Tensor]) -> Tensor:
    """x A' of all layers side by side, [T, sum of R]."""
    return x_TI @ joined(a, x_TI.dtype).t()


def joined(matrices: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The A of all layers one below the other, in the type of the products."""
    return torch.cat([matrix.detach() for matrix in matrices]).to(dtype) if len(matrices) > 1 else matrices[0].detach().to(dtype)


def adapted(x_TI: Tensor, low_TR: Tensor, base: Frozen, b_OR: Tensor, scaling: float) -> Tensor:
    """The layer's output: the base's, with the adapter's product added into it; on a GPU the other way round, see :func:`gradient_of_input`."""
    b_RO = b_OR.detach().to(x_TI.dtype).t()
    if not on_gpu(x_TI) or base.linear.bias is not None:
        return base(x_TI).addmm_(low_TR, b_RO, alpha=scaling)
    out = x_TI.new_empty((len(x_TI), len(b_OR)))
    torch.addmm(out, low_TR, b_RO, beta=0, alpha=scaling, out=out)
    return out.addmm_(x_TI, base.weight.t())


def gradient_of_input(grads: Sequence[tuple[Tensor, Frozen]], d_low_TR: Tensor, a_RI: Tensor) -> Tensor:
    """[T, I]: the sum of ``grad W`` over layers that read one x, and ``dLow A``.

    A large product adds to what is there while it computes; a small one waits for memory. On a GPU it therefore comes first, when there is nothing to
    read yet (up to 6 % of a layer, benchmarks/LOG.md); on a CPU that would take the large product another way.
    """
    if on_gpu(d_low_TR):
        out = d_low_TR @ a_RI
        for grad_TO, base in grads:
            out.addmm_(grad_TO, base.weight)
        return out
    (first_TO, base), *others = grads
    out = first_TO @ base.weight
    for grad_TO, base in others:
        out.addmm_(grad_TO, base.weight)
    return out.addmm_(d_low_TR, a_RI)


def d_low(grad_TO: Tensor, b_OR: Tensor, scaling: float) -> Tensor:
    """[T, R]: the gradient of x A'."""
    return (grad_TO @ b_OR.to(grad_TO.dtype)).mul_(scaling)


def d_b(grad_TO: Tensor, low_TR: Tensor, scaling: float, b_OR: Tensor) -> Tensor:
    """[O, R], in B's type."""
    return (low_TR.t() @ grad_TO).mul_(scaling).to(b_OR.dtype).t()  # a fifth faster on a CPU than [O, R] at once


class _Linears(torch.autograd.Function):
    """Layers that read the same x; a, b: their adapters, first all A, then all B."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bases: Sequence[Frozen], scalings: Sequence[float], *matrices: Tensor) -> tuple[Tensor, ...]:
        count = len(bases)
        a, b = matrices[:count], matrices[count:]
        flat_TI = x.reshape(-1, x.shape[-1])
        low_TR = low_rank(flat_TI, a)
        lows = torch.split(low_TR, [matrix.shape[0] for matrix in a], 1)
        made = (adapted(flat_TI, low, base, matrix, scaling) for low, base, matrix, scaling in zip(lows, bases, b, scalings, strict=True))
        outs = tuple(_aten._unsafe_view(out, (*x.shape[:-1], out.shape[-1])) for out in made)  # no views: some blocks write over what a layer gives them
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, low_TR, *matrices)
        ctx.bases, ctx.scalings = bases, scalings
        return outs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, low_TR, *matrices = ctx.saved_tensors
        count = len(ctx.bases)
        a, b = matrices[:count], matrices[count:]
        lows = low_TR.split([matrix.shape[0] for matrix in a], 1)
        flat_TI = x.reshape(-1, x.shape[-1])
        asked: list[tuple[Tensor, Frozen]] = []
        d_lows: list[Tensor] = []
        d_bs: list[Tensor | None] = []
        for grad, low, base, matrix, scaling in zip(grads, lows, ctx.bases, b, ctx.scalings, strict=True):
            if grad is None:  # nobody asked this layer
                d_lows.append(torch.zeros_like(low))
                d_bs.append(None)
                continue
            grad_TO = grad.reshape(-1, grad.shape[-1])
            d_lows.append(d_low(grad_TO, matrix, scaling))
            d_bs.append(d_b(grad_TO, low, scaling, matrix))
            asked.append((grad_TO, base))
        d_low_TR = torch.cat(d_lows, 1) if count > 1 else d_lows[0]
        d_x = gradient_of_input(asked, d_low_TR, joined(a, x.dtype)).view_as(x) if ctx.needs_input_grad[0] and asked else None
        d_as = (d_low_TR.t() @ flat_TI).split([matrix.shape[0] for matrix in a])
        return (d_x, None, None, *(d.to(matrix.dtype) for d, matrix in zip(d_as, a, strict=True)), *d_bs)


def apply(x: Tensor, layers: Sequence[Adapters]) -> tuple[Tensor, ...]:
    """The outputs of layers that all read ``x`` [..., I]."""
    matrices = (*(layer.a for layer in layers), *(layer.b for layer in layers))
    outs: tuple[Tensor, ...] = _Linears.apply(x, [layer.base for layer in layers], [layer.scaling for layer in layers], *matrices)  # type: ignore[no-untyped-call]
    return outs


class Together:
    """Layers that their block calls one after the other with the same x: the first one called computes all, and the others hand out theirs."""

    def __init__(self, members: Sequence[Any]) -> None:
        self.members = tuple(members)
        self._x: Tensor | None = None
        self._ready: dict[int, Tensor] = {}

    def __call__(self, member: Any, x: Tensor, own: Adapters) -> Tensor:
        """The output of one member."""
        if self._x is x and id(member) in self._ready:
            out = self._ready.pop(id(member))
            if not self._ready:
                self._x = None
            return out
        self.let_go()
        if member is not self.members[0]:
            return apply(x, [own])[0]
        others = [layer.plain(x) for layer in self.members[1:]]
        if any(other is None for other in others):
            return apply(x, [own])[0]
        out, *rest = apply(x, [own, *others])
        self._x, self._ready = x, {id(layer): tensor for layer, tensor in zip(self.members[1:], rest, strict=True)}
        return out

    def let_go(self) -> None:
        """Drops what a forward pass that broke off has left."""
        self._x, self._ready = None, {}


class Lora:
    """Mixed into the class of a PEFT layer."""

    fast_base: Frozen
    fast_together: Together | None

    def plain(self: Any, x: Tensor) -> Adapters | None:
        """The adapter to compute with, or None where PEFT must: see the module's text."""
        if self.disable_adapters or self.merged_adapters or len(self.active_adapters) != 1 or torch.is_autocast_enabled(x.device.type):
            return None
        name = self.active_adapters[0]
        if name not in self.lora_A or name in self.lora_variant or self.lora_bias[name] or self.fast_base.dtype != x.dtype:
            return None
        dropout, base = self.lora_dropout[name], self.fast_base.linear
        if (self.training and getattr(dropout, "p", 0.0)) or base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad):
            return None
        return Adapters(self.fast_base, self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name])

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        own = None if args or kwargs else self.plain(x)
        if own is None:
            slow: Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
            return slow
        return apply(x, [own])[0] if self.fast_together is None else self.fast_together(self, x, own)


@functools.cache
def mixed(kind: Callable[..., Any], mixin: type) -> Any:
    """``kind`` with the methods of ``mixin`` before its own; its name stays."""
    assert isinstance(kind, type)
    return type(kind.__name__, (mixin, kind), {"__module__": kind.__module__})


KINDS: Final = ("Linear", "Linear4bit")
"""PEFT's layers that this path knows, by the names of their classes."""


def take_over(layer: Any, buffer: Buffer) -> str | None:
    """Puts the fast path into a PEFT layer; in words what it has that keeps it on PEFT's own, if anything does."""
    if any(kind.__name__ == "ParamWrapper" for kind in type(layer).__mro__):  # around a mixture's experts, which are no linear layer
        return None
    base = layer.get_base_layer()
    if type(layer).__name__ not in KINDS or type(base).__name__ not in KINDS or getattr(layer, "fan_in_fan_out", False):
        return f"a base of another kind ({type(base).__name__})"
    layer.fast_base, layer.fast_together = Frozen(base, buffer), None
    layer.__class__ = mixed(type(layer), Lora)  # type: ignore[arg-type]
    if layer.lora_variant:
        return "adapters of another kind (DoRA and the like)"
    return "dropout" if any(getattr(dropout, "p", 0.0) for dropout in layer.lora_dropout.values()) else None


def together(layers: Sequence[Any]) -> None:
    """Says that these layers, taken over before, are called in this order with the same x."""
    group = Together(layers)
    for layer in layers:
        layer.fast_together = group


def let_go(model: nn.Module) -> None:
    """Drops what groups hold of a forward pass that broke off: an output, and with its graph all activations before it."""
    for layer in model.modules():
        if isinstance(layer, Lora) and layer.fast_together is not None:
            layer.fast_together.let_go()
