"""A run's curves in as many rows as a screen has pixels: the same few for a hundred steps and for a hundred thousand.

A row stands for ``stride`` updates, one while the run is short. It keeps the lowest and the highest loss of its updates, so that no spike is
lost, and their mean, so that the smoothed curve is that of the run.
"""

from __future__ import annotations

import array
import copy
import math
import sys
from collections.abc import Sequence
from typing import Final

from sparklab.run.state import RunState
from sparklab.units import NA, is_na

COLUMNS: Final = ("step", "loss", "low", "high", "broken", "learning_rate", "grad_norm", "grad_peak", "tokens_per_second")
"""What a row holds, each a little-endian float32, NaN where unknown: step and learning rate of its last update, means, extremes, and how many of
its losses were not a number."""
MOST_ROWS: Final = 2048  # a panel is at most 1080 pixels wide

_WARM, _BETA = 24, 0.96  # updates before anything counts as a spike, and how slowly what is usual follows


class Series:
    """The rows of one run, brought up to date by :meth:`take`.

    ::

        series = Series()
        series.take(state)
        series.column("loss")
    """

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self._rows = array.array("f")  # an overflowing float becomes infinity here, where struct would raise
        self.updates, self.stride = 0, 1
        self._last: tuple[float, ...] = ()
        self.broken, self.first_broken = 0, 0
        """Losses that were not a number, and the step of the first."""
        self.spikes, self.last_spike = 0, 0
        """Losses far above what was usual, and the step of the last."""
        self.peak_rate = NA
        """The highest learning rate so far."""
        self._usual = self._apart = self._weight = 0.0

    def __len__(self) -> int:
        return len(self._rows) // len(COLUMNS)

    def take(self, state: RunState) -> tuple[int, bytes]:
        """(index of the first row that is new or grew, rows from there on); index 0 with all rows also when a resumed run went back in time."""
        total = len(state.loss_steps)
        stride = stride_of(total)
        anew = total < self.updates or bool(self.updates and self._identity(state, self.updates - 1) != self._last)
        if anew or stride != self.stride:
            self._forget()
            self.stride = stride
        elif total == self.updates:
            return len(self), b""
        self._watch(state.loss_steps, state.losses, self.updates)
        rates = [rate for rate in state.learning_rates[self.updates :] if math.isfinite(rate)]
        self.peak_rate = max(rates if is_na(self.peak_rate) else [self.peak_rate, *rates], default=NA)
        first = self.updates // stride  # the last row may not have been full
        del self._rows[first * len(COLUMNS) :]
        for start in range(first * stride, total, stride):
            self._rows.extend(_row(state, start, min(start + stride, total)))
        self.updates = total
        self._last = self._identity(state, total - 1) if total else ()
        return first, self._bytes(first)

    def copy(self) -> Series:
        """The same rows, to be brought up to date by themselves: what has been added up for one view need not be for the next."""
        twin = copy.copy(self)
        twin._rows = self._rows[:]
        return twin

    def all(self) -> bytes:
        """Every row so far."""
        return self._bytes(0)

    def column(self, name: str) -> Sequence[float]:
        """One figure over all rows."""
        return self._rows[COLUMNS.index(name) :: len(COLUMNS)]

    def _bytes(self, first: int) -> bytes:
        rows = self._rows[first * len(COLUMNS) :]
        if sys.byteorder == "big":
            rows.byteswap()
        return rows.tobytes()

    def _watch(self, steps: Sequence[int], losses: Sequence[float], start: int) -> None:
        """Counts what is not a number and what is far above the usual: ten mean deviations, and a third more than the mean."""
        usual, apart, weight = self._usual, self._apart, self._weight
        for index in range(start, len(losses)):
            loss = losses[index]
            if not math.isfinite(loss):
                self.broken += 1
                self.first_broken = self.first_broken or steps[index]
                continue
            mean = usual / weight if weight else loss
            if weight and index >= _WARM and loss > 1.33 * mean and loss > mean + 10 * apart / weight:
                self.spikes += 1
                self.last_spike = steps[index]
                continue  # a spike does not become the usual
            usual, apart, weight = _BETA * usual + (1 - _BETA) * loss, _BETA * apart + (1 - _BETA) * abs(loss - mean), _BETA * weight + (1 - _BETA)
        self._usual, self._apart, self._weight = usual, apart, weight

    @staticmethod
    def _identity(state: RunState, index: int) -> tuple[float, ...]:
        """What tells an update from the same step made again after a resume; its duration never repeats to the last digit."""
        figures = (state.loss_steps[index], state.losses[index], state.grad_norms[index], state.step_seconds[index])
        return tuple(-1.0 if math.isnan(figure) else figure for figure in figures)


def stride_of(updates: int) -> int:
    """Updates in a row, a power of two: ``stride_of(2048) == 1``, ``stride_of(100_000) == 64``."""
    stride = 1
    while updates > stride * MOST_ROWS:
        stride *= 2
    return stride


def _row(state: RunState, start: int, end: int) -> tuple[float, ...]:
    losses = [loss for loss in state.losses[start:end] if math.isfinite(loss)]
    norms = [norm for norm in state.grad_norms[start:end] if math.isfinite(norm)]
    seconds = sum(state.step_seconds[start:end])
    return (
        state.loss_steps[end - 1],
        sum(losses) / len(losses) if losses else NA,
        min(losses, default=NA),
        max(losses, default=NA),
        end - start - len(losses),
        state.learning_rates[end - 1],
        sum(norms) / len(norms) if norms else NA,
        max(norms, default=NA),
        sum(state.step_tokens[start:end]) / seconds if seconds > 0 else NA,
    )
