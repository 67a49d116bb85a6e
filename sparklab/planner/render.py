"""Plans as people read them: a table in the terminal, static HTML in a notebook (inline styles only, everything escaped)."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final

from sparklab.units import format_bytes, format_count, format_seconds, gib, is_na

if TYPE_CHECKING:
    from sparklab.planner.forecast import Line, ModelTable, Plan, PlanTable

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
    "all logits": "#b07aa1",
    "copy to be written": "#d37295",
    "allocator slack": "#9d7660",
    "runtime": "#79706e",
}
OTHER: Final = "#bab0ac"
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
    rows = [(_swatch(line.name), line.name, size(line.bytes), line.formula) for line in ordered]
    text = f"{size(plan.peak_bytes)} at the peak ({plan.peak_phase}: {plan.peak_moment}), {verdict(plan)}; {settings(plan)}"
    speed = f"{span(plan.tokens_per_second)} tokens/s, {duration(plan.hours)}, {span(plan.watt_hours, ' Wh')}"
    table = _html_table(("", "line", "bytes", "how"), rows, raw_first=True)
    fixes = f"<div>Any one of these fits: {html.escape(', '.join(str(fix) for fix in plan.fixes))}</div>" if plan.fixes else ""
    body = f"<div><b>{html.escape(plan.recipe.method)}</b>: {html.escape(text)}</div><div>{html.escape(speed)}</div>{_bar(plan, ordered)}{table}{fixes}"
    return f"<div><div>{html.escape(heading(plan))}</div>{body}{_notes(plan.notes)}</div>"


def table_html(table: PlanTable) -> str:
    """The ranked table for a notebook."""
    rows = [columns(plan) for plan in table.plans]
    fixes = "".join(f"<div>{html.escape(plan.recipe.method)} would fit with: {html.escape(', '.join(str(fix) for fix in plan.fixes))}</div>"
                    for plan in table.plans if plan.fixes)  # fmt: skip
    bars = "".join(f"<div>{html.escape(plan.recipe.method)}</div>{_bar(plan, sorted(plan.peak_lines, key=lambda line: -line.bytes))}" for plan in table.plans)
    return f"<div><div>{html.escape(heading(table.best()))}</div>{_html_table(HEADS, rows)}{bars}{fixes}{_notes(all_notes(table.plans))}</div>"


def _bar(plan: Plan, lines: list[Line]) -> str:
    """A stacked bar by component; the mark is the usable memory."""
    whole = max(plan.peak_bytes, 0.0 if is_na(plan.usable_bytes) else plan.usable_bytes) * 1.02 or 1.0
    pieces = "".join(
        f'<div title="{html.escape(f"{line.name}: {size(line.bytes)}", quote=True)}" '
        f'style="width:{100 * line.bytes / whole:.3f}%;height:100%;background:{COLOURS.get(line.name, OTHER)}"></div>'
        for line in lines
    )
    mark = "" if is_na(plan.usable_bytes) else (
        f'<div title="usable: {html.escape(size(plan.usable_bytes), quote=True)}" style="position:absolute;left:{100 * plan.usable_bytes / whole:.3f}%;'
        f'top:-3px;bottom:-3px;border-left:2px solid currentColor"></div>'
    )  # fmt: skip
    return f'<div style="position:relative;display:flex;height:16px;max-width:48em;margin:6px 0;background:rgba(128,128,128,0.18)">{pieces}{mark}</div>'


def _swatch(name: str) -> str:
    return f'<span style="display:inline-block;width:10px;height:10px;background:{COLOURS.get(name, OTHER)}"></span>'


def _html_table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]], raw_first: bool = False) -> str:
    """A plain table; every cell is escaped but, where told so, our own first one."""
    head = "".join(f'<th style="{CELL}">{html.escape(name)}</th>' for name in heads)
    body = ""
    for row in rows:
        cells = [cell if raw_first and index == 0 else html.escape(cell) for index, cell in enumerate(row)]
        body += '<tr style="background:none">' + "".join(f'<td style="{CELL}">{cell}</td>' for cell in cells) + "</tr>"
    return f'<table style="border-collapse:collapse;border:0;margin:4px 0"><tr style="background:none">{head}</tr>{body}</table>'


def _notes(notes: Iterable[str]) -> str:
    return "".join(f'<div style="max-width:60em;opacity:0.8">Note: {html.escape(note)}</div>' for note in notes)
