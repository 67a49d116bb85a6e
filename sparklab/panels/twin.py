"""The run panel's static twin: HTML that needs no kernel, no script and no style sheet.

It is what stays in a notebook when the run is over, and what an untrusted notebook, an HTML export or a mail still shows.
"""

from __future__ import annotations

import math
import time
from typing import Any

from sparklab.panels import facts, parts
from sparklab.panels.memory_facts import memory
from sparklab.panels.parts import (
    BAD,
    DIM,
    FAINT,
    GOOD,
    HELD_OUT,
    LINE,
    LOSS,
    NUMBERS,
    SMALL,
    WARN,
    Chart,
    Curve,
    Dots,
    chart_html,
    dot,
    escape,
    faint,
    fold,
    section,
    swatch,
)
from sparklab.panels.series import Series
from sparklab.run.state import RunState
from sparklab.units import NA

_TONES = {"run": LOSS, "good": GOOD, "warn": WARN, "bad": BAD}


def run_html(
    state: RunState, plan: dict[str, Any], title: str = "", about: str = "", *, clip: float = NA, home: str = "", reopen: str = "", series: Series | None = None
) -> str:
    """The panel of ``state`` as one block of HTML; ``title`` is the run's name, ``about`` its model and method. Everything in it is escaped.

    ``clip`` is the clip line of the gradient norm, ``home`` the class by which a live panel finds its place, ``reopen`` what to type for the live
    panel of a run that goes on, and ``series`` the curves as an earlier picture of the same run left them.

    ::

        directory = RunDirectory("runs/chat-1")
        html = run_html(directory.state, directory.plan, *facts.title(directory))
    """
    head, series = facts.head(state), Series() if series is None else series
    series.take(state)
    blocks = [
        _header(head, title, about), _trouble(head), _as_of(head, reopen), _loss(state, series), _figures(state, plan, clip, series),
        _memory(state, plan), _samples(state), _notes(state),
    ]  # fmt: skip
    return parts.frame("".join(blocks), home)


def _header(head: dict[str, Any], title: str, about: str) -> str:
    colour = _TONES[head["tone"]]
    share, aside = 100 * head["share"], " · ".join(part for part in (about, head["device"]) if part)
    return (
        '<div style="display:flex;flex-wrap:wrap;align-items:baseline;gap:2px 10px">'
        f'<b style="font-size:15px">{dot(colour)}{escape(head["word"])}</b> '
        f'<span dir="auto">{escape(title)}</span> <span style="{SMALL}">{escape(aside)}</span></div>'
        f'<div style="{SMALL};{NUMBERS};margin-top:2px">{escape(head["times"])}</div>'
        f'<div style="height:4px;border-radius:2px;margin:8px 0 0 0;background:{LINE}">'
        f'<div style="height:4px;border-radius:2px;width:{share:.1f}%;background:{colour}"></div></div>'
    )


def _trouble(head: dict[str, Any]) -> str:
    """Why a run ended early, and what to do: the first thing to read below the title."""
    if not (head["over"] and (head["reason"] or head["fix"])):
        return ""
    fix = f'<div dir="auto" style="margin-top:2px"><b>What to do:</b> {escape(head["fix"])}</div>' if head["fix"] else ""
    return (
        f'<div style="border-left:3px solid {_TONES[head["tone"]]};padding:2px 0 2px 10px;margin:12px 0 0 0">'
        f'<div dir="auto" style="white-space:pre-wrap">{escape(head["reason"])}</div>{fix}</div>'
    )


def _as_of(head: dict[str, Any], reopen: str) -> str:
    """What a picture of a run that goes on must say of itself."""
    if head["over"] or not reopen:
        return ""
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    return f'<div style="{SMALL};margin:8px 0 0 0">Picture of {now}. How it is now: <span style="font-family:monospace">{escape(reopen)}</span></div>'


def _loss(state: RunState, series: Series) -> str:
    curve, figures = facts.curve(state), facts.figures(state)
    if not state.loss_steps:
        return section("Loss", faint("no step was made" if state.is_over else "the curve begins with the first step"), "")
    last, steps, losses = state.loss_steps[-1], series.column("step"), series.column("loss")
    end = max([last, *(int(step) for step, _ in curve["evals"])]) if state.is_over else parts.axis_end(last, state.steps)
    smoothed = parts.smooth(losses, parts.beta_of(curve["window"], series.stride))
    low, high = series.column("low"), series.column("high")
    raw_x, raw_y = (
        (steps, low) if series.stride == 1 else ([step for step in steps for _ in "ab"], [loss for pair in zip(low, high, strict=True) for loss in pair])
    )
    shown = [value for value in [*low, *high, *(loss for _, loss in curve["evals"])] if math.isfinite(value)]
    evals_x, evals_y = [step for step, _ in curve["evals"]], [loss for _, loss in curve["evals"]]
    chart = Chart(
        x_range=(0.0, float(max(end, 1))),
        y_ticks=parts.ticks(min(shown, default=0.0), max(shown, default=1.0)),
        curves=(
            Curve(xs=raw_x, ys=raw_y, colour=LOSS, width=1, opacity=0.35 if last < 1000 else 0.22),
            Curve(xs=steps, ys=smoothed, colour=LOSS, width=2),
            Curve(xs=evals_x, ys=evals_y, colour=HELD_OUT, width=1, opacity=0.6),
        ),
        dots=(Dots(xs=evals_x, ys=evals_y, colour=HELD_OUT), *_best_dot(curve["best"])),
        marks=[(step, BAD) for step, broken in zip(steps, series.column("broken"), strict=True) if broken][:200],
    )
    legend = [f"{swatch(LOSS)}{faint('training')} {figures['loss']}"]
    if curve["evals"]:
        legend.append(f"{swatch(HELD_OUT)}{faint('held-out')} {figures['held_out']}")
    if curve["best"]:
        legend.append(f"{swatch(GOOD)}{faint('best')} {curve['best'][1]:.3f} at step {curve['best'][0]:,.0f}")
    if facts.badge(series):
        legend.append(f"{dot(BAD)}<b>{escape(facts.badge(series))}</b>")
    alt = f"Loss over {last:,} steps: training {figures['loss']}, held-out {figures['held_out']}."
    return section("Loss", " &nbsp; ".join(legend), chart_html(chart, alt, 190, ("step 0", f"step {end:,}")))


