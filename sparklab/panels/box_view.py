"""What the box panel shows, computed once here for the live panel, its static twin and the terminal: words, figures and one bar."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from sparklab.box import Box
from sparklab.box.doctor import Finding
from sparklab.box.pool import Pool
from sparklab.panels import facts, parts
from sparklab.panels.memory_facts import LIGHTS
from sparklab.panels.parts import BAD, DIM, FAINT, GOOD, LINE, LOSS, SEGMENTS, WARN, clean, escape, frame, image, one_line, stack_svg
from sparklab.units import format_bytes, gib, is_na

TRAIL: Final = 120
"""Looks that the little curve remembers."""
_REST: Final = SEGMENTS[-1]
TONES: Final = {"good": GOOD, "warn": WARN, "bad": BAD, "unknown": DIM}
_WORDS: Final = {**{level: word.capitalize() for level, word in LIGHTS.items()}, "unknown": "Unknown"}


def view(box: Box, pool: Pool, trail: Sequence[float] = (), findings: Sequence[Finding] = ()) -> dict[str, Any]:
    """Everything the panel shows, ready for JSON. ``trail``: available GiB of the last looks; ``findings``: what is to be mended."""
    level, reason = pool.pressure
    memory = pool.memory
    known = bool(pool.parts)
    segments = _segments(pool)
    total = gib(memory.total_bytes)
    line = total - gib(pool.reserve_bytes) if known and not is_na(pool.reserve_bytes) else None
    return {
        "name": one_line(box.chip, 80),
        "about": f"{format_bytes(memory.total_bytes)}{' shared by CPU and GPU' if box.unified else ''}" if known else "memory unknown",
        "level": level,
        "word": _WORDS[level],
        "reason": clean(reason, 300),
        "segments": segments,
        "scale": total if known else 1.0,
        "line": line,
        "line_words": f"{format_bytes(pool.reserve_bytes)} kept free for the system" if line is not None else "",
        "words": _words(segments, level, reason),
        "figures": _figures(pool),
        "findings": [{"level": one.level, "fact": clean(one.fact, 600), "fix": clean(one.fix, 400)} for one in findings],
        "trail": [None if is_na(value) else round(value, 3) for value in trail],
    }


def _segments(pool: Pool) -> list[dict[str, Any]]:
    """The bar's parts; they sum to the pool. What can be had back is hatched, what is free has no colour."""
    colours = iter(SEGMENTS[1:-1])
    found = []
    for index, (name, size) in enumerate(pool.parts):
        last = len(pool.parts) - index
        is_run = index < len(pool.holders) and name.startswith("run ")
        colour = "" if last == 1 else _REST if last <= 3 else LOSS if is_run else next(colours, _REST)
        found.append({"name": one_line(name, 80), "gib": gib(size), "text": facts.size(gib(size)), "colour": colour, "hatched": last == 2})
    return found


def _words(segments: Sequence[dict[str, Any]], level: str, reason: str) -> str:
    parts_of_it = ", ".join(f"{segment['name']} {segment['text']}" for segment in segments)
    return f"{_WORDS[level]}: {reason}. {parts_of_it}." if parts_of_it else f"{_WORDS[level]}: {reason}."


def _figures(pool: Pool) -> list[dict[str, str]]:
    """The single numbers, each with its name; what the system does not tell is left out."""
    memory = pool.memory
    rows = [
        ("Available", memory.available_bytes, facts.size(gib(memory.available_bytes))),
        ("Swapped out", memory.swap_used_bytes, facts.size(gib(memory.swap_used_bytes)) if memory.swap_used_bytes else "nothing"),
        ("Waiting for memory", memory.pressure_percent, f"{memory.pressure_percent:.1f} % of the time"),
    ]
    return [{"name": name, "text": text} for name, value, text in rows if not is_na(value)]


def legend_html(segments: Sequence[dict[str, Any]]) -> str:
    """The parts by name and size, each beside its colour."""
    entries = []
    for segment in segments:
        if segment["hatched"]:
            style = f"background:repeating-linear-gradient(115deg,{_REST} 0 1.5px,transparent 1.5px 4px)"
        else:
            style = f"background:{segment['colour']}" if segment["colour"] else f"box-shadow:inset 0 0 0 1.5px {LINE}"
        square = f'<span style="display:inline-block;width:10px;height:10px;border-radius:2px;margin-right:6px;{style}"></span>'
        name = f'<span dir="auto">{escape(segment["name"])}</span> <span style="{FAINT}">{segment["text"]}</span>'
        entries.append(f'<span style="white-space:nowrap;margin-right:14px">{square}{name}</span> ')
    return f'<div style="font-size:12px;margin:8px 0 0 0">{"".join(entries)}</div>'


def twin_html(seen: dict[str, Any], home: str) -> str:
    """The panel without script and style sheet, as it stood at its last look."""
    small = f"font-size:12px;{FAINT}"
    bar = ""
    if seen["segments"]:
        shapes = [(part["gib"], part["colour"] or "#80808022", part["hatched"]) for part in seen["segments"]]
        bar = f'<div style="margin:12px 0 0 0">{image(stack_svg(shapes, seen["scale"], seen["line"]), seen["words"], 18)}</div>{legend_html(seen["segments"])}'
    key = f'<span style="margin-right:14px;white-space:nowrap">{parts.swatch(BAD)}{escape(seen["line_words"])}</span> ' if seen["line_words"] else ""
    findings = "".join(
        f'<div style="border-left:3px solid {BAD if one["level"] == "fault" else WARN};padding:2px 0 2px 10px;margin:12px 0 0 0">{escape(one["fact"])}'
        + (f'<div style="{small};white-space:pre-wrap;overflow-wrap:anywhere">{escape(one["fix"])}</div>' if one["fix"] else "")
        + "</div>"
        for one in seen["findings"]
    )
    figures = " · ".join(f"{escape(figure['name'].lower())} {escape(figure['text'])}" for figure in seen["figures"])
    return frame(
        f'<div><b style="font-size:15px"><span style="color:{TONES[seen["level"]]}">●</span> {escape(seen["word"])}</b> '
        f'{escape(seen["name"])} <span style="{small}">{escape(seen["about"])}</span></div><div style="margin:2px 0 0 0">{escape(seen["reason"])}</div>{bar}'
        f'<div style="{small};margin:6px 0 0 0">{key}{figures}</div>{findings}',
        home,
    )


def text(seen: dict[str, Any], columns: int = 80) -> str:
    """The panel for a terminal: the verdict, the parts as bars, the figures."""
    lines = [f"{seen['word']}: {seen['reason']}", f"{seen['name']}, {seen['about']}"]
    names = max((len(part["name"]) for part in seen["segments"]), default=0)
    room = max(10, columns - names - 14)
    for part in seen["segments"]:
        filled = round(room * part["gib"] / seen["scale"])
        mark = "·" if not part["colour"] else "/" if part["hatched"] else "█"
        lines.append(f"  {part['name']:<{names}} {part['text']:>9}  {mark * filled}".rstrip())
    lines += [f"  {figure['name'].lower()}: {figure['text']}" for figure in seen["figures"][1:]]
    return "\n".join(lines)
