"""The live run panel in a notebook: it stands where its static twin stands, is fed from the run directory, and leaves the twin when the run is over.

The twin in the output is brought up to date as the run goes on, so that a reload without a kernel, a stranger's view or a crash shows how far it
was. Front ends that cannot put a panel in its twin's place (VS Code, Colab) show the widget itself, and get the twin at the end.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any, Final

from sparklab.errors import SparklabError
from sparklab.panels import facts, terminal, twin
from sparklab.panels.resident import Resident, in_kernel
from sparklab.panels.series import Series
from sparklab.panels.watch import Watch
from sparklab.run.directory import RunDirectory
from sparklab.run.state import RunState

if TYPE_CHECKING:
    from sparklab.panels.widget import RunPanel

BUSY_SECONDS: Final = 0.25
"""Between two looks while events come: as fast as an eye wants, far below what a kernel feels."""
IDLE_SECONDS: Final = 1.0
"""Between two looks while nothing comes; the clock still ticks."""
UNSEEN_SECONDS: Final = 5.0
"""Between two looks while no page shows the panel."""
KEEP_SECONDS: Final = 20.0
"""Between two pictures of a run that goes on."""
UNSEEN_KEEP_SECONDS: Final = 600.0
"""Between two while no page shows the panel: each is drawn, sent, checked and put into the page, which is all that a hidden tab would cost."""
SHARE: Final = 0.006
"""Of a core, at most, for looking on: whoever is slow looks less often. Sending takes half as much again on the kernel's own threads."""

ASKED: Final = {
    "stop": "Stopping…",
    "pause": "Pausing…",
    "resume": "Resuming…",
    "checkpoint": "Saving a checkpoint…",
    "sample": "Sampling…",
    "evaluate": "Evaluating…",
    "learning_rate": "Changing the learning rate…",
}


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


class Requests:
    """The buttons pressed and not yet answered by the worker."""

    def __init__(self, directory: RunDirectory) -> None:
        self._directory = directory
        self._waiting: dict[str, int] = {}
        self.text = ""

    @property
    def waiting(self) -> list[str]:
        return list(self._waiting)

    def ask(self, command: str, state: RunState, details: dict[str, Any] | None = None) -> None:
        """Leaves the command for the worker; what could not be left is said."""
        if command not in ASKED:
            return
        try:
            self._directory.send(command, **(details or {}))
        except (OSError, SparklabError) as error:
            self.text = f"{command} could not be asked for: {error}"
            return
        self._waiting[command] = state.messages_told
        self.text = ASKED[command]

    def settle(self, state: RunState) -> bool:
        """Looks for the worker's answers; True where something changed."""
        answered = False
        for command, seen in list(self._waiting.items()):
            reply = next((note["text"] for note in state.messages_since(seen) if note["event"] == "command" and note["text"].startswith(f"{command}:")), None)
            if reply is not None or state.is_over:
                del self._waiting[command]
                self.text = "" if state.is_over else (reply or "")
                answered = True
        return answered


