"""What a run's events add up to: the one summary that every panel, progress bar and command line reads."""

from __future__ import annotations

import contextlib
import math
import time
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from sparklab.run.events import Event
from sparklab.units import NA

Status = Literal["starting", "running", "paused", "stopped", "failed", "finished", "lost"]

KEPT_MEMORY: Final = 240
"""Memory events kept: the last minutes; a run of weeks must not grow whoever looks on."""
KEPT_MESSAGES: Final = 1000
KEPT_SAMPLES: Final = 1000
"""The latest of a run that says something all the time."""
KEPT_EVALS: Final = 4096
"""Evaluations kept; of more, every second goes, though never the best."""
LONGEST_TEXT: Final = 20_000
"""Characters kept of a text."""
LAST_STEP: Final = 2**53
"""A number of an update from here on is none."""
LONGEST_DRAW_SECONDS: Final = 30.0
"""Between two readings of the power; across longer gaps nobody knows what was drawn."""


_MEMORY = ("process_bytes", "peak_bytes", "available_bytes", "total_bytes", "free_bytes", "cached_bytes", "swap_used_bytes", "pressure_percent",
           "held_bytes", "allocated_bytes", "reserved_bytes", "watts", "floor_bytes")  # fmt: skip


def _number(value: Any) -> float:
    """A figure from a file nobody vouches for: anything that is not a finite number is NA."""
    if type(value) is float:  # nearly all of them
        return value if value - value == 0.0 else NA
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return NA
    try:
        return float(value) if math.isfinite(value) else NA
    except OverflowError:  # an integer no float can hold
        return NA


def _numbers(values: list[Any]) -> array[float]:
    """:func:`_number` of each, eight bytes a figure. Nearly all columns are finite numbers throughout, which is told at once."""
    if {int, float}.issuperset(map(type, values)):
        with contextlib.suppress(OverflowError):
            column = array("d", values)
            if math.isfinite(sum(column)):
                return column
    return array("d", map(_number, values))


def _texts(values: Any) -> list[str]:
    return [value[:LONGEST_TEXT] for value in values[:KEPT_MESSAGES] if isinstance(value, str)] if isinstance(values, list) else []


def _is_regular(event: Event) -> bool:
    """An update as a worker tells it: its number and how many there are to be are plain integers."""
    step = event.get("step")
    steps = event.get("steps")
    return type(step) is int and abs(step) < LAST_STEP and type(steps) is int and abs(steps) < LAST_STEP


