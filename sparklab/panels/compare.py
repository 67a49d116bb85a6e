"""Answers of the base and of the tuned model, side by side, with the words marked in which they differ."""

from __future__ import annotations

import difflib
import re
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, Final

from sparklab.panels.parts import BAD, DIM, FAINT, GOOD, LINE, LOSS, clean, escape

_COLUMNS = (("base", "Base", DIM, "del", BAD), ("tuned", "Tuned", LOSS, "ins", GOOD))
LEAST_ALIKE: Final = 0.25
"""Share of words two answers must have in common for marks to help: below it everything would be marked."""
MOST_WORDS: Final = 2000
"""Comparing takes the square of the words: longer answers are shown without marks."""
_WORD = re.compile(r"\w+|\s+|[^\w\s]")


def comparison_html(rows: Sequence[Mapping[str, Any]]) -> str:
    """``rows`` of ``{"prompt", "base", "tuned"}`` as static HTML: every answer reads in its own direction, nothing in it runs.

    The two answers stand beside each other where there is room and below each other where there is not.
    """
    if not rows:
        return f'<div class="sparklab-compare" style="{FAINT};font-size:13px">No prompts to compare.</div>'
    blocks = "".join(_row_html(row, first=index == 0) for index, row in enumerate(rows))
    return (
        f'<div class="sparklab-compare" style="max-width:1080px;border:1px solid {LINE};border-radius:8px;padding:4px 16px;font-size:13px;line-height:1.5">'
        f"{blocks}</div>"
    )


def differences(base: str, tuned: str) -> tuple[list[tuple[str, bool]], list[tuple[str, bool]]] | None:
    """Both texts in pieces, each with whether the other text lacks it; None where so little is alike that marks would not help.

    >>> differences("Sent on Friday.", "Sent on Monday.")
    ([('Sent on ', False), ('Friday', True), ('.', False)], [('Sent on ', False), ('Monday', True), ('.', False)])
    """
    left, right = _WORD.findall(base), _WORD.findall(tuned)
    if len(left) > MOST_WORDS or len(right) > MOST_WORDS:
        return None
    changes = difflib.SequenceMatcher(None, left, right, autojunk=False).get_opcodes()
    alike = sum(not word.isspace() for kind, start, end, *_ in changes if kind == "equal" for word in left[start:end])
    if 2 * alike < LEAST_ALIKE * sum(not word.isspace() for word in left + right):
        return None
    pieces: tuple[list[tuple[str, bool]], list[tuple[str, bool]]] = ([], [])
    for kind, start, end, other_start, other_end in changes:
        for side, words in zip(pieces, (left[start:end], right[other_start:other_end]), strict=True):
            if words:
                side.append(("".join(words), kind != "equal"))
    return pieces


def _row_html(row: Mapping[str, Any], *, first: bool) -> str:
    border = "" if first else f"border-top:1px solid {LINE};"
    texts = [clean(row.get(name) or "").strip() for name, *_ in _COLUMNS]
    pieces = differences(*texts) if all(texts) else None
    answers = "".join(
        f'<div style="flex:1;min-width:220px;border-left:3px solid {colour};padding:0 0 0 10px">'
        f'<div style="font-size:11px;{FAINT}">{label}</div>{_answer(pieces[index] if pieces else [(texts[index], False)], tag, tint)}</div>'
        for index, (_, label, colour, tag, tint) in enumerate(_COLUMNS)
    )
    same = f'<div style="font-size:11px;{FAINT};margin:4px 0 0 0">The same answer.</div>' if texts[0] == texts[1] and texts[0] else ""
    return (
        f'<div style="{border}padding:12px 0"><div dir="auto" style="font-weight:bold;white-space:pre-wrap">{escape(row.get("prompt", ""))}</div>'
        f'<div style="display:flex;flex-wrap:wrap;gap:10px 20px;margin:8px 0 0 0">{answers}</div>{same}</div>'
    )


def _answer(pieces: Sequence[tuple[str, bool]], tag: str, tint: str) -> str:
    """One answer; what the other lacks is underlined in its colour, which reads in light and dark and without colour too."""
    if not any(text.strip() for text, _ in pieces):
        return f'<div style="{FAINT}">(no answer)</div>'
    mark = f'<{tag} style="text-decoration:none;border-bottom:2px solid {tint}">'
    body = "".join(f"{mark}{escape(text)}</{tag}>" if other and text.strip() else escape(text) for text, other in pieces)
    return f'<div dir="auto" style="white-space:pre-wrap">{body}</div>'


def comparison_text(rows: Sequence[Mapping[str, Any]], columns: int | None = None) -> str:
    """The same for a terminal ``columns`` wide: prompt, base, tuned, one below the other."""
    width = max(40, columns or shutil.get_terminal_size((100, 24)).columns)
    blocks = []
    for row in rows:
        lines = textwrap.wrap(clean(row.get("prompt", "")), width) or ["(no prompt)"]
        for name, label, *_ in _COLUMNS:
            answer = row.get(name)
            lines += _indented(label.lower(), clean(answer) if answer is not None else "", width)
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) if blocks else "No prompts to compare."


def _indented(label: str, text: str, width: int) -> list[str]:
    wrapped = [piece for line in text.strip().splitlines() for piece in (textwrap.wrap(line, width - 8) or [""])] or ["(no answer)"]
    return [f"{label if index == 0 else '':<8}{piece}" for index, piece in enumerate(wrapped)]