class LivePanel(Resident):
    """One panel in one output: :meth:`display` starts it, :meth:`freeze` leaves the static twin behind.

    The thread is a daemon and ends with the run; the run itself lives in another process and does not notice.
    """

    kind = "run"

    def __init__(self, directory: RunDirectory, *, starting: bool = False) -> None:
        super().__init__()
        self.directory = directory
        self.widget: RunPanel | None = None
        self._watch = Watch(directory, starting=starting)
        self._plan = directory.plan
        self._title = facts.title(directory)
        self._clip = facts.clip_norm(directory)
        self._requests = Requests(directory)
        self._pictured = Series()
        self._done = threading.Event()
        self._wake = threading.Event()
        self._kept_at, self._keep_every = time.monotonic(), KEEP_SECONDS
        self._thread: threading.Thread | None = None
        self._watch.refresh()  # the first picture is drawn before there is a widget

    def _make_widget(self) -> RunPanel | None:
        state = self._watch.refresh()
        if self._watch.over:
            self._done.set()
            return None
        from sparklab.panels.widget import RunPanel  # noqa: PLC0415 - ipywidgets loads when a widget is made, not before

        prompts = facts.has_prompts(self.directory)
        widget = RunPanel(
            name=list(self._title), home=self._home, clip=self._clip, prompts=prompts, on_command=self.command, on_seen=self._wake.set,
            series=self._pictured.copy(),
        )  # fmt: skip
        widget.update(state, self._plan)
        return widget

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._follow, name=f"sparklab-panel-{self._title[0]}", daemon=True)
        self._thread.start()

    def command(self, name: str, details: dict[str, Any] | None = None) -> None:
        """What a button does: asks the worker and says so at once."""
        with self._guard:
            self._requests.ask(name, self._watch.state, details)
            self._acknowledge()
        self._wake.set()

    def refresh(self) -> bool:
        """Takes in what the run wrote since the last look; True where that was something."""
        with self._guard:
            before = self._watch.state.last_time
            state = self._watch.refresh()
            if self.widget is not None:
                self.widget.update(state, self._plan)
            if self._requests.settle(state):
                self._acknowledge()
            return state.last_time != before

    def tick(self) -> None:
        """Moves the panel from the thread that runs cells, where the front end takes nothing from another (Colab, VS Code)."""
        if self._apart:
            self.refresh()

    def freeze(self) -> None:
        """Replaces the live panel by its static twin, as the run stands now. Safe to call twice.

        A second call is not idle: nbclient takes an update only while a cell runs, so :meth:`Run.wait` repeats what the thread did.
        """
        self._done.set()
        self._wake.set()
        with self._guard:
            if self.widget is not None:
                self.refresh()
            self._home = ""  # nothing takes this picture's place any more
            self._keep(last=True)

    def join(self, timeout_seconds: float | None = None) -> bool:
        """Waits for the panel's thread; True when it has ended."""
        if self._thread is not None:
            self._thread.join(timeout_seconds)
        return self._thread is None or not self._thread.is_alive()

    def __str__(self) -> str:
        return f"sparklab run {self._title[0]}\n{terminal.summary(self._watch.state, self._plan, self._pictured)}"

    def _acknowledge(self) -> None:
        if self.widget is not None:
            self.widget.acknowledge(self._requests.text, self._requests.waiting)

    def _twin(self) -> str:
        reopen = f"sl.Run.open({str(self.directory.path)!r}).panel()"
        return twin.run_html(self._watch.state, self._plan, *self._title, clip=self._clip, home=self._home, reopen=reopen, series=self._pictured)

    def _follow(self) -> None:
        """The thread: looks, rests, keeps a picture now and then, and leaves the twin when nothing more will come."""
        pause, seen = BUSY_SECONDS, True
        while not self._done.is_set():
            self._wake.wait(pause)
            self._wake.clear()
            if self._done.is_set():
                return
            began = time.thread_time()
            news = self.refresh()
            cost = time.thread_time() - began
            if self._watch.over:
                self.freeze()
                return
            was, seen = seen, self.widget is None or self.widget.watched
            self._keep_now_and_then(seen, left=was and not seen)
            pause = max(BUSY_SECONDS if news and seen else min(IDLE_SECONDS if seen else UNSEEN_SECONDS, pause * 1.5), cost / SHARE)

    def _keep_now_and_then(self, seen: bool, left: bool) -> None:
        """A picture of the run as it is, for whoever finds the notebook without its kernel: one when the last page has ``left``, and others rarer where
        nobody looks or it takes long to draw.
        """
        every = self._keep_every if seen else max(self._keep_every, UNSEEN_KEEP_SECONDS)
        if self._apart or (time.monotonic() - self._kept_at < every and not left):
            return
        began = time.thread_time()
        self._keep()
        self._kept_at, self._keep_every = time.monotonic(), max(KEEP_SECONDS, (time.thread_time() - began) / (SHARE / 4))
