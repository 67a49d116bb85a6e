"""Answers of the base and of the tuned model, side by side."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from sparklab.panels.parts import DIM, LINE, LOSS, clean, escape

_COLUMNS = (("base", "Base", DIM), ("tuned", "Tuned", LOSS))


def comparison_html(rows: Sequence[Mapping[str, Any]]) -> str:
    """``rows`` of ``{"prompt", "base", "tuned"}`` as static HTML: every answer reads in its own direction, nothing in it runs.

    The two answers stand beside each other where there is room and below each other where there is not.
    """
    if not rows:
        return f'<div class="sparklab-compare" style="color:{DIM};font-size:13px">No prompts to compare.</div>'
    blocks = "".join(_row_html(row, first=index == 0) for index, row in enumerate(rows))
    return (
        f'<div class="sparklab-compare" style="max-width:1080px;border:1px solid {LINE};border-radius:8px;padding:4px 16px;font-size:13px;line-height:1.5">'
        f"{blocks}</div>"
    )


def _row_html(row: Mapping[str, Any], *, first: bool) -> str:
    border = "" if first else f"border-top:1px solid {LINE};"
    answers = "".join(
        f'<div style="flex:1;min-width:220px;border-left:3px solid {colour};padding:0 0 0 10px">'
        f'<div style="font-size:11px;color:{DIM}">{label}</div>{_answer(row.get(name))}</div>'
        for name, label, colour in _COLUMNS
    )
    return (
        f'<div style="{border}padding:12px 0"><div dir="auto" style="font-weight:bold;white-space:pre-wrap">{escape(row.get("prompt", ""))}</div>'
        f'<div style="display:flex;flex-wrap:wrap;gap:10px 20px;margin:8px 0 0 0">{answers}</div></div>'
    )


def _answer(text: object) -> str:
    if text is None or not clean(text).strip():
        return f'<div style="color:{DIM}">(no answer)</div>'
    return f'<div dir="auto" style="white-space:pre-wrap">{escape(text)}</div>'


def comparison_text(rows: Sequence[Mapping[str, Any]], columns: int | None = None) -> str:
    """The same for a terminal ``columns`` wide: prompt, base, tuned, one below the other."""
    width = max(40, columns or shutil.get_terminal_size((100, 24)).columns)
    blocks = []
    for row in rows:
        lines = textwrap.wrap(clean(row.get("prompt", "")), width) or ["(no prompt)"]
        for name, label, _ in _COLUMNS:
            answer = row.get(name)
            lines += _indented(label.lower(), clean(answer) if answer is not None else "", width)
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) if blocks else "No prompts to compare."


def _indented(label: str, text: str, width: int) -> list[str]:
    wrapped = [piece for line in text.strip().splitlines() for piece in (textwrap.wrap(line, width - 8) or [""])] or ["(no answer)"]
    return [f"{label if index == 0 else '':<8}{piece}" for index, piece in enumerate(wrapped)]
