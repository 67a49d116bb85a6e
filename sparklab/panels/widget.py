"""The live panel's widget: traits the page reads, binary rows for the curves, and the buttons' way back.

It knows nothing of directories and threads; :mod:`sparklab.panels.run_panel` feeds it. Importing this module loads anywidget.
"""

from __future__ import annotations

import array
import math
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import anywidget
import traitlets

from sparklab.panels import facts, parts
from sparklab.run.state import RunState
from sparklab.units import NA

COLUMNS: Final = ("step", "loss", "learning_rate", "grad_norm", "tokens_per_second")
"""What a row of the binary history holds, each a little-endian float32; NaN where unknown."""

_ASSETS = Path(__file__).parent / "assets"


def asset(*names: str) -> str:
    """The text of some files of the panels, one after the other."""
    return "\n".join((_ASSETS / name).read_text(encoding="utf-8") for name in names)


def hear_every_page(comm: Any) -> None:
    """Keeps a widget's comm alive over a reload of its page.

    ipykernel 7.4 hands a page's message to the subshell that published last on the comm, which after a page reload no longer exists:
    buttons and sliders would be dead. Each message goes where the page sent it instead.
    """
    if hasattr(comm, "_reply_subshell_for"):
        comm._reply_subshell_for = lambda data, default: default  # noqa: ARG005 - the names are ipykernel's


class History:
    """The updates as one growing block of rows, and how many of them were handed out."""

    def __init__(self) -> None:
        self._rows = array.array("f")  # an overflowing float becomes infinity here, where struct would raise
        self._count = 0
        self._last: tuple[float, ...] = ()

    def __len__(self) -> int:
        return self._count

    def take(self, state: RunState) -> tuple[int, bytes]:
        """(index of the first row, rows) that are new since the last call; index 0 also when a resumed run went back in time."""
        total = len(state.loss_steps)
        if total < self._count or (self._count and self._identity(state, self._count - 1) != self._last):
            self._rows, self._count = array.array("f"), 0
        first = self._count
        for index in range(first, total):
            seconds = state.step_seconds[index]
            speed = state.step_tokens[index] / seconds if seconds > 0 else NA
            self._rows.extend((state.loss_steps[index], state.losses[index], state.learning_rates[index], state.grad_norms[index], speed))
        self._count = total
        self._last = self._identity(state, total - 1) if total else ()
        return first, self._bytes(first)

    def all(self) -> bytes:
        """Every row so far."""
        return self._bytes(0)

    def _bytes(self, first: int) -> bytes:
        rows = self._rows[first * len(COLUMNS) :]
        if sys.byteorder == "big":
            rows.byteswap()
        return rows.tobytes()

    @staticmethod
    def _identity(state: RunState, index: int) -> tuple[float, ...]:
        """What tells an update from the same step made again after a resume; its duration never repeats to the last digit."""
        figures = (state.loss_steps[index], state.losses[index], state.grad_norms[index], state.step_seconds[index])
        return tuple(-1.0 if math.isnan(figure) else figure for figure in figures)


class RunPanel(anywidget.AnyWidget):  # type: ignore[misc]  # anywidget is not annotated well enough to be followed
    """One live run panel. ``on_command`` receives the names of the buttons pressed.

    ::

        panel = RunPanel(name=["chat-1", "Qwen3-8B · lora"], on_command=directory.send)
        panel.update(state, plan)
    """

    _esm = asset("parts.js", "run.js")
    _css = parts.css_variables() + asset("panel.css")

    name: traitlets.List[str] = traitlets.List([], help="The run's name; its model and method.").tag(sync=True)
    head = traitlets.Dict({}).tag(sync=True)
    figures = traitlets.Dict({}).tag(sync=True)
    curve = traitlets.Dict({}).tag(sync=True)
    memory = traitlets.Dict({}).tag(sync=True)
    samples: traitlets.List[dict[str, str]] = traitlets.List([]).tag(sync=True)
    notes: traitlets.List[dict[str, str]] = traitlets.List([]).tag(sync=True)
    ack = traitlets.Dict({}).tag(sync=True)
    history = traitlets.Bytes(b"", help="All rows; filled only when a page asks for the whole state (opening, reload).").tag(sync=True)

    def __init__(self, *, name: list[str] | None = None, on_command: Callable[[str], Any] | None = None) -> None:
        self._history = History()
        self._guard = threading.RLock()  # the refreshing thread and the thread of the page's messages
        self._on_command = on_command or (lambda _command: None)
        empty = RunState()
        super().__init__(name=name or [], head=facts.head(empty), figures=facts.figures(empty), curve=facts.curve(empty), memory=facts.memory(empty, {}))
        self.on_msg(self._receive)
        hear_every_page(self.comm)

    def update(self, state: RunState, plan: dict[str, Any]) -> None:
        """Shows ``state``: new rows as one binary message, the rest as whatever traits differ."""
        with self._guard:
            first, rows = self._history.take(state)
            if rows or (first == 0 and self.head.get("rows")):
                self.send({"kind": "rows", "from": first}, buffers=[rows])
            memory = facts.memory(state, plan)
            with self.hold_sync():
                self.head = {**facts.head(state), "rows": len(self._history), "samples": len(state.samples), "notes": len(state.messages)}
                self.figures = {**facts.figures(state), "exact_match_count": facts.exact_match_count(state)}
                self.curve = facts.curve(state)
                self.memory = {**memory, "words": facts.memory_words(memory), "figures": facts.memory_figures(memory)}
                self.samples = facts.samples(state)
                self.notes = facts.notes(state)

    def acknowledge(self, text: str, waiting: list[str]) -> None:
        """Tells the page what became of a button; ``waiting`` names the commands the worker has not carried out yet."""
        with self._guard:
            self.ack = {"text": parts.one_line(text), "waiting": waiting, "count": self.ack.get("count", 0)}

    def get_state(self, key: Any = None, drop_defaults: bool = False) -> Any:
        """The traits for a page; the whole state carries the whole history, so that a reloaded page draws the full curve."""
        if key is None or key == "history" or (not isinstance(key, str) and "history" in key):
            with self._guard:
                self._trait_values["history"] = self._history.all()
        return super().get_state(key=key, drop_defaults=drop_defaults)

    def _receive(self, _widget: Any, content: Any, _buffers: Any) -> None:
        """A message of the page: a button, or a page that came late and wants all rows."""
        command = content.get("command") if isinstance(content, dict) else None
        if command == "history":
            with self._guard:
                self.send({"kind": "rows", "from": 0}, buffers=[self._history.all()])
        elif isinstance(command, str):
            with self._guard:
                self.ack = {**self.ack, "count": self.ack.get("count", 0) + 1}
            self._on_command(command)
