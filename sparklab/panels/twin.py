"""The run panel's static twin: HTML that needs no kernel, no script and no style sheet.

It is what stays in a notebook when the run is over, and what an untrusted notebook, an HTML export or a mail still shows.
"""

from __future__ import annotations

import math
from typing import Any

from sparklab.panels import facts, parts
from sparklab.panels.parts import BAD, DIM, GOOD, HELD_OUT, LINE, LOSS, WARN, Chart, Curve, Dots, chart_html, escape, image, swatch
from sparklab.run.state import RunState

_TONES = {"run": LOSS, "good": GOOD, "warn": WARN, "bad": BAD}
_SMALL = f"font-size:12px;color:{DIM}"
_NUMBERS = "font-variant-numeric:tabular-nums"


def run_html(state: RunState, plan: dict[str, Any], title: str = "", about: str = "") -> str:
    """The panel of ``state`` as one block of HTML; ``title`` is the run's name, ``about`` its model and method. Everything in it is escaped.

    ::

        directory = RunDirectory("runs/chat-1")
        html = run_html(directory.state, directory.plan, *facts.title(directory))
    """
    head = facts.head(state)
    blocks = [_header(head, title, about), _trouble(head), _loss(state), _figures(state), _memory(state, plan), _samples(state), _notes(state)]
    return (
        f'<div class="sparklab-twin" style="max-width:1080px;border:1px solid {LINE};border-radius:8px;padding:14px 16px;font-size:13px;line-height:1.45">'
        f"{''.join(blocks)}</div>"
    )


