"""The run panel in a terminal: one line that keeps up where there is a screen, plain lines at sensible intervals where there is a log."""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, TextIO

from sparklab.panels import facts
from sparklab.panels.memory_facts import memory
from sparklab.panels.parts import one_line
from sparklab.panels.series import Series
from sparklab.panels.watch import Watch
from sparklab.run.directory import RunDirectory
from sparklab.run.state import RunState

_BLOCKS = "▁▂▃▄▅▆▇█"
_ERASE = "\r\x1b[2K"
_OLD_NOTES: Final = 10
"""Of what a run has said before somebody looks, the latest; a long run has said a thousand things."""


def follow(directory: RunDirectory, stream: TextIO | None = None, *, every_seconds: float = 0.2, on_interrupt: Callable[[], object] | None = None) -> RunState:
    """Shows the run until it is over and returns its state; ``stream`` is stderr unless given.

    The first KeyboardInterrupt calls ``on_interrupt``, where there is one, and the run is followed on; any other goes to the caller.

    ::

        state = follow(RunDirectory("runs/chat-1"))
        print(summary(state, directory.plan))
    """
    watch = Watch(directory)
    line = ProgressLine(directory.plan, stream)
    try:
        while True:
            try:
                line.update(watch.refresh())
                if watch.over:
                    return watch.state
                time.sleep(every_seconds)
            except KeyboardInterrupt:
                if on_interrupt is None:
                    raise
                line.close()
                on_interrupt()
                on_interrupt = None
    finally:
        line.close()


class ProgressLine:
    """Draws states on a stream as they come: :meth:`update` as often as you like, :meth:`close` at the end."""

    def __init__(self, plan: dict[str, Any], stream: TextIO | None = None) -> None:
        self._plan = plan
        self._stream = stream or sys.stderr
        self._screen = self._stream.isatty()
        self._notes = self._samples = -1  # nothing seen yet
        self._evals = 0
        self._word = ""
        self._shown_at = float("-inf")
        self._shown_tenth = -1
        self._drawn = ""

    def update(self, state: RunState) -> None:
        """Shows what changed since the last call."""
        notes = state.messages_since(self._notes) if self._notes >= 0 else state.messages[-_OLD_NOTES:]
        for note in notes:
            if note["event"] in ("warning", "command", "checkpoint"):
                self._print(f"  {one_line(note['text'])}")
        new = max(0, state.samples_told - self._samples) if self._samples >= 0 else 0
        for sample in state.samples[len(state.samples) - min(new, len(state.samples)) :]:
            self._print(f"  {one_line(sample['prompt'], 80)} → {one_line(sample['text'], 200)}")
        self._notes, self._samples = state.messages_told, state.samples_told
        if self._screen:
            self._draw(progress(state, self._plan, shutil.get_terminal_size((100, 24)).columns - 1))
        elif self._worth_a_line(state):
            self._print(progress(state, self._plan, 0))

    def close(self) -> None:
        """Ends the line, so that what is printed next starts on its own."""
        if self._screen and self._drawn:
            self._write("\n")
        self._drawn = ""

    def _worth_a_line(self, state: RunState) -> bool:
        """In a log: a new phase before training, an evaluation, a tenth of the way or half a minute is news; a step is not."""
        now, tenth = time.monotonic(), state.step * 10 // state.steps if state.steps else 0
        word = facts.word(state)
        quiet = state.status == "running" and bool(state.loss_steps)  # evaluating, sampling and saving between steps come and go
        news = (word != self._word and not quiet) or tenth != self._shown_tenth or len(state.evals) != self._evals or now - self._shown_at >= 30
        if news:
            self._word, self._shown_tenth, self._shown_at, self._evals = word, tenth, now, len(state.evals)
        return news

    def _draw(self, text: str) -> None:
        if text != self._drawn:
            self._write(_ERASE + text)
            self._drawn = text

    def _print(self, text: str) -> None:
        self._write((_ERASE if self._screen else "") + text + "\n")
        self._drawn = ""

    def _write(self, text: str) -> None:
        encoding = self._stream.encoding or "utf-8"
        self._stream.write(text.encode(encoding, "replace").decode(encoding))  # an ASCII terminal gets question marks, not a traceback
        self._stream.flush()