def _best_dot(best: list[float] | None) -> tuple[Dots, ...]:
    """The best evaluation as a larger point with a green heart."""
    if best is None:
        return ()
    return (Dots(xs=[best[0]], ys=[best[1]], colour=HELD_OUT, size=12), Dots(xs=[best[0]], ys=[best[1]], colour=GOOD, size=7))


def _figures(state: RunState, plan: dict[str, Any], clip: float, series: Series) -> str:
    if not state.loss_steps:
        return ""
    figures = facts.figures(state, plan, clip, series)
    rate = (facts.figure(series.peak_rate, facts.scientific), "highest") if state.is_over else (figures["learning_rate"], figures["rate_note"])
    shown = [
        ("Tokens per second", figures["tokens_per_second"], figures["speed_note"]),
        ("Gradient norm", figures["grad_norm"], figures["norm_note"]),
        ("Learning rate", *rate),
        ("Energy", figures["energy"], figures["energy_note"]),
    ]
    if figures["exact_match"]:
        shown.append(("Exact match", figures["exact_match"], figures["exact_match_count"]))
    cells = "".join(
        f'<div style="flex:1;min-width:130px"><div style="{SMALL}">{name}</div>'
        f'<div style="font-size:17px;line-height:1.35;{NUMBERS}">{escape(value)}</div><div style="font-size:11px;{FAINT}">{escape(note)}</div></div>'
        for name, value, note in shown
    )
    return f'<div style="display:flex;flex-wrap:wrap;gap:10px 18px;margin:16px 0 0 0;padding:10px 0 0 0;border-top:1px solid {LINE}">{cells}</div>'


def _memory(state: RunState, plan: dict[str, Any]) -> str:
    view = memory(state, plan)
    if view["planned"] is None and view["peak"] is None:
        return ""
    now, peak = view["now"] or 0.0, view["peak"] or 0.0
    over = state.is_over
    planned = parts.stack_svg([(s["gib"], s["colour"], False) for s in view["segments"]], view["scale"], view["line"])
    measured = parts.stack_svg(
        [(peak, DIM, False)] if over else [(min(now, peak), DIM, False), (max(0.0, peak - now), "#a8a8a8", False)], view["scale"], view["line"]
    )
    body = _bar_row("planned", parts.image(planned, view["words"], 16), view["planned_text"])
    body += _bar_row("measured", parts.image(measured, view["measured_text"], 9), view["measured_text"], dot(WARN) if view["above"] else "")
    body += parts.legend(view["segments"])
    pool = view["pool"]
    if pool:
        whole = parts.stack_svg([(s["gib"], s["colour"], s["hatched"]) for s in pool["segments"]], pool["total"])
        body += f'<div style="margin:10px 0 0 0">{_bar_row("whole box", parts.image(whole, pool["words"], 9), pool["text"])}</div>'
        body += parts.legend(pool["segments"])
    light = view["light"]
    aside = f"{dot(_TONES[light['level']])}{light['word']} {faint(light['reason'])} &nbsp; " if light["level"] in _TONES else ""
    return section("Memory", f"{aside}{faint(view['usable_text'])}", body)


def _bar_row(label: str, bar: str, text: str, mark: str = "") -> str:
    """Name and figures above the bar: reads at any width without a style sheet."""
    return (
        f'<div style="display:flex;flex-wrap:wrap;align-items:center;gap:1px 12px;margin:0 0 4px 0;font-size:12px;{NUMBERS}">'
        f'<span style="width:62px;{FAINT}">{label}</span><div style="flex:1 1 260px;min-width:0">{bar}</div>'
        f'<span style="flex:0 0 190px">{mark}{escape(text)}</span></div>'
    )


def _samples(state: RunState) -> str:
    view = facts.samples(state)
    body = "".join(
        f'<div style="margin:10px 0 0 0"><div dir="auto" style="font-weight:600;white-space:pre-wrap">{escape(group["prompt"])}</div>'
        + "".join(
            '<div style="display:flex;flex-wrap:wrap;gap:0 12px;margin:3px 0 0 0">'
            f'<span style="flex:0 0 76px;{SMALL}">{escape(answer["step"])}</span>'
            f'<div dir="auto" style="flex:1 1 240px;min-width:0;white-space:pre-wrap;overflow-wrap:anywhere">{escape(answer["text"])}</div></div>'
            for answer in group["answers"]
        )
        + "</div>"
        for group in view["groups"]
    )
    return fold("Samples", f"{view['count']:,}", body) if view["groups"] else ""


def _notes(state: RunState) -> str:
    entries = facts.notes(state)
    rows = "".join(
        f'<div style="display:flex;gap:12px;margin:4px 0 0 0"><span style="{SMALL};{NUMBERS}">{escape(entry["time"])}</span>'
        f'<span dir="auto" style="white-space:pre-wrap">{dot(_TONES[entry["tone"]]) if entry["tone"] else ""}{escape(entry["text"])}</span></div>'
        for entry in entries
    )
    return fold("Messages", f"{state.messages_told:,}", f'<div style="margin:6px 0 0 0">{rows}</div>') if entries else ""
