"""What a panel says about a run, in words and figures: computed once here for the live panel, its static twin and the terminal.

Everything comes from :class:`RunState` and the plan's JSON, and everything returned is cleaned text, finite numbers or None, ready for JSON.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from sparklab.errors import SparklabError
from sparklab.panels.parts import clean, one_line, window
from sparklab.panels.series import Series
from sparklab.run.directory import RunDirectory
from sparklab.run.state import RunState
from sparklab.units import NA, format_seconds, is_na

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

NEWEST_PROMPTS = 6
NEWEST_ANSWERS = 6
LOOKED_THROUGH = 200  # samples
NEWEST_NOTES = 40
MOST_EVALS = 400  # points of a chart
DASH = "\u2013"  # what stands where nothing is known yet


def figure(value: float, show: Callable[[float], str]) -> str:
    """``show(value)``, or a dash where the value is unknown."""
    return DASH if is_na(value) or math.isinf(value) else show(value)


def loss_text(value: float) -> str:
    """A loss to three decimals, a large one to four figures: ``'0.541'``, ``'12.34'``."""
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.4g}"


def clip_norm(directory: RunDirectory) -> float:
    """The recipe's clip line; NA where the recipe cannot be read."""
    try:
        return directory.recipe.clip_norm
    except (SparklabError, TypeError, ValueError):
        return NA


def has_prompts(directory: RunDirectory) -> bool:
    """Whether the recipe says what to sample."""
    try:
        return bool(directory.recipe.sample_prompts)
    except (SparklabError, TypeError, ValueError):
        return False


def title(directory: RunDirectory) -> tuple[str, str]:
    """The run's name, and its model and method; a damaged recipe costs only the second."""
    name = one_line(directory.path.name or directory.path.resolve().name, 80)
    try:
        recipe = directory.recipe
    except (SparklabError, TypeError, ValueError):
        return name, ""
    return name, f"{one_line(recipe.model.rstrip('/').rsplit('/', 1)[-1], 60)} · {recipe.method}"


def by_guard(state: RunState) -> bool:
    """Whether the memory guard ended the run."""
    return state.is_over and getattr(state, "ended_by", "") == "guard"


def word(state: RunState) -> str:
    """What the run is doing, in a word or three."""
    if by_guard(state):
        return "Stopped by the memory guard"
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
        "tone": "bad" if by_guard(state) else _TONES.get(state.status, "run"),
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
    known = [one_line(state.detail, 80)] if state.detail and not state.is_over else []
    known.append(step)
    if state.loss_steps and not is_na(state.epoch):
        known.append(f"epoch {state.epoch:.2f}")
    if not is_na(spent):
        known.append(f"{format_seconds(spent)} {'in all' if state.is_over else 'so far'}")
    if not is_na(left):
        known.append(f"{format_seconds(left)} left")
    return " · ".join(known)


def figures(state: RunState, plan: dict[str, Any] | None = None, clip: float = NA, series: Series | None = None) -> dict[str, str]:
    """The single numbers beside the curves, and the words under them. ``clip``: the longest gradient that is let through."""
    plan = plan or {}
    return {
        "loss": "NaN" if state.losses and is_na(state.losses[-1]) else figure(_last(state.losses), loss_text),
        "held_out": figure(state.evals[-1]["loss"] if state.evals else NA, loss_text),
        "tokens_per_second": figure(state.tokens_per_second, lambda value: f"{value:,.0f}"),
        "speed_note": _speed_note(state, plan),
        "learning_rate": figure(_last(state.learning_rates), scientific),
        "rate_note": f"peak {figure(series.peak_rate, scientific)}" if series and series.updates else "",
        "grad_norm": figure(_last(state.grad_norms), lambda value: f"{value:.3g}"),
        "norm_note": _norm_note(state, clip),
        "energy": figure(state.joules / 3600, _watt_hours),
        "energy_note": _energy_note(state, plan),
        "exact_match": exact_match(state),
        "exact_match_count": exact_match_count(state),
    }


def waiting_share(state: RunState) -> float:
    """Share of the last fifty updates' time that was spent waiting for data; NA where nobody said."""
    known = [(wait, seconds) for wait, seconds in zip(state.step_waits[-50:], state.step_seconds[-50:], strict=True) if wait >= 0 and seconds > 0]
    return sum(wait for wait, _ in known) / sum(seconds for _, seconds in known) if known else NA


def roofline_share(state: RunState, plan: dict[str, Any]) -> float:
    """Speed as a share of what the plan's roofline allows; above 1 somebody has counted wrongly. NA where no plan says."""
    bounds = plan.get("tokens_per_second")
    bound = bounds[1] if isinstance(bounds, list) and len(bounds) == 2 else None
    return state.tokens_per_second / bound if isinstance(bound, (int, float)) and bound > 0 else NA


def _speed_note(state: RunState, plan: dict[str, Any]) -> str:
    """Non-pad, the share of the roofline, the share of the time spent waiting for data."""
    if not state.loss_steps:
        return "not counting padding"
    roofline, waiting = roofline_share(state, plan), waiting_share(state)
    notes = []
    if not is_na(roofline):
        notes.append(f"{_percent(roofline)} of roofline" if roofline <= 1 else "above the roofline: a counting error")
    if not is_na(waiting):
        notes.append(f"{_percent(waiting)} data wait")
    return ", ".join(notes) or "not counting padding"