def progress(state: RunState, plan: dict[str, Any], columns: int) -> str:
    """The run in one line of at most ``columns`` characters (0: as long as it takes): what matters less goes first."""
    head, figures, held = facts.head(state), facts.figures(state), memory(state, plan)
    fields: list[str] = [head["word"], head["step"]]
    if state.loss_steps:
        fields.append(f"loss {figures['loss']}")
        if state.evals:
            fields.append(f"held-out {figures['held_out']}")
        if head["eta"] != facts.DASH:
            fields.append(f"{head['eta']} left")
        fields.append(f"{figures['tokens_per_second']} tok/s")
    if held["light"]["level"] in ("warn", "bad"):
        fields.append(f"memory {held['light']['word']}: {held['light']['reason']}")
    if held["peak"] is not None:
        fields.append(f"{facts.size(held['peak'])} of {facts.size(held['planned'])} planned")
    bar = _bar(head["share"], 20) if state.steps else ""
    while columns > 0 and len(_joined(bar, fields)) > columns:
        if bar:
            bar = _bar(head["share"], len(bar) // 2) if len(bar) > 6 else ""
        elif len(fields) > 1:
            fields.pop()
        else:
            return fields[0][:columns]
    return _joined(bar, fields)


def _joined(bar: str, fields: list[str]) -> str:
    return " ".join([*([bar] if bar else []), " · ".join(fields)])


def _bar(share: float, width: int) -> str:
    full = int(share * width + 0.5)
    return "█" * full + "░" * (width - full)


def _sparkline(values: Sequence[float], width: int = 40) -> str:
    """The curve in a row of blocks, lowest to highest; what is not a number leaves a gap."""
    size = max(1, -(-len(values) // width))
    means = []
    for start in range(0, len(values), size):
        known = [value for value in values[start : start + size] if math.isfinite(value)]
        means.append(sum(known) / len(known) if known else math.nan)
    finite = [mean for mean in means if math.isfinite(mean)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    return "".join(" " if math.isnan(mean) else _BLOCKS[round((mean - low) / (high - low) * 7) if high > low else 0] for mean in means)


def summary(state: RunState, plan: dict[str, Any], series: Series | None = None) -> str:
    """What came of the run, in a few lines; the reason and the fix where it ended early. ``series``: its curves as far as they are known already."""
    series = Series() if series is None else series
    series.take(state)
    head, figures, held, curve = facts.head(state), facts.figures(state, plan, series=series), memory(state, plan), facts.curve(state)
    rows = [("", f"{head['word']}, {head['step']}, {head['elapsed']}")]
    if head["reason"]:
        rows.append(("why", one_line(head["reason"], 1500)))
    if head["over"] and head["fix"]:
        rows.append(("fix", one_line(head["fix"], 800)))
    if state.loss_steps:
        held_out = f", held-out {figures['held_out']} (best {curve['best'][1]:.3f} at step {curve['best'][0]:,.0f})" if curve["best"] else ""
        rows.append(("loss", figures["loss"] + held_out))
        rows.append(("curve", _sparkline(series.column("loss"))))
    if facts.badge(series):
        rows.append(("", facts.badge(series)))
    if figures["exact_match"]:
        rows.append(("exact match", f"{figures['exact_match']} {facts.exact_match_count(state)}"))
    if state.loss_steps:
        rows.append(("speed", f"{figures['tokens_per_second']} tokens/s; {figures['speed_note']}"))
        if figures["energy"] != facts.DASH:
            rows.append(("energy", f"{figures['energy']}; {figures['energy_note']}"))
    if held["planned"] is not None or held["peak"] is not None:
        rows.append(("memory", f"peak {facts.size(held['peak'])} of {facts.size(held['planned'])} planned, {facts.size(held['usable'])} usable"))
    return "\n".join(f"{name:<12}{text}" if name else text for name, text in rows)
