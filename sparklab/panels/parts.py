"""The shared parts of every panel: colours, escaping, and pictures that survive where scripts and styles do not.

A picture here is an SVG behind ``<img src="data:...">``: JupyterLab strips ``<svg>`` and ``<style>`` from notebooks it does not trust, but keeps
images. It holds shapes only; every word stands beside it in HTML, in the page's own colour and size, so that it reads in light, dark, narrow
and wide alike.
"""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from sparklab.text import clean, one_line

__all__ = ["clean", "one_line"]  # at home in sparklab.text, handed on to the panels with the rest

# Mid-tones: each keeps at least 3:1 against white and against JupyterLab's dark #111, so that one picture serves both themes.
LOSS: Final = "#3b82f6"
HELD_OUT: Final = "#d9730d"
GOOD: Final = "#2b9a66"
WARN: Final = "#b8860b"
BAD: Final = "#e5484d"
DIM: Final = "#787878"
FAINT: Final = "opacity:.72"
"""How lesser words look: the page's own colour, thinned. No one grey keeps 4.5:1 (WCAG 2.2, 1.4.3) on white and on JupyterLab's dark alike."""
LINE: Final = "rgba(128,128,128,.28)"
SMALL: Final = f"font-size:12px;{FAINT}"
NUMBERS: Final = "font-variant-numeric:tabular-nums"
SEGMENTS: Final = ("#3b82f6", "#12a594", "#8e6ad8", "#d9730d", "#d6568c", "#7c9a2b", "#8a8f98")
"""Components of a stacked bar, in order; the last is for whatever nobody itemised."""


def escape(text: object, limit: int = 4000) -> str:
    """``text`` cleaned and safe inside HTML, as content or as a quoted attribute."""
    return html.escape(clean(text, limit), quote=True)


def css_variables() -> str:
    """The colours above for the stylesheet, so that the live panel and its twin cannot differ."""
    named = {"loss": LOSS, "held-out": HELD_OUT, "good": GOOD, "warn": WARN, "bad": BAD}
    return ".sparklab{" + "".join(f"--sl-{name}:{colour};" for name, colour in named.items()) + "}\n"


def image(svg: str, alt: str, height_px: int) -> str:
    """The SVG as an image that fills the width it is given; ``alt`` says in words what it shows."""
    data = base64.b64encode(svg.encode()).decode()
    return f'<img alt="{escape(alt)}" style="display:block;width:100%;height:{height_px}px" height="{height_px}" src="data:image/svg+xml;base64,{data}">'


def faint(text: object) -> str:
    """Words of less weight, escaped."""
    return f'<span style="{FAINT}">{escape(text)}</span>'


def dot(colour: str) -> str:
    """A dot of colour before words in the page's own: coloured words would not read on white and on black."""
    return f'<span style="color:{colour}">●</span> '


def swatch(colour: str, *, hatched: bool = False) -> str:
    """A small square of colour for a legend."""
    fill = f"repeating-linear-gradient(115deg,{colour} 0 1.5px,transparent 1.5px 4px)" if hatched else colour
    return f'<span style="display:inline-block;background:{fill};width:10px;height:10px;border-radius:2px;margin-right:6px"></span>'


def smooth(values: Sequence[float], beta: float, at: Sequence[int] | None = None) -> list[float]:
    """The line that best fits the neighbours of each value, their weights falling by ``beta`` a step to both sides.

    A plain running mean lags behind a falling loss and is wrong at both ends; a local line is neither, so the newest value can be read off.
    A value that is not finite weighs nothing and has no smoothed one. ``at``: only at these places, ascending, though by all values.

    >>> [round(value, 9) for value in smooth([3.0, 2.0, 1.0, 0.0], 0.9)]
    [3.0, 2.0, 1.0, 0.0]
    """
    wanted = range(len(values)) if at is None else at
    smoothed = []
    before = _moments(values, beta, wanted)
    after = _moments(values[::-1], beta, [len(values) - 1 - place for place in reversed(wanted)])[::-1]
    for place, (left0, left1, left2, left_y, left_xy), (right0, right1, right2, right_y, right_xy) in zip(wanted, before, after, strict=True):
        value = values[place]
        if not math.isfinite(value):
            smoothed.append(math.nan)
            continue
        s0, s1, s2 = left0 + right0 - 1, right1 - left1, left2 + right2  # the value itself is in both sides
        y, xy = left_y + right_y - value, right_xy - left_xy
        spread = s0 * s2 - s1 * s1
        smoothed.append((s2 * y - s1 * xy) / spread if spread > 1e-9 * s0 * s0 else y / s0)
    return smoothed