def _header(head: dict[str, Any], title: str, about: str) -> str:
    colour = _TONES[head["tone"]]
    share, aside = 100 * head["share"], " · ".join(part for part in (about, head["device"]) if part)
    return (
        '<div style="display:flex;flex-wrap:wrap;align-items:baseline;gap:2px 10px">'
        f'<b style="font-size:15px"><span style="color:{colour}">●</span> {escape(head["word"])}</b> '
        f'<span dir="auto">{escape(title)}</span> <span style="{_SMALL}">{escape(aside)}</span></div>'
        f'<div style="{_SMALL};{_NUMBERS};margin-top:2px">{escape(head["times"])}</div>'
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


def _section(name: str, aside: str, body: str) -> str:
    return (
        '<div style="margin:14px 0 0 0"><div style="display:flex;flex-wrap:wrap;align-items:baseline;gap:2px 14px;margin:0 0 8px 0">'
        f'<b>{name}</b> <span style="{_SMALL};{_NUMBERS}">{aside}</span></div>{body}</div>'
    )


def _loss(state: RunState) -> str:
    curve, figures = facts.curve(state), facts.figures(state)
    if not state.loss_steps:
        return _section("Loss", "no step was made", "")
    last = state.loss_steps[-1]
    end = max([last, *(int(step) for step, _ in curve["evals"])]) if state.is_over else parts.axis_end(last, state.steps)
    smoothed = parts.smooth(state.losses, curve["beta"])
    shown = [value for value in [*state.losses, *(loss for _, loss in curve["evals"])] if math.isfinite(value)]
    evals_x, evals_y = [step for step, _ in curve["evals"]], [loss for _, loss in curve["evals"]]
    chart = Chart(
        x_range=(0.0, float(max(end, 1))),
        y_ticks=parts.ticks(min(shown, default=0.0), max(shown, default=1.0)),
        curves=(
            Curve(xs=state.loss_steps, ys=state.losses, colour=LOSS, width=1, opacity=0.35 if last < 1000 else 0.22),
            Curve(xs=state.loss_steps, ys=smoothed, colour=LOSS, width=2),
            Curve(xs=evals_x, ys=evals_y, colour=HELD_OUT, width=1, opacity=0.6),
        ),
        dots=(Dots(xs=evals_x, ys=evals_y, colour=HELD_OUT), *_best_dot(curve["best"])),
        marks=[(step, BAD) for step, loss in zip(state.loss_steps, state.losses, strict=True) if math.isnan(loss)][:200],
    )
    legend = [f"{swatch(LOSS)}training {figures['loss']}"]
    if curve["evals"]:
        legend.append(f"{swatch(HELD_OUT)}held-out {figures['held_out']}")
    if curve["best"]:
        legend.append(f"best {curve['best'][1]:.3f} at step {curve['best'][0]:,.0f}")
    if facts.broken(state):
        legend.append(f'<b style="color:{BAD}">{escape(facts.broken(state))}</b>')
    alt = f"Loss over {last:,} steps: training {figures['loss']}, held-out {figures['held_out']}."
    return _section("Loss", " &nbsp; ".join(legend), chart_html(chart, alt, 190, ("step 0", f"step {end:,}")))


def _best_dot(best: list[float] | None) -> tuple[Dots, ...]:
    """The best evaluation as a larger point with a green heart."""
    if best is None:
        return ()
    return (Dots(xs=[best[0]], ys=[best[1]], colour=HELD_OUT, size=12), Dots(xs=[best[0]], ys=[best[1]], colour=GOOD, size=7))


def _figures(state: RunState) -> str:
    if not state.loss_steps:
        return ""
    figures = facts.figures(state)
    shown = [("Tokens per second", figures["tokens_per_second"], "non-pad"), ("Learning rate", facts.peak_rate(state), "highest"),
             ("Gradient norm", figures["grad_norm"], "before clipping")]  # fmt: skip
    if figures["exact_match"]:
        shown.append(("Exact match", figures["exact_match"], facts.exact_match_count(state)))
    cells = "".join(
        f'<div style="flex:1;min-width:130px"><div style="{_SMALL}">{name}</div>'
        f'<div style="font-size:17px;line-height:1.35;{_NUMBERS}">{escape(value)}</div><div style="font-size:11px;color:{DIM}">{escape(note)}</div></div>'
        for name, value, note in shown
    )
    return f'<div style="display:flex;flex-wrap:wrap;gap:10px 18px;margin:16px 0 0 0;padding:10px 0 0 0;border-top:1px solid {LINE}">{cells}</div>'


def _memory(state: RunState, plan: dict[str, Any]) -> str:
    view = facts.memory(state, plan)
    if view["planned"] is None and view["peak"] is None:
        return ""
    measured = math.nan if view["peak"] is None else view["peak"]
    svg = parts.bar_svg([(s["gib"], s["colour"]) for s in view["segments"]], measured, view["scale"], view["line"])
    legend = "".join(
        f'<span style="white-space:nowrap">{swatch(s["colour"])}{escape(s["name"])} <span style="color:{DIM}">{facts.size(s["gib"])}</span></span> '
        for s in view["segments"]
    )
    for name, amount, colour in (("measured", view["peak"], DIM), ("usable", view["line"], BAD)):
        if amount is not None:
            legend += f' <span style="white-space:nowrap">{swatch(colour)}{name} <span style="color:{DIM}">{facts.size(amount)}</span></span>'
    body = f'{image(svg, facts.memory_words(view), 34)}<div style="display:flex;flex-wrap:wrap;gap:3px 16px;font-size:12px;margin:8px 0 0 0">{legend}</div>'
    return _section("Memory", facts.memory_figures({**view, "now": None} if state.is_over else view), body)


def _fold(name: str, count: int, body: str) -> str:
    return (
        f'<details style="margin:12px 0 0 0;padding:10px 0 0 0;border-top:1px solid {LINE}"><summary style="cursor:pointer"><b>{name}</b> '
        f'<span style="{_SMALL}">{count}</span></summary>{body}</details>'
    )


def _samples(state: RunState) -> str:
    entries = facts.samples(state)
    body = "".join(
        f'<div style="margin:10px 0 0 0"><div style="{_SMALL}">{escape(entry["step"])}</div>'
        f'<div dir="auto" style="color:{DIM};white-space:pre-wrap">{escape(entry["prompt"])}</div>'
        f'<div dir="auto" style="white-space:pre-wrap">{escape(entry["text"])}</div></div>'
        for entry in entries
    )
    return _fold("Samples", len(state.samples), body) if entries else ""


def _notes(state: RunState) -> str:
    entries = facts.notes(state)
    rows = "".join(
        f'<div style="display:flex;gap:12px;margin:4px 0 0 0"><span style="{_SMALL};{_NUMBERS}">{escape(entry["time"])}</span>'
        f'<span dir="auto" style="color:{_TONES.get(entry["tone"], "inherit")};white-space:pre-wrap">{escape(entry["text"])}</span></div>'
        for entry in entries
    )
    return _fold("Messages", len(state.messages), f'<div style="margin:6px 0 0 0">{rows}</div>') if entries else ""