@dataclass
class RunState:
    """A run as its events tell it; grows by :meth:`add`. Figures nobody reported yet are ``NA``.

    ``status`` says what the events say; a run whose worker died without a last word is told from outside by :meth:`mark_lost`.
    """

    status: Status = "starting"
    phase: str = "start"
    detail: str = ""
    """What the phase says of itself, in words."""
    step: int = 0
    steps: int = 0
    epoch: float = 0.0
    reason: str = ""
    """Why it stopped or failed, in words."""
    fix: str = ""
    ended_by: str = ""
    """``guard`` where the guard stopped the run or ended its worker."""
    device: str = ""
    method: str = ""
    started_time: float = NA
    """Unix seconds of the first start."""
    last_time: float = NA
    peak_bytes: float = NA
    parameters: float = NA
    trainable_parameters: float = NA

    loss_steps: array[int] = field(default_factory=lambda: array("q"))
    """The number of each update; the series below have a figure for each."""
    losses: array[float] = field(default_factory=lambda: array("d"))
    grad_norms: array[float] = field(default_factory=lambda: array("d"))
    learning_rates: array[float] = field(default_factory=lambda: array("d"))
    step_tokens: array[float] = field(default_factory=lambda: array("d"))
    """Non-pad tokens of each update."""
    step_seconds: array[float] = field(default_factory=lambda: array("d"))
    """Duration of each update, without loading and evaluating."""
    step_waits: array[float] = field(default_factory=lambda: array("d"))
    """Of these, the seconds spent waiting for data."""
    tokens: float = 0.0
    """Non-pad tokens trained on so far."""
    seconds: float = 0.0
    """Duration of all updates."""
    evals: list[dict[str, float]] = field(default_factory=list)
    """step, loss, and where answers were compared exact_match and n."""
    samples: list[dict[str, Any]] = field(default_factory=list)
    """The latest: step, prompt, text."""
    samples_told: int = 0
    """How many there were."""
    memory: list[dict[str, Any]] = field(default_factory=list)
    """The latest readings: time, step, the sizes in bytes, pressure_percent, watts, and others (name to bytes)."""
    joules: float = NA
    """Drawn so far, where the box tells what it draws."""
    checkpoints: list[dict[str, Any]] = field(default_factory=list)
    messages: list[dict[str, Any]] = field(default_factory=list)
    """What a person should read, the latest of it: warnings, commands carried out, the last word."""
    messages_told: int = 0
    """How many there were."""
    data: dict[str, Any] = field(default_factory=dict)
    rate_changes: list[dict[str, float]] = field(default_factory=list)
    """step, learning_rate (the new peak) and was, of every change on the way."""
    row_tokens: float = NA
    """The most tokens that go through the model at once, where running out of memory has made it less than the recipe says."""

    def add(self, event: Event) -> None:
        """Takes one event in; unknown or damaged fields become NA rather than errors."""
        self.add_all([event])

    def add_all(self, events: Iterable[Event]) -> None:
        """Takes events in, in order. Updates, which are nearly all of a long run, go into the series a column at a time."""
        updates: list[Event] = []
        for event in events:
            if event["event"] == "step" and _is_regular(event):
                updates.append(event)
                continue
            if updates:
                self._reach(updates[-1])
            if event["event"] in ("started", "step"):  # a start takes back what the series must hold by then
                self._extend(updates)
                updates = []
            self.last_time = _number(event.get("time"))
            handler = getattr(self, f"_on_{event['event']}", None)
            if handler is not None:
                handler(event)
        if updates:
            self._reach(updates[-1])
            self._extend(updates)

    @property
    def is_over(self) -> bool:
        """True when no worker will add to this run by itself."""
        return self.status in ("stopped", "failed", "finished", "lost")

    @property
    def tokens_per_second(self) -> float:
        """Non-pad tokens per second over the last fifty updates."""
        seconds = sum(self.step_seconds[-50:])
        return sum(self.step_tokens[-50:]) / seconds if seconds > 0 else NA

    @property
    def eta_seconds(self) -> float:
        """Seconds left at the mean pace so far; NA before the first update."""
        if not self.loss_steps or self.is_over:
            return NA
        return (self.steps - self.step) * self.seconds / len(self.loss_steps)

    @property
    def elapsed_seconds(self) -> float:
        """Seconds from the first start to now, or to the last event of a run that is over."""
        elapsed = (self.last_time if self.is_over else time.time()) - self.started_time
        return elapsed if math.isnan(elapsed) else max(0.0, elapsed)  # clocks are set back now and then

    @property
    def best_eval(self) -> dict[str, float] | None:
        """The evaluation with the lowest held-out loss."""
        scored = [entry for entry in self.evals if not math.isnan(entry["loss"])]
        return min(scored, key=lambda entry: entry["loss"]) if scored else None

    def messages_since(self, told: int) -> list[dict[str, Any]]:
        """The messages after the first ``told``, as far as they are kept."""
        return self.messages[max(0, len(self.messages) - max(0, self.messages_told - told)) :]

    def mark_lost(self, log_tail: str = "", guard: dict[str, Any] | None = None) -> None:
        """The worker is gone and left no last word: killed, or the box went down. One that never began has left its reason in the log.

        ``guard``: what the watchdog left that killed it.
        """
        ended = f"; worker.log ends:\n{log_tail}" if log_tail else ""
        if guard is not None:
            self.ended_by, self.reason, self.fix = "guard", f"the guard ended the worker: {guard['reason']}", guard["fix"]
        elif self.status == "starting":
            self.reason = f"the worker ended before it could begin{ended}"
            self.fix = "mend what the log names, then resume the run"
        else:
            self.reason = f"the worker process is gone without a word (killed, out of memory, or the machine restarted){ended}"
            self.fix = "resume the run; it goes on from the last checkpoint"
        self.status = "lost"

    def _on_started(self, event: Event) -> None:
        self.status, self.phase, self.reason, self.fix, self.ended_by = "running", "start", "", "", ""
        self.device, self.method = str(event.get("device", "")), str(event.get("method", ""))
        if math.isnan(self.started_time):
            self.started_time = self.last_time
        resumed = event.get("resumed_from")
        # A run that was ended before its first checkpoint begins anew, with the evaluation before its first update.
        self._rewind(-1 if resumed is None else int(_number(resumed)) if not math.isnan(_number(resumed)) else 0)

    def _rewind(self, step: int) -> None:
        """Steps after the checkpoint a run resumed from will be made again: forget them, so that no step counts twice."""
        keep = sum(1 for logged in self.loss_steps if logged <= step)
        del self.loss_steps[keep:]
        for _, series in self._figures:
            del series[keep:]
        self.tokens, self.seconds = sum(self.step_tokens, 0.0), sum(self.step_seconds, 0.0)
        self.evals = [entry for entry in self.evals if entry["step"] <= step]
        kept = [entry for entry in self.samples if entry["step"] <= step]
        self.samples, self.samples_told = kept, self.samples_told - len(self.samples) + len(kept)
        self.step = max(0, step)

    def _on_phase(self, event: Event) -> None:
        self.phase, self.detail = str(event.get("phase", "")), str(event.get("detail") or "")
        self.status = "paused" if self.phase == "paused" else "running"

    def _on_data(self, event: Event) -> None:
        known = _texts(self.data.get("warnings"))
        for warning in _texts(event.get("warnings")):
            if warning not in known:  # a resumed run says its data again
                self._say({**event, "event": "warning"}, f"data: {warning}")
        self.data = {key: value for key, value in event.items() if key not in ("event", "seq", "time")}

    def _on_model(self, event: Event) -> None:
        self.parameters, self.trainable_parameters = _number(event.get("parameters")), _number(event.get("trainable_parameters"))

    def _on_step(self, event: Event) -> None:
        """An update that is not told as a worker tells it."""
        step, steps = _number(event.get("step")), _number(event.get("steps"))
        if abs(step) < LAST_STEP:  # NA compares false
            update = {**event, "step": int(step), "steps": self.steps if math.isnan(steps) else int(steps)}
            self._reach(update)
            self._extend([update])

    def _reach(self, update: Event) -> None:
        """The run is at this update."""
        self.last_time = _number(update.get("time"))
        self.step, self.steps, self.epoch = update["step"], update["steps"], _number(update.get("epoch"))

    def _extend(self, updates: list[Event]) -> None:
        """These updates, at the end of the series."""
        count = len(self.loss_steps)
        self.loss_steps.extend([update["step"] for update in updates])
        for name, series in self._figures:
            series.extend(_numbers([update.get(name) for update in updates]))
        self.tokens, self.seconds = sum(self.step_tokens[count:], self.tokens), sum(self.step_seconds[count:], self.seconds)

    @property
    def _figures(self) -> tuple[tuple[str, array[float]], ...]:
        """The series beside the numbers of the updates, each with the field it is filled from."""
        return (("loss", self.losses), ("grad_norm", self.grad_norms), ("learning_rate", self.learning_rates), ("tokens", self.step_tokens),
                ("seconds", self.step_seconds), ("wait_seconds", self.step_waits))  # fmt: skip

    def _on_eval(self, event: Event) -> None:
        self.evals.append({key: _number(event.get(key)) for key in ("step", "loss", "exact_match", "n", "tokens")})
        if len(self.evals) > KEPT_EVALS:
            best, last = self.best_eval, self.evals[-1]
            self.evals = [entry for index, entry in enumerate(self.evals) if index % 2 == 0 or entry is best or entry is last]

    def _on_sample(self, event: Event) -> None:
        words = {name: str(event.get(name, ""))[:LONGEST_TEXT] for name in ("prompt", "text")}
        self.samples.append({"step": _number(event.get("step")), **words})
        self.samples_told += 1
        del self.samples[:-KEPT_SAMPLES]

    def _on_learning_rate(self, event: Event) -> None:
        change = {name: _number(event.get(name)) for name in ("step", "learning_rate", "was")}
        self.rate_changes.append(change)
        del self.rate_changes[:-KEPT_MESSAGES]
        self._say(event, f"the learning rate peaks at {change['learning_rate']:.3g} from here on (it was {change['was']:.3g})")

    def _on_retry(self, event: Event) -> None:
        self.row_tokens = _number(event.get("row_tokens"))
        self._say(event, f"memory ran out ({event.get('phase')}): at most {self.row_tokens:,.0f} tokens at once from here on, as many in an update")

    def _on_changed(self, event: Event) -> None:
        what = event.get("what")
        self._say(event, "going on with what was changed: " + (", ".join(map(str, what)) if isinstance(what, (dict, list)) else ""))

    def _on_memory(self, event: Event) -> None:
        entry: dict[str, Any] = {"time": self.last_time, "step": float(self.step), **{name: _number(event.get(name)) for name in _MEMORY}}
        others = event.get("others")
        entry["others"] = {str(name): _number(size) for name, size in list(others.items())[:20]} if isinstance(others, dict) else {}
        if self.memory and 0 <= (gap := self.last_time - self.memory[-1]["time"]) <= LONGEST_DRAW_SECONDS and not math.isnan(entry["watts"]):
            self.joules = (0.0 if math.isnan(self.joules) else self.joules) + entry["watts"] * gap
        self.memory.append(entry)
        del self.memory[:-KEPT_MEMORY]
        if not math.isnan(entry["peak_bytes"]):
            self.peak_bytes = entry["peak_bytes"] if math.isnan(self.peak_bytes) else max(self.peak_bytes, entry["peak_bytes"])

    def _on_checkpoint(self, event: Event) -> None:
        self.checkpoints.append({"step": _number(event.get("step")), "path": str(event.get("path", ""))[:LONGEST_TEXT], "bytes": _number(event.get("bytes")),
                                 "held_out_loss": _number(event.get("held_out_loss"))})  # fmt: skip
        del self.checkpoints[:-KEPT_MESSAGES]
        self._say(event, f"checkpoint at step {event.get('step')}")

    def _on_command(self, event: Event) -> None:
        word = "refused" if event.get("refused") is True else "done"
        self._say(event, f"{event.get('name')}: {event.get('detail') or word}")

    def _on_warning(self, event: Event) -> None:
        self._say(event, str(event.get("message", "")))

    def _on_stopped(self, event: Event) -> None:
        self.status, self.reason, self.fix = "stopped", str(event.get("reason", "")), str(event.get("fix") or "resume the run to go on")
        self.ended_by = "guard" if event.get("by") == "guard" else ""
        self._say(event, f"stopped: {self.reason}")

    def _on_failed(self, event: Event) -> None:
        self.status, self.reason, self.fix = "failed", str(event.get("fact", "")), str(event.get("fix", ""))
        self._say(event, f"failed: {self.reason}")

    def _on_finished(self, event: Event) -> None:
        self.status, self.phase, self.reason = "finished", "done", ""
        self._on_memory({"event": "memory", "peak_bytes": event.get("peak_bytes")})
        self._say(event, f"finished after {self.step} steps")

    def _say(self, event: Event, text: str) -> None:
        kind = {"kind": str(event["kind"])[:40]} if event.get("kind") else {}  # of a warning: guard, nonfinite
        self.messages.append({"event": event["event"], "time": self.last_time, "step": self.step, "text": text[:LONGEST_TEXT], **kind})
        self.messages_told += 1
        del self.messages[:-KEPT_MESSAGES]
