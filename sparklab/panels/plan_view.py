"""What the plan panel shows, computed once here for the live panel and its static twin: words, figures, and the settings its sliders offer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

from sparklab.panels.parts import BAD, FAINT, clean, escape, frame, one_line, swatch
from sparklab.planner import Plan, render
from sparklab.planner.recipe import Method
from sparklab.planner.search import checkpoint_setting
from sparklab.units import gib, is_na

LEAST_TOKENS: Final = 128
MOST_TOKENS: Final = 131_072
MOST_RANK: Final = 256


@dataclass(frozen=True)
class Choice:
    """Where the sliders stand."""

    method: Method
    tokens: int
    """Tokens in a row, that is per micro-batch."""
    rank: int
    layers: int
    """Layers that recompute."""

    @classmethod
    def of(cls, plan: Plan) -> Choice:
        """The settings of a plan."""
        return cls(plan.recipe.method, plan.recipe.micro_batch_tokens, plan.recipe.rank, plan.ledger.checkpointed)


class Settings:
    """The plans to choose from: one base plan a method, and the values that tokens, rank and layers may take."""

    def __init__(self, bases: Mapping[Method, Plan], start: Choice) -> None:
        self.bases, self.start = dict(bases), start
        anatomy = bases[start.method].anatomy
        steps = {LEAST_TOKENS * 2**power for power in range(11)} | {LEAST_TOKENS * 3 * 2**power for power in range(9)}
        self.tokens = sorted({step for step in steps if step <= MOST_TOKENS} | {start.tokens})
        self.ranks = sorted({2**power for power in range(9) if 2**power <= min(MOST_RANK, anatomy.hidden)} | {start.rank})
        self.layers = anatomy.layers

    def read(self, values: object) -> Choice | None:
        """The choice that a page's message describes; None where it is not one of those on offer."""
        if not isinstance(values, dict):
            return None
        method = next((name for name in self.bases if name == values.get("method")), None)
        tokens, rank, layers = (values.get(name) for name in ("tokens", "rank", "layers"))
        for value, offered in ((tokens, self.tokens), (rank, self.ranks), (layers, range(self.layers + 1))):
            if type(value) is not int or value not in offered:
                return None
        return None if method is None else Choice(method, cast(int, tokens), cast(int, rank), cast(int, layers))

    def plan(self, choice: Choice, method: Method | None = None) -> Plan:
        """The plan of a choice, or of another method with the same settings; documents are never longer than a row."""
        base = self.bases[method or choice.method]
        return base.replace(
            micro_batch_tokens=choice.tokens,
            max_length=min(base.recipe.max_length, choice.tokens),
            rank=choice.rank,
            checkpoint_layers=checkpoint_setting(choice.layers, self.layers),
        )

    def plans(self, choice: Choice) -> dict[Method, Plan]:
        """The plans of a choice, one a method."""
        return {method: self.plan(choice, method) for method in self.bases}


def title(settings: Settings) -> tuple[str, str]:
    """The model's name; what else is to be known of it and of the box."""
    plan = settings.bases[settings.start.method]
    return one_line(plan.anatomy.source.rstrip("/").rsplit("/", 1)[-1], 60), one_line(f"on {plan.box!r}", 120)


def view(settings: Settings, choice: Choice) -> dict[str, Any]:
    """Everything that changes with the sliders, ready for JSON: a bar a method on one scale, and the chosen plan in words."""
    return _view(settings, choice, settings.plans(choice))


def _view(settings: Settings, choice: Choice, plans: dict[Method, Plan]) -> dict[str, Any]:
    chosen, usable = plans[choice.method], plans[choice.method].usable_bytes
    known = not is_na(usable)
    return {
        "methods": [
            {
                "method": method,
                "fits": plan.fits,
                "gib": gib(plan.peak_bytes),
                "peak": render.size(plan.peak_bytes),
                "verdict": render.verdict(plan),
                "words": render.bar_words(plan),
                "segments": [{"name": name, "gib": gib(size), "text": render.size(size), "colour": colour} for name, size, colour in render.segments(plan)],
            }
            for method, plan in plans.items()
        ],
        "scale": gib(render.scale(plans.values())),
        "usable": gib(usable) if known else None,
        "usable_text": f"{render.size(usable)} usable" if known else "memory of the box unknown",
        "summary": f"{choice.method}: {render.size(chosen.peak_bytes)}, {render.verdict(chosen)}",
        "speed": f"{render.span(chosen.tokens_per_second)} tokens/s · {render.duration(chosen.hours)} · {render.span(chosen.watt_hours, ' Wh')}",
        "moment": f"The peak stands in: {chosen.peak_phase} ({chosen.peak_moment})",
        "lines": [
            {"name": line.name, "size": render.size(line.bytes), "formula": clean(line.formula, 300), "colour": render.colour(line.name)}
            for line in sorted(chosen.peak_lines, key=lambda line: -line.bytes)
        ],
        "fixes": clean(f"Any one of these fits: {', '.join(str(fix) for fix in chosen.fixes)}" if chosen.fixes else "", 1000),
        "notes": [clean(note, 600) for note in chosen.notes],
        "settings": _settings_words(settings, choice),
    }


def _settings_words(settings: Settings, choice: Choice) -> str:
    rank = "" if choice.method == "full" else f", rank {choice.rank}"
    return f"{choice.tokens:,} tokens a row{rank}, {choice.layers} of {settings.layers} layers recompute"


def twin_html(settings: Settings, choice: Choice, home: str) -> str:
    """The panel without script and style sheet: what a saved notebook shows. ``home`` is the class by which the live panel finds its place."""
    plans = settings.plans(choice)
    seen, (name, about) = _view(settings, choice, plans), title(settings)
    whole = render.scale(plans.values())
    small = f"font-size:12px;{FAINT}"
    bars = "".join(
        f'<div style="margin:8px 0 0 0"><div><b>{row["method"]}</b> <span style="{small}">{escape(row["peak"])}, {escape(row["verdict"])}</span></div>'
        f"{render.bar(plans[row['method']], whole)}</div>"
        for row in seen["methods"]
    )
    keys = "".join(
        f'<span style="white-space:nowrap;margin-right:14px">{swatch(part["colour"])}{escape(part["name"])} <span style="{FAINT}">{part["text"]}</span></span> '
        for row in seen["methods"]
        if row["method"] == choice.method
        for part in row["segments"]
    )
    words = (seen["summary"], seen["settings"], seen["speed"], seen["moment"], seen["fixes"], *(f"Note: {note}" for note in seen["notes"]))
    return frame(
        f'<b style="font-size:15px">{escape(name)}</b> <span style="{small}">{escape(about)}</span>{bars}'
        f'<div style="{small};margin:6px 0 0 0">{swatch(BAD)}{seen["usable_text"]}</div><div style="font-size:12px;margin:8px 0 0 0">{keys}</div>'
        + "".join(f'<div style="margin:4px 0 0 0">{escape(text)}</div>' for text in words if text),
        home,
    )
