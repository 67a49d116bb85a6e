"""Plans as people read them: a table in the terminal, static HTML in a notebook (inline styles only, everything escaped)."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final

from sparklab.planner.items import BESIDE_RECORDING
from sparklab.units import format_bytes, format_count, format_seconds, gib, is_na

if TYPE_CHECKING:
    from sparklab.planner.forecast import ModelTable, Plan, PlanTable

COLOURS: Final = {  # by component, the same in every bar
    "weights": "#4e79a7",
    "quantisation constants": "#a0cbe8",
    "adapters": "#59a14f",
    "gradients": "#8cd17d",
    "optimizer": "#b6992d",
    "checkpoints kept": "#f1ce63",
    "activations kept": "#f28e2b",
    "layer at work": "#e15759",
    "dequantisation workspace": "#499894",
    "key-value cache": "#86bcb6",
    "loss tile": "#b07aa1",
    "loss workspace": "#d4a6c8",
    BESIDE_RECORDING: "#d4a6c8",
    "all logits": "#b07aa1",
    "copy to be written": "#d37295",
    "allocator slack": "#9d7660",
    "runtime": "#79706e",
}
OTHER: Final = "#bab0ac"
USABLE: Final = "#e5484d"
CELL: Final = "text-align:left;padding:2px 14px 2px 0;border:0;background:none;color:inherit"


def size(size_bytes: float) -> str:
    """GiB to three figures, smaller sizes in their own unit."""
    return f"{gib(size_bytes):.3g} GiB" if size_bytes >= 1e9 and gib(size_bytes) < 1000 else format_bytes(size_bytes)


def span(values: tuple[float, float], unit: str = "") -> str:
    """A range: ``1,100 to 2,800``; N/A where unknown."""
    if any(is_na(value) for value in values):
        return "N/A"
    low, high = (f"{value:,.0f}" if value >= 100 else f"{value:.2g}" for value in values)
    return (low if low == high else f"{low} to {high}") + unit


def duration(hours: tuple[float, float]) -> str:
    """A range of durations."""
    if any(is_na(value) for value in hours):
        return "N/A"
    low, high = (format_seconds(value * 3600) for value in hours)
    return f"{low} to {high}"


def verdict(plan: Plan) -> str:
    """Whether it fits, and by how much."""
    if is_na(plan.usable_bytes):
        return "memory of the box unknown"
    spare = plan.usable_bytes - plan.peak_bytes
    return f"fits, {size(spare)} spare" if plan.fits else f"does not fit, {size(-spare)} too much"


def settings(plan: Plan) -> str:
    """The settings the solver chose."""
    return f"{plan.recipe.micro_batch_tokens:,} tokens, {plan.ledger.checkpointed}/{plan.anatomy.layers} layers recompute"


def columns(plan: Plan) -> tuple[str, ...]:
    """A plan as a row of the table."""
    energy = span(plan.watt_hours, " Wh")
    return (plan.recipe.method, size(plan.peak_bytes), verdict(plan), settings(plan), span(plan.tokens_per_second), duration(plan.hours), energy)


HEADS: Final = ("method", "peak", "verdict", "micro-batch", "tokens/s", "time", "energy")


def heading(plan: Plan) -> str:
    """What is planned, and on what."""
    anatomy = plan.anatomy
    return f"{anatomy.source}: {format_count(anatomy.parameters)} parameters, on {plan.box!r}; {format_count(plan.tokens)} tokens"


def _text_table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows as lines, every column as wide as its widest cell."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def table_text(table: PlanTable) -> str:
    """The ranked table for a terminal."""
    lines = [heading(table.best()), *_text_table([HEADS, *(columns(plan) for plan in table.plans)])]
    lines += [f"{plan.recipe.method} would fit with: {', '.join(str(fix) for fix in plan.fixes)}" for plan in table.plans if plan.fixes]
    return "\n".join([*lines, *(f"Note: {note}" for note in all_notes(table.plans))])


def all_notes(plans: Iterable[Plan]) -> list[str]:
    """What any of the plans notes, once."""
    return list(dict.fromkeys(note for plan in plans for note in plan.notes))


def _model_rows(table: ModelTable) -> list[tuple[str, ...]]:
    """The best plan of each model as a row."""
    best = [one.best() for one in table.tables]
    return [(plan.anatomy.source, format_count(plan.anatomy.parameters), *columns(plan)) for plan in best]


def _models_heading(table: ModelTable) -> str:
    plan = table.tables[0].best()
    largest = next((one.best().anatomy.source for one in table.tables if one.best().fits), "none")
    return f"The best plan of each model, on {plan.box!r}; {format_count(plan.tokens)} tokens; the largest that fits: {largest}"


def models_text(table: ModelTable) -> str:
    """One row a model for a terminal."""
    lines = [_models_heading(table), *_text_table([("model", "parameters", *HEADS), *_model_rows(table)])]
    return "\n".join([*lines, *(f"Note: {note}" for note in all_notes(one.best() for one in table.tables))])


def models_html(table: ModelTable) -> str:
    """One row a model for a notebook."""
    rows = _html_table(("model", "parameters", *HEADS), _model_rows(table))
    return f"<div><div>{html.escape(_models_heading(table))}</div>{rows}{_notes(all_notes(one.best() for one in table.tables))}</div>"


def plan_text(plan: Plan) -> str:
    """One plan for a terminal: verdict, speed, the peak phase line by line, the other phases."""
    lines = [heading(plan), f"{plan.recipe.method}: {size(plan.peak_bytes)}, {verdict(plan)}; {settings(plan)}"]
    lines.append(f"{span(plan.tokens_per_second)} tokens/s, {duration(plan.hours)}, {span(plan.watt_hours, ' Wh')}")
    lines.append(f"Peak while: {plan.peak_phase} ({plan.peak_moment})")
    widest = max(len(line.name) for line in plan.peak_lines)
    ordered = sorted(plan.peak_lines, key=lambda line: -line.bytes)
    lines += [f"  {line.name:<{widest}}  {size(line.bytes):>10}  {line.formula}" for line in ordered]
    lines.append("Phases: " + ", ".join(f"{phase} {size(peak)}" for phase, peak in plan.phases.items()))
    if plan.fixes:
        lines.append(f"Any one of these fits: {', '.join(str(fix) for fix in plan.fixes)}")
    return "\n".join([*lines, *(f"Note: {note}" for note in plan.notes)])


def plan_html(plan: Plan) -> str:
    """One plan for a notebook: stacked bar against the usable line, then the lines with their formulas."""
    ordered = sorted(plan.peak_lines, key=lambda line: -line.bytes)
    rows = [(_swatch(colour(line.name)), line.name, size(line.bytes), line.formula) for line in ordered]
    text = f"{size(plan.peak_bytes)} at the peak ({plan.peak_phase}: {plan.peak_moment}), {verdict(plan)}; {settings(plan)}"
    speed = f"{span(plan.tokens_per_second)} tokens/s, {duration(plan.hours)}, {span(plan.watt_hours, ' Wh')}"
    table = _html_table(("", "line", "bytes", "how"), rows, raw_first=True)
    fixes = f"<div>Any one of these fits: {html.escape(', '.join(str(fix) for fix in plan.fixes))}</div>" if plan.fixes else ""
    body = f"<div><b>{html.escape(plan.recipe.method)}</b>: {html.escape(text)}</div><div>{html.escape(speed)}</div>{bar(plan, scale([plan]))}{table}{fixes}"
    return f"<div><div>{html.escape(heading(plan))}</div>{body}{_notes(plan.notes)}</div>"


def table_html(table: PlanTable) -> str:
    """The ranked table for a notebook, and every plan's bar on one scale."""
    rows = [columns(plan) for plan in table.plans]
    fixes = "".join(f"<div>{html.escape(plan.recipe.method)} would fit with: {html.escape(', '.join(str(fix) for fix in plan.fixes))}</div>"
                    for plan in table.plans if plan.fixes)  # fmt: skip
    whole = scale(table.plans)
    bars = "".join(f"<div>{html.escape(plan.recipe.method)}</div>{bar(plan, whole)}" for plan in table.plans)
    shown = dict.fromkeys((name, shade) for plan in table.plans for name, _, shade in segments(plan))
    keys = "".join(f'<span style="white-space:nowrap;margin-right:14px">{_swatch(shade)} {html.escape(name)}</span> ' for name, shade in shown)
    usable = table.best().usable_bytes
    line = "" if is_na(usable) else f'<span style="white-space:nowrap">{_swatch(USABLE)} usable {size(usable)}</span>'
    legend = f'<div style="font-size:12px;margin:2px 0 8px 0">{keys}{line}</div>'
    return f"<div><div>{html.escape(heading(table.best()))}</div>{_html_table(HEADS, rows)}{bars}{legend}{fixes}{_notes(all_notes(table.plans))}</div>"


