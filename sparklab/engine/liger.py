"""Liger's Triton kernels on CUDA: RMSNorm, rotary positions and the gated product, behind the same seams as our own PyTorch.

Whether they are used is decided once a process: liger-kernel is installed (the extra ``sparklab[gpu]``), can be loaded, and each kernel gives the
right numbers on a few rows of this device. Where it is not so, :func:`refusal` says why, and sparklab's own code computes. Nothing is imported on a CPU.

What they keep for the backward pass is what ours keep (x and one fp32 number a row; cos and sin; gate and up), and they need less beside it: a norm
works in registers where ours works in fp32 tensors, rotary positions turn their input in place (a projection's output, or a norm's, which nothing
keeps) and so does their gradient, and the gated product's gradients are written over gate and up. A plan counts ours, so it is never too low.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparklab.text import said

DEVICE = "cuda"
"""The kind of device they run on. (No Final: Triton's interpreter runs them on a CPU, in tests.)"""
CASTS: Final = {"llama": ("llama", 0.0), "olmo": ("gemma", 0.0), "gemma": ("gemma", 1.0)}
"""Our spelling of a norm: Liger's casting mode (``gemma``: rounded last) and what is added to the weight."""
MOST_WIDE: Final = 65536  # numbers in a row that one Triton block takes


class Kernels(NamedTuple):
    """Liger's functions. Those of the MLP by our name of the activation; its exact GELU is not among them."""

    norm: Callable[..., Tensor]
    """(x, weight, eps, offset, casting mode, whether the gradient is written over the output's) -> normed; differentiable."""
    turn: Callable[..., tuple[Tensor, Tensor]]
    """(q, k, cos, sin) -> both turned, in place; differentiable."""
    gated: dict[str, Callable[[Tensor, Tensor], Any]]
    """(gate, up) -> (gate, up, act(gate) * up)."""
    gated_backward: dict[str, Callable[[Tensor, Tensor, Tensor], Any]]
    """(gate, up, the product's gradient) -> the gradients of both, written over gate and up."""


def norm(x: Tensor, weight: Tensor, eps: float, spelling: str) -> Tensor | None:
    """RMSNorm in one of our spellings; None where it is not to be had.

    The output's gradient is left as it is: that of a norm behind a residual branch is the residual's own.
    """
    found = _for(x)
    if found is None or x.shape[-1] > MOST_WIDE:
        return None
    casting, offset = CASTS[spelling]
    return found.norm(x, weight, eps, offset, casting, False)


def turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor] | None:
    """q [B, heads, T, D] and k turned as transformers does, in their own memory; cos, sin [B, T, D]. None where it is not to be had."""
    found = _for(q)
    return None if found is None else found.turn(q, k, cos, sin)


def gates(act: str, gate: Tensor) -> bool:
    """Whether :func:`gated` and :func:`gated_backward_` are to be had."""
    found = _for(gate)
    return found is not None and act in found.gated and gate.shape[-1] <= MOST_WIDE


def gated(act: str, gate: Tensor, up: Tensor) -> Tensor | None:
    """``act(gate) * up``; None where it is not to be had."""
    found = _for(gate)
    if found is None or not gates(act, gate):
        return None
    product: Tensor = found.gated[act](gate, up)[2]
    return product


def gated_backward_(act: str, grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor] | None:
    """The gradients of gate and up from that of :func:`gated`, written over gate and up; None where it is not to be had."""
    found = _for(gate)
    if found is None or not gates(act, gate):
        return None
    d_gate, d_up = found.gated_backward[act](gate, up, grad)
    return d_gate, d_up


def refusal(device: torch.device) -> str:
    """Why an installed liger-kernel is not used on this device, in words; "" where it is, or is not installed, or the device is not one for it.

    A trace's model lies on a CPU that is not there, also where CUDA is: nothing is tried for it.
    """
    return _decide()[1] if device.type == DEVICE else ""


def _for(x: Tensor) -> Kernels | None:
    return _decide()[0] if x.device.type == DEVICE else None


@cache
def _decide() -> tuple[Kernels | None, str]:
    """Liger's kernels, or None and why not."""
    try:
        name = f"liger-kernel {version('liger-kernel')}"
    except PackageNotFoundError:
        return None, ""
    try:
        found = _load()
        wrong = _disagreement(found)
    except Exception as error:  # noqa: BLE001 - a compiler's, a driver's, another version's: whatever it is, there is another way
        wrong = said(error, -1)
    return (found, "") if not wrong else (None, f"{name} is installed and not used, for a trial of its kernels failed ({wrong})")


def _load() -> Kernels:
    from liger_kernel.ops.geglu import geglu_backward, geglu_forward  # noqa: PLC0415 - loads Triton
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction  # noqa: PLC0415
    from liger_kernel.ops.rope import LigerRopeFunction  # noqa: PLC0415
    from liger_kernel.ops.swiglu import swiglu_backward, swiglu_forward  # noqa: PLC0415

    return Kernels(
        norm=LigerRMSNormFunction.apply,
        turn=LigerRopeFunction.apply,
        gated={"silu": swiglu_forward, "gelu_tanh": geglu_forward},
        gated_backward={"silu": swiglu_backward, "gelu_tanh": geglu_backward},
    )


def _disagreement(found: Kernels) -> str:
    """Runs each kernel forward and backward on a few fp32 rows; which of them gives other numbers than torch, "" for none."""
    draw = torch.Generator().manual_seed(0)

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw).to(DEVICE)

    x, weight, gate, up, grad = some(3, 64), some(64), some(3, 64), some(3, 64), some(3, 64)
    angles, q, k = some(1, 3, 8).repeat(1, 1, 2), some(1, 3, 4, 16).transpose(1, 2), some(1, 3, 2, 16).transpose(1, 2)
    cos, sin = angles.cos(), angles.sin()
    casting, offset = CASTS["llama"]
    normed = _with_gradients(lambda x: found.norm(x, weight, 1e-6, offset, casting, False), grad, x)
    if not _alike(normed, _with_gradients(lambda x: F.rms_norm(x, (64,), weight, 1e-6), grad, x)):
        return "RMSNorm gives other numbers"
    turned = _with_gradients(lambda q: found.turn(q.clone(), k.clone(), cos, sin)[0], q, q)
    if not _alike(turned, _with_gradients(lambda q: q * cos + torch.cat((-q[..., 8:], q[..., :8]), -1) * sin, q, q)):
        return "rotary positions give other numbers"
    for act, value in (("silu", F.silu), ("gelu_tanh", partial(F.gelu, approximate="tanh"))):
        given = [found.gated[act](gate, up)[2], *found.gated_backward[act](gate.clone(), up.clone(), grad)]
        if not _alike(given, _with_gradients(lambda gate, up, value=value: value(gate) * up, grad, gate, up)):
            return f"the product gated by {act} gives other numbers"
    return ""


def _with_gradients(function: Callable[..., Tensor], grad: Tensor, *given: Tensor) -> list[Tensor]:
    """The function's value, and its gradients with respect to all that is given."""
    leaves = [tensor.detach().requires_grad_() for tensor in given]
    with torch.enable_grad():
        out = function(*leaves)
    return [out.detach().clone(), *torch.autograd.grad(out, leaves, grad.clone())]


def _alike(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(torch.allclose(one, other, rtol=1e-3, atol=1e-4) for one, other in zip(found, wanted, strict=True))
