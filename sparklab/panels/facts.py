"""What a panel says about a run, in words and figures: computed once here for the live panel, its static twin and the terminal.

Everything comes from :class:`RunState` and the plan's JSON, and everything returned is cleaned text, finite numbers or None, ready for JSON.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from sparklab.errors import SparklabError
from sparklab.panels.parts import SEGMENTS, clean, one_line, smoothing
from sparklab.run.directory import RunDirectory
from sparklab.run.state import RunState
from sparklab.units import NA, format_seconds, gib, is_na

_PHASES = {
    "start": "Starting",
    "load": "Loading the model",
    "prepare": "Preparing the data",
    "evaluate": "Evaluating",
    "train": "Training",
    "sample": "Sampling",
    "save": "Saving",
}
_STATUSES = {"starting": "Starting", "paused": "Paused", "stopped": "Stopped", "failed": "Failed", "finished": "Finished", "lost": "Lost"}
_TONES = {"starting": "run", "running": "run", "paused": "warn", "stopped": "warn", "failed": "bad", "lost": "bad", "finished": "good"}

NEWEST_SAMPLES = 12
NEWEST_NOTES = 40
DASH = "\u2013"  # what stands where nothing is known yet


def figure(value: float, show: Callable[[float], str]) -> str:
    """``show(value)``, or a dash where the value is unknown."""
    return DASH if is_na(value) or math.isinf(value) else show(value)


def title(directory: RunDirectory) -> tuple[str, str]:
    """The run's name, and its model and method; a damaged recipe costs only the second."""
    name = one_line(directory.path.name or directory.path.resolve().name, 80)
    try:
        recipe = directory.recipe
    except (SparklabError, TypeError, ValueError):
        return name, ""
    return name, f"{one_line(recipe.model.rstrip('/').rsplit('/', 1)[-1], 60)} · {recipe.method}"


def word(state: RunState) -> str:
    """What the run is doing, in a word or three."""
    if state.status == "running":
        return _PHASES.get(state.phase) or one_line(state.phase, 30).capitalize() or "Training"
    return _STATUSES.get(state.status, "Running")


def head(state: RunState) -> dict[str, Any]:
    """State, progress and time: the line everybody reads first."""
    steps = max(state.steps, 0)
    share = min(1.0, max(0.0, state.step / steps)) if steps else 0.0
    elapsed, left = state.elapsed_seconds, NA if state.is_over else state.eta_seconds  # asked once: the latter sums the whole run
    step = f"step {state.step:,}" + (f" of {steps:,}" if steps else "") if state.step or steps else "no step yet"
    return {
        "status": state.status,
        "word": word(state),
        "tone": _TONES.get(state.status, "run"),
        "over": state.is_over,
        "step": clean(step, 60),
        "share": 1.0 if state.status == "finished" else share,
        "eta": figure(left, format_seconds),
        "elapsed": figure(elapsed, format_seconds),
        "times": _times(state, clean(step, 60), elapsed, left),
        "device": one_line(state.device, 40),
        "reason": clean(state.reason, 1500),
        "fix": clean(state.fix, 800),
    }


def _times(state: RunState, step: str, spent: float, left: float) -> str:
    """Step, epoch, time spent and time left in one line; what is not known yet is left out."""
    known = [step]
    if state.loss_steps and not is_na(state.epoch):
        known.append(f"epoch {state.epoch:.2f}")
    if not is_na(spent):
        known.append(f"{format_seconds(spent)} {'in all' if state.is_over else 'so far'}")
    if not is_na(left):
        known.append(f"{format_seconds(left)} left")
    return " · ".join(known)


def figures(state: RunState) -> dict[str, str]:
    """The single numbers beside the curves."""
    return {
        "loss": "NaN" if state.losses and is_na(state.losses[-1]) else figure(_last(state.losses), lambda value: f"{value:.3f}"),
        "held_out": figure(state.evals[-1]["loss"] if state.evals else NA, lambda value: f"{value:.3f}"),
        "tokens_per_second": figure(state.tokens_per_second, lambda value: f"{value:,.0f}"),
        "learning_rate": figure(_last(state.learning_rates), _scientific),
        "grad_norm": figure(_last(state.grad_norms), lambda value: f"{value:.3g}"),
        "exact_match": exact_match(state),
    }


def peak_rate(state: RunState) -> str:
    """The highest learning rate: what is left to say of it when the schedule has ended at zero."""
    return figure(max((rate for rate in state.learning_rates if not is_na(rate)), default=NA), _scientific)


def exact_match(state: RunState) -> str:
    """Share of held-out answers right, first and last time they were compared: ``'2 % → 94 %'``; "" where they never were."""
    scored = [entry["exact_match"] for entry in state.evals if not is_na(entry["exact_match"])]
    shares = [f"{100 * share:.0f} %" for share in scored]
    return f"{shares[0]} → {shares[-1]}" if len(shares) > 1 else "".join(shares)


def exact_match_count(state: RunState) -> str:
    """How many answers stand behind :func:`exact_match`."""
    counts = [entry["n"] for entry in state.evals if not is_na(entry["exact_match"]) and not is_na(entry["n"])]
    return f"of {counts[-1]:,.0f} held-out answers" if counts else "of held-out answers"


def curve(state: RunState) -> dict[str, Any]:
    """What the loss chart needs beside the points themselves."""
    best = state.best_eval
    return {
        "evals": [[entry["step"], entry["loss"]] for entry in state.evals if not is_na(entry["loss"]) and not is_na(entry["step"])],
        "best": [best["step"], best["loss"]] if best and not is_na(best["step"]) else None,
        "steps": max(state.steps, 0),
        "beta": smoothing(state.steps),
    }