def _moments(values: Sequence[float], beta: float, at: Sequence[int]) -> list[tuple[float, float, float, float, float]]:
    """At each place of ``at``, sums over its value and those before it, d steps away, weighing beta**d: of 1, d, d*d, y and d*y."""
    s0 = s1 = s2 = y = xy = 0.0
    sums, start = [], 0
    for place in at:
        for value in values[start : place + 1]:
            s0, s1, s2, y, xy = beta * s0, beta * (s1 + s0), beta * (s2 + 2 * s1 + s0), beta * y, beta * (xy + y)
            if math.isfinite(value):
                s0, y = s0 + 1, y + value
        sums.append((s0, s1, s2, y, xy))
        start = place + 1
    return sums


def window(steps: int) -> float:
    """Over how many updates the bold curve looks to each side: about a fortieth of the run, from 4 to 60, a four-hundredth of a long one."""
    return max(steps / 400, min(60.0, max(4.0, steps / 40)))


def smoothing(steps: int) -> float:
    """What :func:`smooth` takes for a run of so many steps."""
    return beta_of(window(steps))


def beta_of(window_updates: float, stride: int = 1) -> float:
    """What :func:`smooth` takes for a window of so many updates over values that stand for ``stride`` updates each."""
    return 1 - 1 / max(1.0, window_updates / stride)


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Evenly spaced round numbers that enclose ``low`` and ``high``: ``ticks(0.13, 1.9) == [0.0, 0.5, 1.0, 1.5, 2.0]``."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return [0.0, 1.0]
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-300):
        low, high = low - (abs(low) or 1) * 0.1, high + (abs(high) or 1) * 0.1
    rough = (high - low) / count
    power: float = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def tick_label(value: float, step: float) -> str:
    """A tick with as many decimals as its neighbours need."""
    if value and (abs(value) >= 1e5 or abs(value) < 1e-3):
        return f"{value:.3g}"
    decimals = max(0, -math.floor(math.log10(step) + 1e-9)) if step > 0 else 0
    return f"{value:.{min(6, decimals + (0 if _round_at(step, decimals) else 1))}f}"


def _round_at(step: float, decimals: int) -> bool:
    scaled = step * 10.0**decimals
    return abs(scaled - round(scaled)) < 1e-6


def axis_end(last: int, steps: int) -> int:
    """Where a step axis ends: a round number beyond the last step, the run's own end at most; so the axis moves rarely."""
    if last > 1e15:  # only a damaged file goes so far
        return last
    beyond = max(10.0, last * 1.04)
    power: float = 10.0 ** math.floor(math.log10(beyond))
    rounded = next(factor * power for factor in (1, 1.5, 2, 3, 4, 5, 6, 8, 10) if factor * power >= beyond)
    return max(last, min(int(rounded), steps) if steps else int(rounded), 1)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One line of a chart; points that are not finite leave a gap."""

    xs: Sequence[float]
    ys: Sequence[float]
    colour: str
    width: float = 1.75
    opacity: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Dots:
    """Single points of a chart; ``ring`` draws the last of them hollow and larger."""

    xs: Sequence[float]
    ys: Sequence[float]
    colour: str
    size: float = 7.0


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A chart in a box of 1000 by 1000 that is stretched to the size of its image; strokes and dots keep theirs."""

    x_range: tuple[float, float]
    y_ticks: Sequence[float]
    curves: Sequence[Curve] = ()
    dots: Sequence[Dots] = ()
    marks: Sequence[tuple[float, str]] = field(default=())
    """(x, colour): short strokes on the floor, for steps whose value is not a number."""
    grid: bool = True

    def svg(self) -> str:
        """The picture; some 10 kB whatever the length of the run."""
        shapes = []
        if self.grid:
            shapes += [_stroke(f"M0 {self._y(tick):.1f}H1000", "#808080", 1, 0.28) for tick in self.y_ticks]
        for curve in self.curves:
            path = self._path(curve)
            if path:
                shapes.append(_stroke(path, curve.colour, curve.width, curve.opacity))
        shapes += [_stroke(f"M{self._x(x):.1f} 955V1000", colour, 2, 1) for x, colour in self.marks]
        for dots in self.dots:
            path = "".join(f"M{self._x(x):.1f} {self._y(y):.1f}h.01" for x, y in zip(dots.xs, dots.ys, strict=True) if math.isfinite(y))
            if path:
                shapes.append(_stroke(path, dots.colour, dots.size, 1))
        return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1000 1000" preserveAspectRatio="none">{"".join(shapes)}</svg>'

    def _x(self, x: float) -> float:
        low, high = self.x_range
        return 8 + 984 * (x - low) / max(high - low, 1e-12)  # dots at the ends stay whole

    def _y(self, y: float) -> float:
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return min(1000.0, max(0.0, 1000 * (1 - (y - low) / max(high - low, 1e-300))))

    def _path(self, curve: Curve) -> str:
        """Lowest and highest value of each of 500 columns: every spike stays visible however long the run."""
        columns: dict[int, list[float]] = {}
        for x, y in zip(curve.xs, curve.ys, strict=True):
            if math.isfinite(y) and math.isfinite(x):
                columns.setdefault(round(self._x(x) / 2), []).append(y)
        if len(curve.xs) <= 500:  # sparse enough to draw as it is
            points = [(self._x(x), self._y(y)) for x, y in zip(curve.xs, curve.ys, strict=True) if math.isfinite(y)]
        else:
            points = [(2.0 * column, self._y(y)) for column, ys in sorted(columns.items()) for y in sorted({ys[0], min(ys), max(ys)}, key=ys.index)]
        return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points) if points else ""