def colour(name: str) -> str:
    """The colour of a component, the same in every bar."""
    return COLOURS.get(name, OTHER)


def segments(plan: Plan) -> list[tuple[str, float, str]]:
    """(component, bytes, colour) of the peak, in the order that every bar keeps: what stays first, what comes and goes last."""
    order = {name: place for place, name in enumerate(COLOURS)}
    return [(line.name, line.bytes, colour(line.name)) for line in sorted(plan.peak_lines, key=lambda line: order.get(line.name, len(order)))]


def scale(plans: Iterable[Plan]) -> float:
    """Bytes that the full width of a bar stands for: room for every peak and the usable memory, but no more than twice the latter."""
    plans = list(plans)
    peak = max((plan.peak_bytes for plan in plans), default=1.0)
    usable = max((plan.usable_bytes for plan in plans if not is_na(plan.usable_bytes)), default=0.0)
    return 1.02 * (min(max(peak, usable), 2 * usable) if usable else peak)


def bar_words(plan: Plan) -> str:
    """What a bar shows, for those who cannot see it."""
    parts = ", ".join(f"{name} {size(amount)}" for name, amount, _ in segments(plan))
    usable = "" if is_na(plan.usable_bytes) else f" of {size(plan.usable_bytes)} usable"
    return f"{plan.recipe.method}: {size(plan.peak_bytes)}{usable}; {parts}"