def broken(state: RunState) -> str:
    """How many losses were not a number, and where it began; "" where all were."""
    steps = [step for step, loss in zip(state.loss_steps, state.losses, strict=True) if is_na(loss)]
    return f"{len(steps)} NaN, first at step {steps[0]:,}" if steps else ""


def memory(state: RunState, plan: dict[str, Any]) -> dict[str, Any]:
    """The planned peak by component, what was measured, and the line it must stay under; None for what nobody said."""
    segments = _segments(plan)
    planned, usable = _gib(plan.get("peak_gib")), _gib(plan.get("usable_gib"))
    now = gib(state.memory[-1]["process_bytes"]) if state.memory else NA
    peak = gib(state.peak_bytes)
    if is_na(peak) and state.memory:
        peak = now
    planned = sum(segment["gib"] for segment in segments) if is_na(planned) else planned
    tallest = max([value for value in (planned, peak, now) if not is_na(value)], default=0.0)
    # A line far beyond everything would squeeze the components to a sliver: it is then said in words, at the edge.
    near = not is_na(usable) and 0 < usable <= 4 * tallest
    return {
        "segments": segments,
        "planned": _or_none(planned if segments or planned else NA),
        "now": _or_none(now),
        "peak": _or_none(peak),
        "usable": _or_none(usable),
        "line": usable if near else None,
        "scale": max(tallest, usable if near else 0.0, 1e-9) * 1.06,
        "phase": one_line(plan.get("peak_phase") or "", 40),
    }


def memory_figures(view: dict[str, Any]) -> str:
    """The figures beside the memory bar; an arrow where the usable line lies beyond the scale."""
    named = (("planned peak", "planned"), ("measured peak", "peak"), ("now", "now"), ("usable", "usable"))
    known = [f"{name} {size(view[key])}" for name, key in named if view[key] is not None]
    beyond = " →" if view["line"] is None and view["usable"] is not None else ""
    return " · ".join(known) + beyond if known else "no plan, nothing measured yet"


def memory_words(view: dict[str, Any]) -> str:
    """The memory bar in one sentence, for those who cannot see it."""
    parts = [f"{segment['name']} {size(segment['gib'])}" for segment in view["segments"]]
    planned = f"Planned peak {size(view['planned'])}" + (f" ({', '.join(parts)})" if parts else "")
    return f"{planned}; measured peak {size(view['peak'])}; usable {size(view['usable'])}."


def size(value_gib: float | None) -> str:
    """GiB with the decimals that matter: ``'0.42 GiB'``, ``'16.4 GiB'``, ``'108 GiB'``."""
    if value_gib is None or is_na(value_gib):
        return DASH
    if 0 < value_gib < 0.1:
        return f"{value_gib * 1024:.0f} MiB" if value_gib * 1024 >= 1 else "< 1 MiB"
    return f"{value_gib:.2f} GiB" if value_gib < 10 else f"{value_gib:.1f} GiB" if value_gib < 100 else f"{value_gib:,.0f} GiB"


def samples(state: RunState, newest: int = NEWEST_SAMPLES) -> list[dict[str, str]]:
    """The latest answers, newest first."""
    return [
        {"step": figure(entry["step"], lambda value: f"step {value:,.0f}"), "prompt": clean(entry["prompt"], 600), "text": clean(entry["text"], 3000)}
        for entry in reversed(state.samples[-newest:])
    ]


def notes(state: RunState, newest: int = NEWEST_NOTES) -> list[dict[str, str]]:
    """The latest messages, newest first, each with the clock time it came at."""
    tones = {"warning": "warn", "failed": "bad", "finished": "good", "stopped": "warn"}
    return [
        {"time": _clock(entry["time"]), "tone": tones.get(entry["event"], ""), "text": clean(entry["text"], 600)}
        for entry in reversed(state.messages[-newest:])
    ]


def _segments(plan: dict[str, Any]) -> list[dict[str, Any]]:
    """The plan's lines of the peak phase, largest six, the rest summed; the sum closes on the planned peak."""
    lines = plan.get("lines")
    found = [
        (one_line(line.get("name", "?"), 60), _gib(line.get("gib")), one_line(line.get("formula") or "", 200))
        for line in (lines if isinstance(lines, list) else [])
        if isinstance(line, dict) and line.get("phase") == plan.get("peak_phase")
    ]
    found = sorted((line for line in found if line[1] > 0), key=lambda line: -line[1])
    planned = _gib(plan.get("peak_gib"))
    total = sum(line[1] for line in found)
    kept, rest = found[: len(SEGMENTS) - 1], sum(line[1] for line in found[len(SEGMENTS) - 1 :])
    if not is_na(planned) and planned > total:
        rest += planned - total
    segments = [{"name": name, "gib": amount, "formula": formula, "colour": SEGMENTS[index]} for index, (name, amount, formula) in enumerate(kept)]
    if rest > 0.005 * max(total, rest):
        segments.append({"name": "everything else", "gib": rest, "formula": "", "colour": SEGMENTS[-1]})
    return segments


def _gib(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return NA
    return float(value) if math.isfinite(value) and 0 <= value < 1e9 else NA


def _or_none(value: float) -> float | None:
    return None if is_na(value) else value


def _last(values: Sequence[float]) -> float:
    return values[-1] if values else NA


def _scientific(value: float) -> str:
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa}e{int(exponent)}" if value else "0"


def _clock(seconds: float) -> str:
    try:
        return time.strftime("%H:%M:%S", time.localtime(seconds))
    except (ValueError, OverflowError, OSError):  # NaN, or a year nobody will see
        return ""