def _stroke(path: str, colour: str, width: float, opacity: float) -> str:
    return (
        f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="{width}" stroke-opacity="{opacity}" '
        'stroke-linecap="round" stroke-linejoin="round" vector-effect="non-scaling-stroke"/>'
    )


_HATCH = "".join(f"M{x} 1000L{x + 9} 0" for x in range(0, 1000, 9))


def stack_svg(segments: Iterable[tuple[float, str, bool]], scale: float, line: float | None = None) -> str:
    """A stacked bar of (width, colour, hatched) on a track of ``scale``, and a vertical line. Hatched is what can be had back."""
    shapes, left = ['<rect width="1000" height="1000" fill="#808080" fill-opacity=".14"/>'], 0.0
    for index, (width, colour, hatched) in enumerate(segments):
        place = f'x="{1000 * left / scale:.2f}" width="{1000 * width / scale:.2f}" height="1000"'
        if hatched:
            shapes.append(f'<clipPath id="c{index}"><rect {place}/></clipPath><g clip-path="url(#c{index})">{_stroke(_HATCH, colour, 1.5, 0.8)}</g>')
        else:
            shapes.append(f'<rect {place} fill="{colour}"/>')
        left += width
    if line is not None:
        shapes += [_stroke(f"M{1000 * line / scale:.2f} 0V1000", "#fff", 5, 1), _stroke(f"M{1000 * line / scale:.2f} 0V1000", BAD, 3, 1)]
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1000 1000" preserveAspectRatio="none">{"".join(shapes)}</svg>'


def frame(body: str, home: str = "") -> str:
    """The border round a whole twin; ``home`` is the class by which a live panel finds its place."""
    return (
        f'<div class="{escape(f"sparklab-twin {home}".strip())}"><div style="max-width:1080px;border:1px solid {LINE};border-radius:8px;padding:14px 16px;'
        f'font-size:13px;line-height:1.45">{body}</div></div>'
    )


def section(name: str, aside: str, body: str) -> str:
    """A part of a twin under its name; ``aside`` and ``body`` are HTML."""
    return (
        '<div style="margin:14px 0 0 0"><div style="display:flex;flex-wrap:wrap;align-items:baseline;gap:2px 14px;margin:0 0 8px 0">'
        f'<b>{escape(name)}</b> <span style="font-size:12px;{NUMBERS}">{aside}</span></div>{body}</div>'
    )


def fold(name: str, aside: str, body: str, *, is_open: bool = False) -> str:
    """A part of a twin that opens on demand."""
    return (
        f'<details{" open" if is_open else ""} style="margin:12px 0 0 0;padding:10px 0 0 0;border-top:1px solid {LINE}">'
        f'<summary style="cursor:pointer"><b>{escape(name)}</b> <span style="{SMALL}">{aside}</span></summary>{body}</details>'
    )


def legend(segments: Iterable[dict[str, Any]]) -> str:
    """The name and text of each segment beside its colour, hatched where it is; escaped."""
    squares = ((swatch(segment["colour"], hatched=segment.get("hatched", False)), segment) for segment in segments)
    shown = "".join(f'<span style="white-space:nowrap">{square}{escape(one["name"])} {faint(one["text"])}</span> ' for square, one in squares)
    return f'<div style="display:flex;flex-wrap:wrap;gap:3px 16px;font-size:12px;margin:8px 0 0 0">{shown}</div>'


def chart_html(chart: Chart, alt: str, height_px: int, x_labels: tuple[str, str]) -> str:
    """The chart with its words around it: ticks to the left, the ends of the step axis below."""
    step = chart.y_ticks[1] - chart.y_ticks[0] if len(chart.y_ticks) > 1 else 1.0
    labels = "".join(f'<div style="line-height:12px">{tick_label(tick, step)}</div>' for tick in reversed(chart.y_ticks))
    small = f"font-size:11px;{FAINT};{NUMBERS}"
    column = f"display:flex;flex-direction:column;justify-content:space-between;text-align:right;width:44px;margin:-6px 8px -6px 0;{small}"
    return (
        f'<div style="display:flex"><div style="{column}">{labels}</div>'
        f'<div style="flex:1;min-width:0">{image(chart.svg(), alt, height_px)}</div></div>'
        f'<div style="display:flex;justify-content:space-between;margin:7px 0 0 52px;{small}">'
        f"<span>{x_labels[0]}</span><span>{x_labels[1]}</span></div>"
    )