def bar(plan: Plan, whole_bytes: float) -> str:
    """A stacked bar by component with a line at the usable memory: shapes in an image, which notebooks keep where they strip styles and SVG."""
    left, shapes = 0.0, ['<rect width="1000" height="10" fill="#808080" fill-opacity=".16"/>']
    for _, amount, shade in segments(plan):
        width = 1000 * amount / whole_bytes
        shapes.append(f'<rect x="{left:.2f}" width="{width:.2f}" height="10" fill="{shade}"/>')
        left += width
    if left > 1000:  # cut off: it goes on far beyond
        shapes.append('<path d="M980 0L986 5L980 10M989 0L995 5L989 10" fill="none" stroke="#fff" stroke-width="2" vector-effect="non-scaling-stroke"/>')
    if not is_na(plan.usable_bytes):
        place = 1000 * plan.usable_bytes / whole_bytes
        strokes = (f'<path d="M{place:.2f} 0V10" stroke="{shade}" stroke-width="{width}" vector-effect="non-scaling-stroke"/>'
                   for shade, width in (("#fff", 5), (USABLE, 3)))  # fmt: skip
        shapes.extend(strokes)
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1000 10" preserveAspectRatio="none">{"".join(shapes)}</svg>'
    data = base64.b64encode(svg.encode()).decode()
    words = html.escape(bar_words(plan), quote=True)
    return (
        f'<img alt="{words}" title="{words}" style="display:block;width:100%;max-width:60em;height:18px;margin:3px 0 6px 0" height="18" '
        f'src="data:image/svg+xml;base64,{data}">'
    )


def _swatch(shade: str) -> str:
    return f'<span style="display:inline-block;width:10px;height:10px;background:{shade}"></span>'


def table_block(title: str, heads: tuple[str, ...], rows: Sequence[tuple[str, ...]], lines: Sequence[str]) -> str:
    """A title, a table and lines of text below it, all escaped."""
    below = "".join(f'<div style="max-width:60em">{html.escape(line)}</div>' for line in lines)
    return f"<div><div>{html.escape(title)}</div>{_html_table(heads, rows)}{below}</div>"


def _html_table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]], raw_first: bool = False) -> str:
    """A plain table that scrolls where it is too wide; every cell is escaped but, where told so, our own first one."""
    head = "".join(f'<th style="{CELL}">{html.escape(name)}</th>' for name in heads)
    body = ""
    for row in rows:
        cells = []
        for index, cell in enumerate(row):
            raw = raw_first and index == 0
            wrap = "min-width:16em" if len(cell) > 40 and not raw else "white-space:nowrap"
            cells.append(f'<td style="{CELL};{wrap}">{cell if raw else html.escape(cell)}</td>')
        body += f'<tr style="background:none">{"".join(cells)}</tr>'
    table = f'<table style="border-collapse:collapse;border:0;margin:4px 0"><tr style="background:none">{head}</tr>{body}</table>'
    return f'<div style="overflow-x:auto">{table}</div>'


def _notes(notes: Iterable[str]) -> str:
    return "".join(f'<div style="max-width:60em;opacity:0.8">Note: {html.escape(note)}</div>' for note in notes)
