"""What the data panel shows, computed once here for the live panel, its static twin and the terminal: words, figures, and tokens in runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from sparklab.panels.parts import BAD, FAINT, GOOD, LINE, LOSS, NUMBERS, SMALL, WARN, dot, escape, fold, frame, image, section
from sparklab.text import clean, one_line
from sparklab.units import format_count

TONES: Final = {"ready": "good", "ready with warnings": "warn", "refuse": "bad"}
_COLOURS: Final = {"good": GOOD, "warn": WARN, "bad": BAD}
_GLANCE: Final = 800
"""Characters of a record that a terminal shows unasked."""
_WRAPPED: Final = "white-space:pre-wrap;overflow-wrap:anywhere"
_HEADS: Final = {"ready": "Ready to train", "ready with warnings": "Ready, with warnings", "refuse": "Training would refuse this"}
FILTERS: Final = {
    "all": "all records",
    "odd": "anything odd",
    "unusable": "cannot be used",
    "refused": "the template refuses",
    "nothing_learned": "nothing learned",
    "no_end": "no end-of-turn",
    "double_bos": "BOS twice",
    "empty_turn": "an empty turn",
    "spells": "spell special tokens",
    "long": "longer than max_length",
    "repeated": "say the same",
    "held_out": "held out",
}

Numbers = Mapping[str, Any]


def view(numbers: Numbers, counts: Mapping[str, int], model: str) -> dict[str, Any]:
    """Everything but the records themselves, ready for JSON. ``counts`` are the records behind each filter; ``model`` says whose tokens these are."""
    lengths = numbers["lengths"]
    return {
        "tone": TONES[numbers["verdict"]],
        "word": _HEADS[numbers["verdict"]],
        "name": one_line(" + ".join(source["name"].rsplit("/", 1)[-1] for source in numbers["sources"]), 100),
        "about": one_line(" · ".join(dict.fromkeys([*(_source_words(source) for source in numbers["sources"]), model])), 300),
        "refusals": [{"fact": _readable(one["fact"], 3000), "fix": _readable(one["fix"], 600)} for one in numbers["refusals"]],
        "findings": [{"words": _readable(one["words"], 400), "filter": one["filter"]} for one in numbers["findings"]],
        "figures": [{"name": name, "value": value, "note": note} for name, value, note in _figures(numbers)],
        "bars": _bars(lengths, numbers.get("max_length")),
        "bars_words": _length_words(lengths),
        "bars_to": f"{_count(lengths['max'])} tokens",
        "scripts": _script_words(numbers),
        "filters": [
            {"name": name, "words": f"{words} ({counts[name]:,})", "count": counts[name]}
            for name, words in FILTERS.items()
            if counts.get(name) or (name == "all" and counts)
        ],
    }


def _readable(text: str, limit: int) -> str:
    return clean(text, limit)


def _source_words(source: Mapping[str, Any]) -> str:
    kinds = {"jsonl": "JSONL", "json": "JSON", "csv": "CSV", "tsv": "TSV", "parquet": "Parquet", "arrow": "Arrow", "text": "text", "hub": "hub"}
    found = source["format"] or "no known format"
    return f"{kinds.get(source['kind'], source['kind'])}, {found}" + (" (as you say)" if source["named"] else "")


def _figures(numbers: Numbers) -> list[tuple[str, str, str]]:
    report, faults = numbers["report"], numbers["faults"]
    unusable = f"{faults['records']:,} more cannot be used" if faults["records"] else "none that cannot be used"
    found = [("Records", f"{report['records']:,}", unusable)]
    if "tokens" not in report:
        return found
    found += [
        ("Learned from", f"{report['documents']:,}", f"{report['held_out']:,} held out" if report["held_out"] else "nothing held out"),
        ("Tokens", format_count(report["tokens"]), f"{report['supervised_share']:.1%} of them learned"),
        ("Length", f"{_count(numbers['lengths']['p50'])}", f"median; 95 % up to {_count(numbers['lengths']['p95'])}, longest {_count(report['longest'])}"),
        ("Rows", f"{report['rows']:,}", f"of {report['row_tokens']:,} tokens, {report['fill']:.1%} full"),
    ]
    return found


def _count(value: int | None) -> str:
    return "\u2013" if value is None else f"{value:,}"


def _bars(lengths: Numbers, limit: int | None) -> list[dict[str, Any]]:
    """One bar of the histogram each: height from 0 to 1, its words, and whether all in it are beyond max_length."""
    most = max(lengths["counts"], default=0)
    return [
        {
            "height": count / most if most else 0.0,
            "words": f"{first:,} to {last - 1:,} tokens: {count:,}",
            "from": f"{first:,}",
            "long": bool(limit) and first > (limit or 0),
        }
        for first, last, count in zip(lengths["edges"], lengths["edges"][1:], lengths["counts"], strict=False)
    ]


def _length_words(lengths: Numbers) -> str:
    if not lengths["counts"]:
        return "no lengths are known"
    return f"Lengths of documents: median {lengths['p50']:,} tokens, 95th percentile {lengths['p95']:,}, longest {lengths['max']:,}"


def _script_words(numbers: Numbers) -> str:
    scripts = sorted(numbers["scripts"].items(), key=lambda item: -item[1])
    return ", ".join(f"{name} ({count:,})" for name, count in scripts) or "no letters"


def row_head(row: Mapping[str, Any]) -> tuple[str, str, list[str]]:
    """Where a record stands; what it is in numbers; what is odd about it."""
    if "fault" in row:
        return one_line(row["where"], 200), "", [one_line(row["fault"], 300)]
    share = f"{row['learned']:,} of {row['tokens']:,} tokens learned"
    several = f", {row['documents']} documents" if row["documents"] > 1 else ""
    return one_line(row["where"], 200), f"{row['side']}, {share}{several}", row["flags"]


# ---------------------------------------------------------------- the twin


def twin_html(seen: Mapping[str, Any], shown: Sequence[tuple[str, Sequence[Mapping[str, Any]]]], home: str) -> str:
    """The panel without script and style sheet; ``shown`` are some records of some filters."""
    colour = _COLOURS[seen["tone"]]
    head = (
        f'<div style="display:flex;flex-wrap:wrap;align-items:baseline;gap:2px 10px"><b style="font-size:15px">{dot(colour)}{escape(seen["word"])}</b> '
        f'<span dir="auto">{escape(seen["name"])}</span> <span style="{SMALL}">{escape(seen["about"])}</span></div>'
    )
    trouble = "".join(
        f'<div style="border-left:3px solid {BAD};padding:2px 0 2px 10px;margin:12px 0 0 0"><div dir="auto" style="{_WRAPPED}">'
        f"{escape(one['fact'])}</div>" + (f'<div dir="auto" style="margin-top:2px"><b>Fix:</b> {escape(one["fix"])}</div>' if one["fix"] else "") + "</div>"
        for one in seen["refusals"]
    )
    warnings = "".join(f'<div style="margin:3px 0 0 0" dir="auto">{dot(WARN)}{escape(one["words"])}</div>' for one in seen["findings"])
    cells = "".join(
        f'<div style="flex:1;min-width:130px"><div style="{SMALL}">{escape(one["name"])}</div><div style="font-size:17px;line-height:1.35;{NUMBERS}">'
        f'{escape(one["value"])}</div><div style="font-size:11px;{FAINT}">{escape(one["note"])}</div></div>'
        for one in seen["figures"]
    )
    figures = f'<div style="display:flex;flex-wrap:wrap;gap:10px 18px;margin:12px 0 0 0;padding:10px 0 0 0;border-top:1px solid {LINE}">{cells}</div>'
    records = "".join(
        fold(name, str(len(rows)), "".join(_row_html(row) for row in rows), is_open=place == 0) for place, (name, rows) in enumerate(shown) if rows
    )
    return frame(head + trouble + (f'<div style="margin:10px 0 0 0">{warnings}</div>' if warnings else "") + figures + _bars_html(seen) + records, home)


def _bars_html(seen: Mapping[str, Any]) -> str:
    scripts = f'<div style="{SMALL};margin:8px 0 0 0">Scripts: {escape(seen["scripts"])}</div>'
    bars = seen["bars"]
    if not bars:
        return scripts
    wide = 1000 / len(bars)
    shapes = "".join(
        f'<rect x="{place * wide + wide * 0.06:.1f}" y="{1000 - max(bar["height"], 0.012 * (bar["height"] > 0)) * 1000:.1f}" width="{wide * 0.88:.1f}" '
        f'height="{max(bar["height"], 0.012 * (bar["height"] > 0)) * 1000:.1f}" fill="{BAD if bar["long"] else LOSS}"/>'
        for place, bar in enumerate(bars)
    )
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1000 1000" preserveAspectRatio="none">{shapes}</svg>'
    ends = f"<span>{escape(bars[0]['from'])}</span><span>{escape(seen['bars_to'])}</span>"
    labels = f'<div style="display:flex;justify-content:space-between;margin:4px 0 0 0;font-size:11px;{FAINT};{NUMBERS}">{ends}</div>'
    return section("Lengths", escape(seen["bars_words"].split(": ", 1)[-1]), image(svg, seen["bars_words"], 70) + labels) + scripts


_MONO: Final = "font-family:var(--jp-code-font-family,ui-monospace,monospace);font-size:12px;line-height:1.7"
_LEARNED: Final = f"background:rgba(43,154,102,.2);border-bottom:2px solid {GOOD}"
_SPECIAL: Final = f"border:1px solid {LINE};border-radius:4px;padding:0 3px;font-size:11px;background:rgba(128,128,128,.14)"


def _row_html(row: Mapping[str, Any]) -> str:
    where, figures, flags = row_head(row)
    odd = "".join(f' <span style="white-space:nowrap">{dot(WARN)}{escape(flag)}</span>' for flag in flags)
    lines = "".join(f'<div dir="auto" style="min-height:1.2em">{"".join(_piece_html(piece) for piece in line)}</div>' for line in row["lines"])
    return (
        f'<div style="margin:10px 0 0 0;padding:8px 0 0 0;border-top:1px solid {LINE}"><div style="font-size:12px;{NUMBERS}"><b>{escape(where)}</b> '
        f'<span style="{FAINT}">{escape(figures)}</span>{odd}</div><div style="{_MONO};{_WRAPPED};margin:4px 0 0 0">{lines}</div></div>'
    )


def _piece_html(piece: Mapping[str, Any]) -> str:
    style = [_LEARNED] if piece.get("l") else []
    if piece.get("x"):
        style.append("text-decoration:line-through;opacity:.72")
    text = escape(piece["t"], 8000)
    if piece["k"] == "text":
        return f'<span style="{";".join(style)}">{text}</span>'
    style += {"special": [_SPECIAL], "escape": [f"border:1px dashed {BAD};border-radius:3px;padding:0 2px"], "break": [FAINT], "note": [FAINT]}[piece["k"]]
    if piece["k"] == "special" and piece.get("l"):
        style.append(_LEARNED)
    return f'<bdi style="{";".join(style)}">{text}</bdi>'


# ---------------------------------------------------------------- the terminal


def text(seen: Mapping[str, Any], shown: Sequence[tuple[str, Sequence[Mapping[str, Any]]]], *, colour: bool) -> str:
    """The panel for a terminal. Without colour, what is learned stands between ``{+`` and ``+}``; nothing of the data reaches the terminal raw."""
    paint = _Paint(colour)
    lines = [paint(seen["word"], {"good": "1;32", "warn": "1;33", "bad": "1;31"}[seen["tone"]]) + f"  {seen['name']}  ({seen['about']})"]
    for one in seen["refusals"]:
        lines += [f"  {paint('x', '31')} {one['fact']}", *([f"    Fix: {one['fix']}"] if one["fix"] else [])]
    lines += [f"  {paint('!', '33')} {one['words']}" for one in seen["findings"]]
    lines += [f"{one['name']:<14}{one['value']:>10}  {one['note']}" for one in seen["figures"]]
    lines.append(f"{'Scripts':<14}{'':>10}  {seen['scripts']}")
    if seen["bars"]:
        lines.append(f"{'Lengths':<14}" + "".join(" ▁▂▃▄▅▆▇█"[max(1, round(8 * bar["height"])) if bar["height"] else 0] for bar in seen["bars"])
                     + f"  {seen['bars'][0]['from']} to {seen['bars_to']}")  # fmt: skip
    for name, rows in shown:
        if rows:
            lines += ["", paint(name, "1")]
            lines.append(rows_text(rows, colour=colour, characters=_GLANCE))
    return "\n".join(lines)


def rows_text(rows: Sequence[Mapping[str, Any]], *, colour: bool, characters: int = 100_000) -> str:
    """Records for a terminal, each up to so many characters."""
    paint, lines = _Paint(colour), []
    for row in rows:
        where, figures, flags = row_head(row)
        lines.append("  ".join([paint(where, "36"), *([figures] if figures else []), *(paint(flag, "33") for flag in flags)]))
        lines += ["  " + "".join(_piece_text(piece, paint) for piece in line) for line in _first(row["lines"], characters)]
    return "\n".join(lines)


def _first(lines: Sequence[Sequence[Mapping[str, Any]]], characters: int) -> list[list[Mapping[str, Any]]]:
    """The lines up to so many characters, and an ellipsis where that is not all."""
    found: list[list[Mapping[str, Any]]] = []
    left = characters
    for line in lines:
        kept: list[Mapping[str, Any]] = []
        found.append(kept)
        for piece in line:
            if len(piece["t"]) > left:
                kept += [{**piece, "t": piece["t"][:left]}, {"t": "\u2026", "k": "note"}]
                return found
            kept.append(piece)
            left -= len(piece["t"])
    return found


class _Paint:
    """Colour where it is wanted, and text without anything a terminal would obey."""

    def __init__(self, colour: bool) -> None:
        self.colour = colour

    def __call__(self, words: str, code: str) -> str:
        plain = one_line(words, 8000) if words.strip() else words
        return f"\x1b[{code}m{plain}\x1b[0m" if self.colour and code else plain


def _piece_text(piece: Mapping[str, Any], paint: _Paint) -> str:
    words = clean(piece["t"], 8000)
    if not paint.colour:
        return f"{{+{words}+}}" if piece.get("l") else words
    codes = [code for code, on in (("32;4", piece.get("l")), ("2", not piece.get("l") and piece["k"] == "text"), ("7", piece["k"] == "special"),
                                   ("31", piece["k"] == "escape"), ("9", piece.get("x"))) if on]  # fmt: skip
    return f"\x1b[{';'.join(codes)}m{words}\x1b[0m" if codes else words
