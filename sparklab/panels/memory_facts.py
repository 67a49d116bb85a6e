"""The memory of a run in words and figures: planned by component, measured, and what else is in the pool."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

from sparklab.box.meter import MemorySnapshot
from sparklab.box.pool import pressure
from sparklab.panels.facts import size
from sparklab.panels.parts import DIM, SEGMENTS, one_line
from sparklab.planner.render import COLOURS, OTHER, colour
from sparklab.run.state import RunState
from sparklab.units import MIB, NA, gib, is_na

NAMED: Final = 7  # components of the plan with a name of their own
OTHERS: Final = 4  # other programs with a name of their own
RESERVE_SHARE: Final = 0.04  # of the pool, where no guard says from where on it runs dry
SWAP_SECONDS: Final = 30.0
SWAP_BYTES: Final = 64 * MIB  # more than this pushed out in that time is felt
ABOVE: Final = 1.05  # a measured peak this many times the planned one is said to be above it
LIGHTS: Final = {"good": "calm", "warn": "tight", "bad": "critical"}


def memory(state: RunState, plan: dict[str, Any]) -> dict[str, Any]:
    """The planned peak by component, what was measured, the line it must stay under, and the pool; None for what nobody said.

    ``segments`` sum to ``planned``, those of ``pool`` to its total.
    """
    segments = _segments(plan)
    planned, usable = _gib(plan.get("peak_gib")), _gib(plan.get("usable_gib"))
    last = latest(state)
    now, peak = gib(_held(last)), gib(state.peak_bytes)
    peak = now if is_na(peak) else peak
    planned = sum(segment["gib"] for segment in segments) if is_na(planned) else planned
    tallest = max([value for value in (planned, peak, now) if not is_na(value)], default=0.0)
    # A line far beyond everything would squeeze the components to a sliver: it is then said in words, at the edge.
    near = not is_na(usable) and 0 < usable <= 4 * tallest
    view: dict[str, Any] = {
        "segments": segments,
        "planned": _or_none(planned if segments or planned else NA),
        "now": _or_none(NA if state.is_over else now),
        "peak": _or_none(peak),
        "usable": _or_none(usable),
        "line": usable if near else None,
        "scale": max(tallest, usable if near else 0.0, 1e-9) * 1.06,
        "phase": one_line(plan.get("peak_phase") or "", 40),
        "above": bool(segments or planned) and not is_na(peak) and peak > ABOVE * planned,
        "pool": None if state.is_over else _pool(last),
        "light": light(state),
    }
    texts = {
        "planned_text": size(view["planned"]) if view["planned"] is not None else "no plan",
        "measured_text": _measured(view, state.is_over),
        "usable_text": f"usable {size(view['usable'])}{'' if near else ' →'}" if view["usable"] is not None else "",
    }
    return {**view, **texts, "words": memory_words(view), "figures": memory_figures(view)}


def _held(reading: dict[str, Any]) -> float:
    """What the worker held of the memory that its plan is about."""
    held: float = reading.get("held_bytes", NA)
    return reading.get("process_bytes", NA) if is_na(held) else held


def latest(state: RunState) -> dict[str, Any]:
    """The last reading that says what the worker held; {} before there is one."""
    return next((entry for entry in reversed(state.memory) if not is_na(entry["process_bytes"])), {})


def light(state: RunState) -> dict[str, str]:
    """How hard the pool is pressed: level (good, warn, bad or ""), a word for it, and the reason."""
    last = latest(state)
    if state.is_over or not last or is_na(last["available_bytes"]):
        return {"level": "", "word": "", "reason": ""}
    fields = ("total_bytes", "available_bytes", "free_bytes", "cached_bytes", "swap_used_bytes", "pressure_percent")
    reserve = last["floor_bytes"] if not is_na(last["floor_bytes"]) else RESERVE_SHARE * last["total_bytes"]
    level, reason = pressure(MemorySnapshot(**{name: last[name] for name in fields}), reserve)
    before = next((entry for entry in state.memory if last["time"] - entry["time"] <= SWAP_SECONDS and not is_na(entry["swap_used_bytes"])), last)
    pushed = last["swap_used_bytes"] - before["swap_used_bytes"]
    if pushed > SWAP_BYTES and level == "good":  # NA compares false
        level, reason = "warn", f"{size(gib(pushed))} went to swap in the last {SWAP_SECONDS:.0f} s"
    return {"level": level, "word": LIGHTS.get(level, ""), "reason": one_line(reason, 160)}


def memory_figures(view: dict[str, Any]) -> str:
    """All figures in one line; an arrow where the usable line lies beyond the scale."""
    named = (("planned peak", "planned"), ("measured peak", "peak"), ("now", "now"), ("usable", "usable"))
    known = [f"{name} {size(view[key])}" for name, key in named if view[key] is not None]
    beyond = " →" if view["line"] is None and view["usable"] is not None else ""
    return " · ".join(known) + beyond if known else "no plan, nothing measured yet"


def memory_words(view: dict[str, Any]) -> str:
    """The memory bars in a few sentences, for those who cannot see them."""
    parts = [f"{segment['name']} {size(segment['gib'])}" for segment in view["segments"]]
    planned = f"Planned peak {size(view['planned'])}" + (f" ({', '.join(parts)})" if parts else "")
    words = f"{planned}; measured peak {size(view['peak'])}; usable {size(view['usable'])}."
    return f"{words} {view['pool']['words']}" if view.get("pool") else words


def _measured(view: dict[str, Any], over: bool) -> str:
    if view["peak"] is None:
        return "nothing measured yet"
    peak = f"peak {size(view['peak'])}"
    if view["above"]:
        return f"{peak}, above the plan"
    return peak if over or view["now"] is None else f"{size(view['now'])} now, {peak}"


def _pool(last: dict[str, Any]) -> dict[str, Any] | None:
    """Everything in the pool at the last reading: this run, others by name, what is left, page cache that can go, free."""
    total, held = (last.get(name, NA) for name in ("total_bytes", "process_bytes"))
    if is_na(total) or total <= 0:
        return None
    free, cached, available = last["free_bytes"], last["cached_bytes"], last["available_bytes"]
    if is_na(free) or is_na(cached):
        free, cached = (NA if is_na(available) else available), 0.0
    if is_na(free):
        return None
    used = max(0.0, total - free - cached)
    parts = [("this run", min(held, used), DIM, False)]
    left = used - parts[0][1]
    others = sorted(((amount, one_line(name, 40)) for name, amount in last["others"].items() if amount > 0 and name != "page cache"), reverse=True)[:OTHERS]
    for index, (amount, name) in enumerate(others):
        parts.append((name, min(amount, left), SEGMENTS[index + 2], False))
        left -= parts[-1][1]
    parts.append(("everything else" if others else "other programs and the system", left, OTHER, False))
    parts.append(("page cache, given back when asked", min(cached, total), DIM, True))
    seen = [part for part in parts if part[1] > total / 400]
    segments = [{"name": name, "gib": gib(amount), "text": size(gib(amount)), "colour": shade, "hatched": hatched} for name, amount, shade, hatched in seen]
    text = f"{size(gib(available))} of {size(gib(total))} available" if not is_na(available) else size(gib(total))
    named = ", ".join(f"{part['name']} {part['text']}" for part in segments)
    words = f"In the pool of {size(gib(total))}: {named}, free {size(gib(free))}."
    return {"total": gib(total), "segments": segments, "text": text, "words": words}


def _segments(plan: dict[str, Any]) -> list[dict[str, Any]]:
    """The plan's lines of the peak phase, largest few, the rest summed, in the order and colours of every plan; they close on the planned peak."""
    lines = plan.get("lines")
    found = [
        (one_line(line.get("name", "?"), 60), _gib(line.get("gib")), one_line(line.get("formula") or "", 200))
        for line in (lines if isinstance(lines, list) else [])
        if isinstance(line, dict) and line.get("phase") == plan.get("peak_phase")
    ]
    found = sorted((line for line in found if line[1] > 0), key=lambda line: -line[1])
    planned = _gib(plan.get("peak_gib"))
    total = sum(line[1] for line in found)
    rest = sum(line[1] for line in found[NAMED:])
    if not is_na(planned) and planned > total:
        rest += planned - total
    order = {name: place for place, name in enumerate(COLOURS)}
    kept = sorted(found[:NAMED], key=lambda line: order.get(line[0], len(order)))
    segments = [_segment(name, amount, formula, shade) for (name, amount, formula), shade in zip(kept, _shades([line[0] for line in kept]), strict=True)]
    if rest > 0.005 * max(total, rest):
        segments.append(_segment("everything else", rest, "", OTHER))
    return segments


def _segment(name: str, amount: float, formula: str, shade: str) -> dict[str, Any]:
    return {"name": name, "gib": amount, "text": size(amount), "formula": formula, "colour": shade}


def _shades(names: Sequence[str]) -> list[str]:
    """Each component's colour, the same as in every plan; those that no plan knows take what is left."""
    spare = iter(SEGMENTS * (1 + len(names) // len(SEGMENTS)))
    return [colour(name) if name in COLOURS else next(spare) for name in names]


def _gib(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return NA
    return float(value) if math.isfinite(value) and 0 <= value < 1e9 else NA


def _or_none(value: float) -> float | None:
    return None if is_na(value) else value