def _norm_note(state: RunState, clip: float) -> str:
    """The clip line, and how many of the last updates reached it."""
    if is_na(clip):
        return "before clipping"
    recent = [norm for norm in state.grad_norms[-200:] if norm == norm]  # noqa: PLR0124 - not NA, four times a second
    return f"clipped at {clip:g}" + (f", {_percent(sum(norm > clip for norm in recent) / len(recent))} of updates" if recent else "")


def _energy_note(state: RunState, plan: dict[str, Any]) -> str:
    """Joules a token; where the box does not tell its draw, what the plan expects."""
    if not is_na(state.joules):
        each = f"{state.joules / state.tokens:.2g} J a token, " if state.tokens > 0 else ""
        return each + ("GPU only" if state.device.startswith("cuda") else "processor only")
    planned = plan.get("wh")
    if isinstance(planned, list) and len(planned) == 2 and all(isinstance(value, (int, float)) for value in planned):
        return f"not told here; planned {_watt_hours(planned[0])} to {_watt_hours(planned[1])}"
    return "this box does not tell"


def _watt_hours(value: float) -> str:
    return f"{value / 1000:.2f} kWh" if value >= 1000 else f"{value:,.0f} Wh" if value >= 100 else f"{value:.3g} Wh"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.0995 or share == 0 else "< 0.1 %" if share < 0.001 else f"{100 * share:.1f} %"


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
    evals = [[entry["step"], entry["loss"]] for entry in state.evals if not is_na(entry["loss"]) and not is_na(entry["step"])]
    stride = -(-len(evals) // MOST_EVALS)
    return {
        "evals": evals[:: max(1, stride)] + (evals[-1:] if stride > 1 else []),
        "best": [best["step"], best["loss"]] if best and not is_na(best["step"]) else None,
        "steps": max(state.steps, 0),
        "window": window(state.steps or len(state.losses)),
    }


def badge(series: Series) -> str:
    """What is wrong with the losses: how many are not a number and where it began, and spikes; "" where nothing is."""
    found = [f"{series.broken:,} NaN, first at step {series.first_broken:,}"] if series.broken else []
    if series.spikes:
        found.append(f"{series.spikes:,} spike{'s' if series.spikes > 1 else ''}, last at step {series.last_spike:,}")
    return "; ".join(found)


def size(value_gib: float | None) -> str:
    """GiB with the decimals that matter: ``'0.42 GiB'``, ``'16.4 GiB'``, ``'108 GiB'``."""
    if value_gib is None or is_na(value_gib):
        return DASH
    if 0 < value_gib < 0.1:
        return f"{value_gib * 1024:.0f} MiB" if value_gib * 1024 >= 1 else "< 1 MiB"
    return f"{value_gib:.2f} GiB" if value_gib < 10 else f"{value_gib:.1f} GiB" if value_gib < 100 else f"{value_gib:,.0f} GiB"


def samples(state: RunState) -> dict[str, Any]:
    """The latest answers by prompt, newest first: what the same question was answered as the model changed.

    ``groups`` of ``{"prompt", "answers": [{"step", "text"}, ...]}``, how many there are in all, and the latest in one line.
    """
    groups: dict[str, list[dict[str, str]]] = {}
    for entry in reversed(state.samples[-LOOKED_THROUGH:]):
        answers = groups.get(entry["prompt"])
        if answers is None:
            if len(groups) == NEWEST_PROMPTS:
                continue
            answers = groups[entry["prompt"]] = []
        if len(answers) < NEWEST_ANSWERS:
            answers.append({"step": figure(entry["step"], lambda value: f"step {value:,.0f}"), "text": clean(entry["text"], 3000)})
    latest = state.samples[-1] if state.samples else None
    return {
        "groups": [{"prompt": clean(prompt, 600), "answers": answers} for prompt, answers in groups.items()],
        "count": state.samples_told,
        "latest": one_line(latest["text"], 160) if latest else "",
    }


def notes(state: RunState, newest: int = NEWEST_NOTES) -> list[dict[str, str]]:
    """The latest messages, newest first, each with the clock time it came at."""
    tones = {"warning": "warn", "failed": "bad", "finished": "good", "stopped": "warn"}
    return [
        {"time": _clock(entry["time"]), "tone": "bad" if entry.get("kind") == "guard" else tones.get(entry["event"], ""), "text": clean(entry["text"], 600)}
        for entry in reversed(state.messages[-newest:])
    ]


def seen_last(entries: Sequence[Any]) -> tuple[int, int]:
    """What tells a list that only grows from what it was."""
    return len(entries), id(entries[-1]) if entries else 0


def _last(values: Sequence[float]) -> float:
    return values[-1] if values else NA


def scientific(value: float) -> str:
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa}e{int(exponent)}" if value else "0"


def _clock(seconds: float) -> str:
    try:
        return time.strftime("%H:%M:%S", time.localtime(seconds))
    except (ValueError, OverflowError, OSError):  # NaN, or a year nobody will see
        return ""
