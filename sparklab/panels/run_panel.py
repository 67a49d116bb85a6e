"""The live run panel in a notebook: a widget fed from the run directory, replaced by its static twin when the run is over."""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING, Any, Final

from sparklab.errors import SparklabError
from sparklab.panels import facts, terminal, twin
from sparklab.panels.watch import Watch
from sparklab.run.directory import RunDirectory
from sparklab.run.state import RunState

if TYPE_CHECKING:
    from sparklab.panels.widget import RunPanel

BUSY_SECONDS: Final = 0.2
"""Between two looks while events come: as fast as an eye wants, far below what a kernel feels."""
IDLE_SECONDS: Final = 1.0
"""Between two looks while nothing comes; the clock still ticks."""

ASKED: Final = {"stop": "Stopping…", "pause": "Pausing…", "resume": "Resuming…", "checkpoint": "Saving a checkpoint…", "sample": "Sampling…"}


def show(directory: RunDirectory, *, starting: bool = False) -> LivePanel | None:
    """Shows a run in the notebook's output and keeps it up to date from a thread of its own; None outside a Jupyter kernel.

    A run that is over is shown as its static twin at once, unless ``starting`` says that a worker is on its way to it (a resume).

    ::

        panel = show(RunDirectory("runs/chat-1"))
    """
    if not in_kernel():
        return None
    panel = LivePanel(directory, starting=starting)
    panel.display()
    return panel


def in_kernel() -> bool:
    """True where this code runs in a Jupyter kernel; never imports IPython where nobody else did."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None


class Requests:
    """The buttons pressed and not yet answered by the worker."""

    def __init__(self, directory: RunDirectory) -> None:
        self._directory = directory
        self._waiting: dict[str, int] = {}
        self.text = ""

    @property
    def waiting(self) -> list[str]:
        return list(self._waiting)

    def ask(self, command: str, state: RunState) -> None:
        """Leaves the command for the worker; what could not be left is said."""
        if command not in ASKED:
            return
        try:
            self._directory.send(command)
        except (OSError, SparklabError) as error:
            self.text = f"{command} could not be asked for: {error}"
            return
        self._waiting[command] = len(state.messages)
        self.text = ASKED[command]

    def settle(self, state: RunState) -> bool:
        """Looks for the worker's answers; True where something changed."""
        answered = False
        for command, seen in list(self._waiting.items()):
            reply = next((note["text"] for note in state.messages[seen:] if note["event"] == "command" and note["text"].startswith(f"{command}:")), None)
            if reply is not None or state.is_over:
                del self._waiting[command]
                self.text = "" if state.is_over else (reply or "")
                answered = True
        return answered


class LivePanel:
    """One panel in one output: :meth:`display` starts it, :meth:`freeze` leaves the static twin behind.

    The thread is a daemon and ends with the run; the run itself lives in another process and does not notice.
    """

    def __init__(self, directory: RunDirectory, *, starting: bool = False) -> None:
        self.directory = directory
        self.widget: RunPanel | None = None
        self._watch = Watch(directory, starting=starting)
        self._plan = directory.plan
        self._title = facts.title(directory)
        self._requests = Requests(directory)
        self._lock = threading.RLock()
        self._done = threading.Event()
        self._handle: Any = None
        self._thread: threading.Thread | None = None

    def display(self) -> None:
        """Puts the panel into the current output."""
        from IPython.display import display  # noqa: PLC0415 - only a kernel has it

        state = self._watch.refresh()
        if self._watch.over:
            self._done.set()
            self._handle = display(self._twin(), raw=True, display_id=True)
            return
        from sparklab.panels.widget import RunPanel  # noqa: PLC0415 - ipywidgets loads when a widget is made, not before

        self.widget = RunPanel(name=list(self._title), on_command=self.command)
        self.widget.update(state, self._plan)
        view = {"version_major": 2, "version_minor": 0, "model_id": self.widget.model_id}
        text = f"sparklab run {self._title[0]}: the live panel stands here; without it: sparklab watch {self.directory.path}"
        self._handle = display({"text/plain": text, "application/vnd.jupyter.widget-view+json": view}, raw=True, display_id=True)
        self._thread = threading.Thread(target=self._follow, name=f"sparklab-panel-{self._title[0]}", daemon=True)
        self._thread.start()

    def command(self, name: str) -> None:
        """What a button does: asks the worker and says so at once."""
        with self._lock:
            self._requests.ask(name, self._watch.state)
            self._acknowledge()

    def refresh(self) -> bool:
        """Takes in what the run wrote since the last look; True where that was something."""
        with self._lock:
            before = self._watch.state.last_time
            state = self._watch.refresh()
            if self.widget is not None:
                self.widget.update(state, self._plan)
            if self._requests.settle(state):
                self._acknowledge()
            return state.last_time != before

    def freeze(self) -> None:
        """Replaces the live panel by its static twin, as the run stands now. Safe to call twice.

        A second call is not idle: nbclient takes an update only while a cell runs, so :meth:`Run.wait` repeats what the thread did.
        """
        self._done.set()
        with self._lock:
            if self.widget is not None:
                self.refresh()
            if self._handle is not None:
                self._handle.update(self._twin(), raw=True)

    def join(self, timeout_seconds: float | None = None) -> bool:
        """Waits for the panel's thread; True when it has ended."""
        if self._thread is not None:
            self._thread.join(timeout_seconds)
        return self._thread is None or not self._thread.is_alive()

    def _acknowledge(self) -> None:
        if self.widget is not None:
            self.widget.acknowledge(self._requests.text, self._requests.waiting)

    def _twin(self) -> dict[str, str]:
        state = self._watch.state
        text = f"sparklab run {self._title[0]}\n{terminal.summary(state, self._plan)}"
        return {"text/plain": text, "text/html": twin.run_html(state, self._plan, *self._title)}

    def _follow(self) -> None:
        """The thread: looks, rests, and leaves the twin when nothing more will come."""
        pause = BUSY_SECONDS
        while not self._done.wait(pause):
            pause = BUSY_SECONDS if self.refresh() else min(IDLE_SECONDS, pause * 1.5)
            if self._watch.over:
                self.freeze()
