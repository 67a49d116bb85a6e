"""The run panel in a terminal: one line that keeps up where there is a screen, plain lines at sensible intervals where there is a log."""

from __future__ import annotations

import shutil
import sys
import time
from typing import Any, TextIO

from sparklab.panels import facts
from sparklab.panels.parts import one_line
from sparklab.panels.watch import Watch
from sparklab.run.directory import RunDirectory
from sparklab.run.state import RunState

_ERASE = "\r\x1b[2K"


def follow(directory: RunDirectory, stream: TextIO | None = None, *, every_seconds: float = 0.2) -> RunState:
    """Shows the run until it is over and returns its state; ``stream`` is stderr unless given. KeyboardInterrupt goes to the caller.

    ::

        state = follow(RunDirectory("runs/chat-1"))
        print(summary(state, directory.plan))
    """
    watch = Watch(directory)
    line = ProgressLine(directory.plan, stream)
    try:
        while True:
            line.update(watch.refresh())
            if watch.over:
                return watch.state
            time.sleep(every_seconds)
    finally:
        line.close()


class ProgressLine:
    """Draws states on a stream as they come: :meth:`update` as often as you like, :meth:`close` at the end."""

    def __init__(self, plan: dict[str, Any], stream: TextIO | None = None) -> None:
        self._plan = plan
        self._stream = stream or sys.stderr
        self._screen = self._stream.isatty()
        self._notes = 0
        self._evals = 0
        self._word = ""
        self._shown_at = float("-inf")
        self._shown_tenth = -1
        self._drawn = ""

    def update(self, state: RunState) -> None:
        """Shows what changed since the last call."""
        for note in state.messages[self._notes :]:
            if note["event"] in ("warning", "command", "checkpoint"):
                self._print(f"  {one_line(note['text'])}")
        self._notes = len(state.messages)
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
    head, figures, memory = facts.head(state), facts.figures(state), facts.memory(state, plan)
    fields: list[str] = [head["word"], head["step"]]
    if state.loss_steps:
        fields.append(f"loss {figures['loss']}")
        if state.evals:
            fields.append(f"held-out {figures['held_out']}")
        if head["eta"] != facts.DASH:
            fields.append(f"{head['eta']} left")
        fields.append(f"{figures['tokens_per_second']} tok/s")
    if memory["peak"] is not None:
        fields.append(f"{facts.size(memory['peak'])} of {facts.size(memory['planned'])} planned")
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


def summary(state: RunState, plan: dict[str, Any]) -> str:
    """What came of the run, in a few lines; the reason and the fix where it ended early."""
    head, figures, memory, curve = facts.head(state), facts.figures(state), facts.memory(state, plan), facts.curve(state)
    rows = [("", f"{head['word']}, {head['step']}, {head['elapsed']}")]
    if head["reason"]:
        rows.append(("why", one_line(head["reason"], 1500)))
    if head["over"] and head["fix"]:
        rows.append(("fix", one_line(head["fix"], 800)))
    if state.loss_steps:
        held_out = f", held-out {figures['held_out']} (best {curve['best'][1]:.3f} at step {curve['best'][0]:,.0f})" if curve["best"] else ""
        rows.append(("loss", figures["loss"] + held_out))
    if facts.broken(state):
        rows.append(("", facts.broken(state)))
    if figures["exact_match"]:
        rows.append(("exact match", f"{figures['exact_match']} {facts.exact_match_count(state)}"))
    if state.loss_steps:
        rows.append(("speed", f"{figures['tokens_per_second']} tokens/s, not counting padding"))
    if memory["planned"] is not None or memory["peak"] is not None:
        rows.append(("memory", f"peak {facts.size(memory['peak'])} of {facts.size(memory['planned'])} planned, {facts.size(memory['usable'])} usable"))
    return "\n".join(f"{name:<12}{text}" if name else text for name, text in rows)
