"""Nothing that is not finite reaches the weights: an update is looked at after its gradients are there and before the optimizer moves anything.

A loss or a gradient norm that is NaN or infinite leaves weights, moments and the last checkpoints as they were. The run stops with the rows that
are to blame, or, where the recipe allows it (``skip_bad_updates``), the update is dropped and the next one tried.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparklab.errors import RunFailed

ROWS_NAMED = 8  # of the suspects; the rest are counted


@dataclass(frozen=True)
class BadUpdate:
    """An update that was not made."""

    step: int
    """Its number, from 1."""
    loss: float
    grad_norm: float
    rows: tuple[int, ...]
    """Training rows under suspicion, from 0: those whose own loss is not finite; where each is, all of the update."""
    lines: tuple[int, ...] = ()
    """Lines of the data file that are in them, from 1, where the data knows them."""
    weights_are_finite: bool = True
    """Of the trained weights before it: they are to blame where they are not."""

    def __str__(self) -> str:
        where = f"row{'s' if len(self.rows) > 1 else ''} {_named(self.rows)}"
        lines = f" (lines {_named(self.lines)} of the data)" if self.lines else ""
        what = "the loss" if not math.isfinite(self.loss) else "a gradient"
        return f"update {self.step}: {what} is not finite (loss {self.loss:.4g}, gradient norm {self.grad_norm:.4g}) in {where}{lines}"

    def failure(self, skipped: int) -> RunFailed:
        """What ends the run."""
        before = f", after {skipped} skipped in a row" if skipped else ""
        if not self.weights_are_finite:
            return RunFailed(f"{self}{before}; the trained weights were not finite before it: earlier updates were too large",
                             "start a new run with a lower learning_rate")  # fmt: skip
        return RunFailed(
            f"{self}{before}; weights and optimizer are as they were before it",
            "look at those rows (sparklab inspect) and resume with skip_bad_updates to leave such updates out; where every row is so, earlier "
            "updates were too large: start a new run with a lower learning_rate",
        )


def _named(numbers: Sequence[int]) -> str:
    more = len(numbers) - ROWS_NAMED
    return ", ".join(map(str, numbers[:ROWS_NAMED])) + (f" and {more} more" if more > 0 else "")


class Watch:
    """Keeps the losses of the micro-batches of an update until its gradients are there, then judges them."""

    def __init__(self, allowed: int) -> None:
        self.allowed = allowed
        """Bad updates in a row that may be skipped."""
        self.skipped = 0
        """Bad updates in a row until now."""
        self._losses: list[Tensor] = []

    @property
    def has_losses(self) -> bool:
        """The update under way has begun."""
        return bool(self._losses)

    def note(self, loss: Tensor) -> None:
        """A micro-batch's loss. Stays on the device: nothing waits for it before the update is whole."""
        self._losses.append(loss.detach())

    def restart(self) -> None:
        """The update under way begins again."""
        self._losses.clear()

    def judge(self, grad_norm: Tensor, accelerator: Any) -> tuple[float, float, list[int]] | None:
        """None where loss and gradients are finite, on all ranks; else both and the micro-batches of this rank whose loss is not finite."""
        losses = torch.stack([*self._losses, torch.zeros_like(grad_norm, dtype=torch.float32)])[: len(self._losses)]
        self._losses.clear()
        bad = ~(losses.sum() + grad_norm).isfinite()
        if accelerator.num_processes > 1:  # a loss may be infinite on one rank and its gradient nought: all ranks must come to the same end
            bad = accelerator.reduce(bad.float(), "sum") > 0
        if not bad:
            self.skipped = 0
            return None
        return float(losses.sum()), float(grad_norm), (~losses.isfinite()).nonzero()[:, 0].tolist()


def drop_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """An optimizer leaves a parameter without a gradient, and its moments, alone."""
    for parameter in parameters:
        parameter.grad = None


def weights_are_finite(model: nn.Module) -> bool:
    """Whether every trained weight is a number."""
    return all(bool(parameter.isfinite().all()) for parameter in model.parameters() if parameter.requires_grad)
