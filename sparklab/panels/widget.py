"""The live panel's widget: traits the page reads, binary rows for the curves, and the buttons' way back.

It knows nothing of directories and threads; :mod:`sparklab.panels.run_panel` feeds it. Importing this module loads anywidget.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import anywidget
import traitlets

from sparklab.panels import facts, parts
from sparklab.panels.memory_facts import latest, memory
from sparklab.panels.series import Series
from sparklab.run.state import RunState
from sparklab.units import NA, is_na

MOST_PAGES: Final = 16
"""Pages remembered; one that closed without a word must not be remembered for ever."""
MOST_PROMPTS, LONGEST_PROMPT = 8, 4000

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


class RunPanel(anywidget.AnyWidget):  # type: ignore[misc]  # anywidget is not annotated well enough to be followed
    """One live run panel. ``on_command`` receives the names of the buttons pressed and what came with them; ``series`` is where its curves begin.

    With a ``home`` it takes the place of the element of that class, in every page; without one it is shown where it is displayed.

    ::

        panel = RunPanel(name=["chat-1", "Qwen3-8B · lora"], on_command=lambda command, details: directory.send(command, **details))
        panel.update(state, plan)
    """

    _esm = asset("parts.js", "charts.js", "run.js")
    _css = parts.css_variables() + asset("panel.css")

    home = traitlets.Unicode("", help="Class of the element whose place the panel takes.").tag(sync=True)
    name: traitlets.List[str] = traitlets.List([], help="The run's name; its model and method.").tag(sync=True)
    prompts = traitlets.Bool(True, help="Whether the recipe has prompts of its own to sample.").tag(sync=True)
    clip = traitlets.Float(None, allow_none=True, help="The clip line of the gradient norm.").tag(sync=True)
    head = traitlets.Dict({}).tag(sync=True)
    figures = traitlets.Dict({}).tag(sync=True)
    curve = traitlets.Dict({}).tag(sync=True)
    memory = traitlets.Dict({}).tag(sync=True)
    samples = traitlets.Dict({}).tag(sync=True)
    notes: traitlets.List[dict[str, str]] = traitlets.List([]).tag(sync=True)
    ack = traitlets.Dict({}).tag(sync=True)
    history = traitlets.Bytes(b"", help="All rows; filled only when a page asks for the whole state (opening, reload).").tag(sync=True)

    def __init__(
        self,
        *,
        name: list[str] | None = None,
        home: str = "",
        clip: float = NA,
        prompts: bool = True,
        on_command: Callable[[str, dict[str, Any]], Any] | None = None,
        on_seen: Callable[[], Any] | None = None,
        series: Series | None = None,
    ) -> None:
        self.series = Series() if series is None else series
        self._guard = threading.RLock()  # the refreshing thread and the thread of the page's messages
        self._on_command = on_command or (lambda _command, _details: None)
        self._on_seen = on_seen or (lambda: None)
        self._pages: dict[str, bool] = {}
        self._told: dict[str, Any] = {}
        empty = RunState()
        super().__init__(
            name=name or [], home=home, clip=None if is_na(clip) else clip, prompts=prompts, head=facts.head(empty), figures=facts.figures(empty),
            curve=facts.curve(empty), memory=memory(empty, {}), samples=facts.samples(empty),
        )  # fmt: skip
        self.on_msg(self._receive)
        hear_every_page(self.comm)

    @property
    def watched(self) -> bool:
        """False while every page that shows the panel has it out of sight: then nothing is sent."""
        return not self._pages or any(self._pages.values())

    def update(self, state: RunState, plan: dict[str, Any]) -> None:
        """Shows ``state``: new rows as one binary message, the rest as whatever traits differ."""
        with self._guard:
            if not self.watched and not state.is_over:
                return
            before = self.series.updates
            first, rows = self.series.take(state)
            if rows or (first == 0 and before):
                self.send({"kind": "rows", "from": first, "stride": self.series.stride}, buffers=[rows])
            clip = NA if self.clip is None else self.clip
            with self.hold_sync():
                self.head = {
                    **facts.head(state),
                    "rows": len(self.series),
                    "updates": self.series.updates,
                    "stride": self.series.stride,
                    "notes": state.messages_told,
                }
                self.figures = {**facts.figures(state, plan, clip, self.series), "badge": facts.badge(self.series)}
                self.curve = facts.curve(state)
                if self._changed("memory", (latest(state).get("time"), str(state.peak_bytes), state.is_over)):
                    self.memory = memory(state, plan)
                if self._changed("samples", (state.samples_told, facts.seen_last(state.samples))):
                    self.samples = facts.samples(state)
                if self._changed("notes", state.messages_told):
                    self.notes = facts.notes(state)

    def _changed(self, name: str, mark: Any) -> bool:
        """Whether something is not what it was when last asked; the words of what did not change are not made again."""
        before, self._told[name] = self._told.get(name), mark
        return bool(before != mark)

    def acknowledge(self, text: str, waiting: list[str]) -> None:
        """Tells the page what became of a button; ``waiting`` names the commands the worker has not carried out yet."""
        with self._guard:
            self.ack = {"text": parts.one_line(text), "waiting": waiting, "count": self.ack.get("count", 0)}

    def get_state(self, key: Any = None, drop_defaults: bool = False) -> Any:
        """The traits for a page; the whole state carries the whole history, so that a reloaded page draws the full curve."""
        if key is None or key == "history" or (not isinstance(key, str) and "history" in key):
            with self._guard:
                self._trait_values["history"] = self.series.all()
        return super().get_state(key=key, drop_defaults=drop_defaults)

    def _receive(self, _widget: Any, content: Any, _buffers: Any) -> None:
        """A message of the page: a button, a page that came late and wants all rows, or one that went out of sight or came back."""
        command = content.get("command") if isinstance(content, dict) else None
        if command == "history":
            with self._guard:
                self.send({"kind": "rows", "from": 0, "stride": self.series.stride}, buffers=[self.series.all()])
        elif command == "seen":
            with self._guard:
                page = parts.one_line(content.get("page"), 40)
                self._pages.pop(page, None)
                self._pages = {**dict(list(self._pages.items())[1 - MOST_PAGES :]), page: bool(content.get("seen"))}
            if content.get("seen"):
                self._on_seen()
        elif isinstance(command, str):
            with self._guard:
                self.ack = {**self.ack, "count": self.ack.get("count", 0) + 1}
            self._on_command(command, _details(content))


def _details(content: dict[str, Any]) -> dict[str, Any]:
    """What may come with a command: the prompts to sample, the learning rate to change to."""
    prompts = content.get("prompts")
    kept = [prompt[:LONGEST_PROMPT] for prompt in prompts[:MOST_PROMPTS] if isinstance(prompt, str) and prompt.strip()] if isinstance(prompts, list) else []
    rate = content.get("learning_rate")
    told = {"learning_rate": float(rate)} if isinstance(rate, (int, float)) and not isinstance(rate, bool) and 0 < rate < 1e9 else {}
    return {**({"prompts": kept} if kept else {}), **told}
