"""Several runs beside each other, in words and figures: computed once here for the live table, its static twin and the terminal."""

from __future__ import annotations

import array
import dataclasses
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Final

from sparklab.errors import SparklabError
from sparklab.panels import facts, parts
from sparklab.panels.parts import FAINT, SEGMENTS, Chart, Curve, Dots, chart_html, escape, frame, one_line, swatch
from sparklab.planner.recipe import Recipe
from sparklab.run.directory import RunDirectory
from sparklab.run.state import RunState
from sparklab.units import NA, format_count, format_seconds, gib, is_na, jsonable

COLOURS: Final = SEGMENTS[:-1]
MOST_DRAWN: Final = len(COLOURS)
"""Curves in one picture: as many as there are colours that can be told apart."""
MOST_POINTS: Final = 500
"""Of one curve: a point for every other pixel."""
_SAME: Final = frozenset({"model", "method", "sample_prompts"})
"""Fields that the table shows anyway, or that change nothing."""
_TONES: Final = {"run": parts.LOSS, "good": parts.GOOD, "warn": parts.WARN, "bad": parts.BAD}


class Drawn:
    """The updates of one run that are drawn, and its smoothed training loss at each; worked out again only where the run has made others."""

    def __init__(self) -> None:
        self._of = ""
        self._points: tuple[Sequence[int], list[float]] = ((), [])

    def points(self, state: RunState) -> tuple[Sequence[int], list[float]]:
        """(which of the updates, from 0; smoothed loss at each). The last update is always among them."""
        count = len(state.losses)
        last = [series[-1] for series in (state.loss_steps, state.losses, state.step_seconds) if count]
        of = repr((count, state.steps, last))  # in words, for NaN is not equal to itself
        if of != self._of:
            places = range(0, count, max(1, -(-count // MOST_POINTS)))
            kept = [*places, *([count - 1] if places and places[-1] != count - 1 else [])]
            self._of, self._points = of, (kept, parts.smooth(state.losses, parts.smoothing(state.steps), kept))
        return self._points


@dataclass(frozen=True)
class Entry:
    """One run: its directory, its state now, its recipe (None where it cannot be read), its plan, and its curve as far as it is worked out."""

    directory: RunDirectory
    state: RunState
    recipe: Recipe | None
    plan: dict[str, Any]
    drawn: Drawn = field(default_factory=Drawn)

    @property
    def name(self) -> str:
        return facts.title(self.directory)[0]


_MEASURED_WITH: Final = ("format", "template", "learn", "overrule", "on_bad", "on_long")
"""Fields that decide which tokens of the held-out records count."""


def measured_on(entry: Entry) -> tuple[Any, ...] | None:
    """What a run's held-out loss was measured on, by content where the run wrote it down: only losses on the same can be compared. None: unknown."""
    recipe = entry.recipe
    if recipe is None:
        return None
    try:
        start = entry.directory.read_json("environment")
    except SparklabError:
        start = {}
    own = isinstance(recipe.held_out, str)
    held, model = start.get("held_out" if own else "data"), start.get("model")
    content = next((held[name] for name in ("sha256", "fingerprint") if held.get(name)), None) if isinstance(held, dict) else None
    share = () if own else (recipe.held_out, recipe.seed)
    files = model.get("files") if isinstance(model, dict) else None
    words = files.get("tokenizer.json") if isinstance(files, dict) else None
    counted = (entry.state.best_eval or {}).get("tokens", NA)
    # Equal in number, the tokens are the same ones, wherever rows were cut; but a document in pieces has lost what stood before each.
    cut = recipe.max_length if is_na(counted) or recipe.on_long == "split" else counted
    return repr(content or (recipe.held_out if own else recipe.data)), *share, repr(words), cut, *(getattr(recipe, name) for name in _MEASURED_WITH)


def comparable(entries: Sequence[Entry]) -> list[list[int]]:
    """Which of the entries have held-out losses that can be compared with each other: indices, in groups."""
    groups: dict[Any, list[int]] = {}
    for index, entry in enumerate(entries):
        if entry.state.best_eval is not None:
            groups.setdefault(measured_on(entry) or index, []).append(index)
    return list(groups.values())


def recipe_of(directory: RunDirectory) -> Recipe | None:
    """The run's recipe; None where it is damaged or another version's."""
    try:
        return directory.recipe
    except (SparklabError, TypeError, ValueError):
        return None


def differing(entries: Sequence[Entry]) -> list[str]:
    """The recipe's fields in which the runs differ, in the recipe's order."""
    recipes = [entry.recipe for entry in entries if entry.recipe is not None]
    names = [field.name for field in dataclasses.fields(Recipe) if field.name not in _SAME]
    return [name for name in names if len({repr(getattr(recipe, name)) for recipe in recipes}) > 1]


def by_tokens(entries: Sequence[Entry]) -> bool:
    """Whether updates are of different sizes, so that tokens are the fair axis and steps are not."""
    sizes = {(entry.recipe.micro_batch_tokens, entry.recipe.micro_batches_per_update) for entry in entries if entry.recipe is not None}
    return len(sizes) > 1


def figures(entry: Entry) -> dict[str, Any]:
    """The run in figures, ready for JSON; None for what is not known."""
    state, best = entry.state, entry.state.best_eval
    scored = [score["exact_match"] for score in state.evals if not is_na(score["exact_match"])]
    recipe = entry.recipe
    values = {
        "run": str(entry.directory.path), "status": state.status, "model": recipe.model if recipe else None, "method": recipe.method if recipe else None,
        "step": state.step, "steps": state.steps, "loss": entry.drawn.points(state)[1][-1] if state.losses else NA,
        "best_held_out_loss": best["loss"] if best else NA, "exact_match": scored[-1] if scored else NA, "tokens": state.tokens,
        "tokens_per_second": _pace(state), "peak_gib": gib(state.peak_bytes), "planned_gib": entry.plan.get("peak_gib"),
        "seconds": state.elapsed_seconds,
    }  # fmt: skip
    checked: dict[str, Any] = jsonable(values)
    return checked


def _pace(state: RunState) -> float:
    """Non-pad tokens a second over the whole run: what a comparison wants, where the live panel shows the last updates."""
    return state.tokens / state.seconds if state.seconds > 0 else NA


_COLUMNS: Final = (
    ("best_held_out_loss", "best held-out", lambda value: f"{value:.4f}"),
    ("loss", "training loss", lambda value: f"{value:.3f}"),
    ("exact_match", "exact match", lambda value: f"{value:.1%}"),
    ("tokens_per_second", "tokens/s", lambda value: f"{value:,.0f}"),
    ("peak_gib", "peak", facts.size),
    ("seconds", "time", format_seconds),
)
"""(figure, heading, how it is written); a column that no run has a figure for is left out."""


APART: Final = "held-out losses on different data: the best is marked only among runs with the same"


def table(entries: Sequence[Entry]) -> dict[str, Any]:
    """Headings and rows of cleaned text; the best held-out loss is marked. ``differing`` fields stand as words with each run."""
    found = [figures(entry) for entry in entries]
    columns = [column for column in _COLUMNS if any(row[column[0]] is not None for row in found)]
    groups = comparable(entries)
    best = {min(group, key=lambda index: found[index]["best_held_out_loss"]) for group in groups if len(group) > 1}
    names = differing(entries)
    rows = []
    for index, (entry, row) in enumerate(zip(entries, found, strict=True)):
        head = facts.head(entry.state)
        rows.append({
            "name": entry.name,
            "about": facts.title(entry.directory)[1],
            "word": head["word"],
            "tone": head["tone"],
            "step": head["step"],
            "settings": [f"{name} {one_line(getattr(entry.recipe, name), 60)}" for name in names] if entry.recipe is not None else [],
            "cells": [parts.one_line("–" if row[key] is None else show(row[key])) for key, _, show in columns],
            "best": index in best,
            "colour": COLOURS[index] if index < MOST_DRAWN else "",
        })  # fmt: skip
    note = APART if len(groups) > 1 else ""
    return {"headings": [heading for _, heading, _ in columns], "rows": rows, "by_tokens": by_tokens(entries), "note": note}


def points(entry: Entry, tokens: bool) -> tuple[list[float], list[float], list[tuple[float, float]]]:
    """x (updates, or tokens seen) and smoothed training loss of the updates that are drawn, and (x, loss) of every evaluation."""
    state = entry.state
    xs: Sequence[float] = list(accumulate(state.step_tokens)) if tokens else state.loss_steps
    measured = {score["step"] for score in state.evals}
    place: dict[float, float] = {0.0: 0.0, **{step: float(x) for step, x in zip(state.loss_steps, xs, strict=True) if step in measured}}
    evals = [(place[score["step"]], score["loss"]) for score in state.evals if score["step"] in place and not is_na(score["loss"])]
    kept, losses = entry.drawn.points(state)
    return [float(xs[index]) for index in kept], losses, evals


def view(entries: Sequence[Entry]) -> tuple[dict[str, Any], bytes]:
    """What the live table shows, ready for JSON; and its curves, thinned, as little-endian float32 x and y in turn, one run after the other."""
    seen = table(entries)
    curves, numbers = [], array.array("f")
    for entry in entries[:MOST_DRAWN]:
        xs, ys, evals = points(entry, seen["by_tokens"])
        numbers.extend(value for point in zip(xs, ys, strict=True) for value in point)
        curves.append({"count": len(xs), "evals": [list(point) for point in evals]})
    if sys.byteorder == "big":
        numbers.byteswap()
    return {**seen, "title": _title(entries), "about": _about(entries, seen["note"]), "curves": curves}, numbers.tobytes()


def _title(entries: Sequence[Entry]) -> str:
    return f"{len(entries)} run{'s' * (len(entries) != 1)}"


def _about(entries: Sequence[Entry], note: str) -> str:
    more = f"; curves of the first {MOST_DRAWN}" if len(entries) > MOST_DRAWN else ""
    return f"smoothed training loss, dots held-out{more}" + (f"; {note}" if note else "")


def twin_html(entries: Sequence[Entry], home: str = "") -> str:
    """Table and overlaid curves without script and style sheet; everything in it is escaped."""
    small = f"font-size:12px;{FAINT}"
    if not entries:
        return frame(f'No runs here. <span style="{small}">sl.train(recipe, "runs/1")</span>', home)
    seen = table(entries)
    body = _curves_html(entries[:MOST_DRAWN], seen["by_tokens"]) + _table_html(seen)
    head = f'<b style="font-size:15px">{_title(entries)}</b> <span style="{small}">{_about(entries, seen["note"])}</span>'
    return frame(head + body, home)


def _curves_html(entries: Sequence[Entry], tokens: bool) -> str:
    curves, dots, shown, end = [], [], [], 1.0
    for entry, colour in zip(entries, COLOURS, strict=False):
        xs, ys, evals = points(entry, tokens)
        curves.append(Curve(xs=xs, ys=ys, colour=colour, width=2))
        dots.append(Dots(xs=[x for x, _ in evals], ys=[y for _, y in evals], colour=colour, size=6))
        shown += [value for value in (*ys, *(y for _, y in evals)) if math.isfinite(value)]
        end = max(end, *(xs[-1:] or [1.0]))
    if not shown:
        return f'<div style="font-size:12px;{FAINT};margin:8px 0">No step was made yet.</div>'
    chart = Chart(x_range=(0.0, end), y_ticks=parts.ticks(min(shown), max(shown)), curves=tuple(curves), dots=tuple(dots))
    losses = "; ".join(f"{entry.name}: {facts.figures(entry.state)['held_out']} held out" for entry in entries)
    labels = ("0 tokens", f"{format_count(end)} tokens") if tokens else ("step 0", f"step {end:,.0f}")
    return f'<div style="margin:14px 0 0 0">{chart_html(chart, f"Loss of {len(entries)} runs. {losses}.", 220, labels)}</div>'


def _table_html(seen: dict[str, Any]) -> str:
    cell = "padding:4px 14px 4px 0;border:0;background:none;vertical-align:baseline"
    right = f"{cell};text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums"
    heads = "".join(f'<th style="{right};font-weight:normal;{FAINT}">{escape(heading)}</th>' for heading in seen["headings"])
    rows = ""
    for row in seen["rows"]:
        square = swatch(row["colour"]) if row["colour"] else ""
        words = " · ".join(escape(text) for text in (row["about"], row["step"], *row["settings"]) if text)
        dot = f'<span style="color:{_TONES[row["tone"]]}" aria-hidden="true">●</span>'
        name = f'<div>{square}<b dir="auto">{escape(row["name"])}</b> {dot} {escape(row["word"])}</div><div style="font-size:12px;{FAINT}">{words}</div>'
        cells = "".join(
            f'<td style="{right}">{f"<b>{escape(text)}</b>" if row["best"] and index == 0 else escape(text)}</td>' for index, text in enumerate(row["cells"])
        )
        rows += f'<tr style="background:none"><td style="{cell};text-align:left;min-width:200px">{name}</td>{cells}</tr>'
    head = f'<tr style="background:none"><th style="{cell};text-align:left;font-weight:normal;{FAINT}">run</th>{heads}</tr>'
    style = "border-collapse:collapse;border:0;width:100%;table-layout:auto;font-size:13px"
    return f'<div style="overflow-x:auto;margin:12px 0 0 0"><table style="{style}">{head}{rows}</table></div>'


def text(entries: Sequence[Entry]) -> str:
    """The table for a terminal: a line a run, and below it what it was set to where the runs differ."""
    if not entries:
        return "no runs"
    seen = table(entries)
    lines = [["run", "state", *seen["headings"]], *([row["name"], row["word"], *row["cells"]] for row in seen["rows"])]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    shown = []
    for index, line in enumerate(lines):
        best = index > 0 and seen["rows"][index - 1]["best"]
        cells = [f"{word:<{width}}" if column < 2 else f"{word:>{width}}" for column, (word, width) in enumerate(zip(line, widths, strict=True))]
        shown.append("  ".join(cells).rstrip() + ("  best" if best else ""))
        if index and seen["rows"][index - 1]["settings"]:
            shown.append("  " + ", ".join(seen["rows"][index - 1]["settings"]))
    return "\n".join([*shown, *([seen["note"]] if seen["note"] else [])])
