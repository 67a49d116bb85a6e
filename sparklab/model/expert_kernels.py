"""Three kernels of ours for experts on CUDA, in Triton: the gated product of two halves of a tensor, its gradients, and the sum of each token's rows.

torch's own operations do the same in ten: halves are no contiguous tensors, which it passes through at a third of the memory's pace, and rows are summed by
one number a thread. Whether ours are used is decided once a process, as with Liger's (:mod:`sparklab.engine.liger`): Triton is there, and each kernel gives
the right numbers on a few rows of this device. Where it is not so, :func:`refusal` says why, and torch's operations compute. Nothing is imported on a CPU.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from sparklab.text import said

DEVICE = "cuda"
"""The kind of device they run on. (No Final: Triton's interpreter runs them on a CPU, in tests.)"""
ROWS, TOKENS, CHOICES, INNER, WIDTH = 6, 3, 2, 72, 1100  # of the trial: neither fills its blocks


def product(gate_up: Tensor) -> Tensor | None:
    """silu(gate) * up of the halves of [S, 2I]; None where the kernel is not to be had."""
    found = _for(gate_up)
    return None if found is None or not gate_up.is_contiguous() else found.product(gate_up)


def gradients_(grad: Tensor, gate_up: Tensor) -> Tensor | None:
    """The gradients of both halves over them, from that of their product; each row's product with its gradient, [S] in fp32. None likewise."""
    found = _for(gate_up)
    return None if found is None or not gate_up.is_contiguous() else found.gradients_(grad.contiguous(), gate_up)


def gather_sum(rows: Tensor, places: Tensor, shares: Tensor | None) -> Tensor | None:
    """[S, H] summed by token in fp32, each row times its share; places and shares [T, k]. None likewise."""
    found = _for(rows)
    return None if found is None or rows.stride(1) != 1 else found.gather_sum(rows, places, None if shares is None else shares.contiguous())


def refusal(device: torch.device) -> str:
    """Why they are not used on this device although Triton is installed, in words; "" where they are, or it is not, or the device is not one for them."""
    return _decide()[1] if device.type == DEVICE else ""


def _for(x: Tensor) -> ModuleType | None:
    return _decide()[0] if x.device.type == DEVICE else None


@cache
def _decide() -> tuple[ModuleType | None, str]:
    """The kernels, or None and why not."""
    if find_spec("triton") is None:
        return None, ""
    try:
        from sparklab.model import expert_triton as found  # noqa: PLC0415 - loads Triton

        wrong = _disagreement(found)
    except Exception as error:  # noqa: BLE001 - a compiler's, a driver's: whatever it is, there is another way
        wrong = said(error, -1)
    return (found, "") if not wrong else (None, f"a trial of our Triton kernels for experts failed ({wrong})")


def _disagreement(found: ModuleType) -> str:
    """Runs each kernel on a few fp32 rows; which of them gives other numbers than torch, "" for none."""
    draw = torch.Generator().manual_seed(0)

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw).to(DEVICE)

    gate_up, grad, rows, shares = some(ROWS, 2 * INNER), some(ROWS, INNER), some(ROWS, WIDTH), some(TOKENS, CHOICES)
    places = torch.tensor([[4, 0], [1, 5], [2, 3]], device=DEVICE)
    with torch.enable_grad():
        leaf = gate_up.clone().requires_grad_()
        gate, up = leaf.chunk(2, -1)
        wanted = F.silu(gate) * up
    (d_leaf,) = torch.autograd.grad(wanted, leaf, grad)
    if not _alike(found.product(gate_up), wanted.detach()):
        return "the gated product gives other numbers"
    along = found.gradients_(grad, gate_up)
    if not (_alike(gate_up, d_leaf) and _alike(along, (wanted.detach() * grad).sum(-1))):
        return "the gated product's gradients are other numbers"
    for given in (None, shares):
        weights = torch.ones_like(shares) if given is None else given
        if not _alike(found.gather_sum(rows, places, given), (rows[places] * weights[..., None]).sum(1)):
            return "the sums of rows are other numbers"
    return ""


def _alike(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-4, atol=1e-4)
