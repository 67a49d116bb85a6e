"""A panel that lives where its picture stands: what lies in the notebook's output is the static twin, always.

Where a kernel stands behind the notebook, a widget without a view of its own finds the twin by its class and puts the live panel in its place
(``dwell`` in assets/parts.js), also after a reload of the page. When the kernel is gone, the twin is what is left.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import uuid
from typing import Any, Final


def in_kernel() -> bool:
    """True where this code runs in a Jupyter kernel; never imports IPython where nobody else did."""
    return getattr(_shell(), "kernel", None) is not None


def shows_widgets_apart() -> bool:
    """True where a page puts every output in a frame of its own, so that no widget finds its twin: VS Code and Colab."""
    if "google.colab" in sys.modules:
        return True
    in_vscode = "__vsc_ipynb_file__" in getattr(_shell(), "user_ns", {})
    return in_vscode or ("VSCODE_PID" in os.environ and "JPY_SESSION_NAME" not in os.environ)


def in_marimo() -> bool:
    """True where this code runs in a marimo notebook; never imports marimo where nobody else did."""
    marimo = sys.modules.get("marimo")
    return marimo is not None and bool(marimo.running_in_notebook())


def _shell() -> Any:
    ipython = sys.modules.get("IPython")
    return ipython.get_ipython() if ipython is not None else None


LOOKING_SECONDS: Final = 12.0
"""How long a page that said it looks is believed; it says so every five seconds, and a browser slows the clocks of a page in the background."""


class _Html:
    """A piece of HTML for a front end that asks for it."""

    def __init__(self, content: str) -> None:
        self._content = content

    def _repr_html_(self) -> str:
        return self._content


class Resident:
    """Shows itself in a notebook. Who inherits says what the twin is and makes the widget.

    A widget must know its ``home``: the class of the element whose place it takes.
    """

    kind = "panel"
    """What the home is called after."""

    def __init__(self) -> None:
        self._guard = threading.RLock()  # the page's messages come on a thread of their own
        self._home = ""
        self._apart = False
        """The widget shows itself, and no twin stands in the output."""
        self._handle: Any = None
        self.widget: Any = None

    def _twin(self) -> str:
        """The panel as it stands, without script and style sheet, inside ``<div class="sparklab-twin HOME">``."""
        raise AssertionError("who inherits says what the twin is")

    def _make_widget(self) -> Any:
        """The widget for this panel's ``_home``; None where the twin says all there is to say."""
        raise AssertionError("who inherits makes the widget")

    def _start(self) -> None:
        """What goes on once the widget is there."""

    def _repr_html_(self) -> str:
        return self._twin()

    def _ipython_display_(self) -> None:
        self.display()

    def _display_(self) -> Any:
        """What marimo shows: the widget itself, since there an output is no place that a kernel could come back to."""
        self._apart = True
        self.widget = self._make_widget()
        if self.widget is None:
            return _Html(self._twin())
        self._start()
        return self.widget

    def display(self) -> None:
        """Puts the panel into the current output."""
        from IPython.display import display  # noqa: PLC0415 - only a kernel has it

        if self.widget is not None:  # shown a second time: it moves there, and leaves its picture behind
            self._keep()
            self.widget.close()
            self.widget = None
        self._apart = in_kernel() and shows_widgets_apart()
        self._home = "" if self._apart else f"sparklab-{self.kind}-{uuid.uuid4().hex}"
        if not self._apart:
            self._handle = display(self._bundle(), raw=True, display_id=True)
        self.widget = self._make_widget() if in_kernel() else None
        if self._apart:
            view = {"version_major": 2, "version_minor": 0, "model_id": self.widget.model_id} if self.widget is not None else {}
            data = {"text/plain": str(self), "application/vnd.jupyter.widget-view+json": view} if view else self._bundle()
            self._handle = display(data, raw=True, display_id=True)
        if self.widget is not None:
            self._start()

    def _bundle(self) -> dict[str, str]:
        return {"text/plain": str(self), "text/html": self._twin()}

    def _keep(self, *, last: bool = False) -> None:
        """Brings the twin in the notebook's output up to date; ``last``: also where the widget stands there itself, which then goes."""
        with self._guard:
            if self._handle is not None and (last or not self._apart):
                self._handle.update(self._bundle(), raw=True)


class Watcher(Resident):
    """A resident that keeps itself up to date from a thread, and only while a page looks at it: a hidden tab costs nothing.

    A page that sees the panel says so every few seconds (``lookAt`` in assets/parts.js).
    """

    every_seconds = 1.0
    """Between two looks."""

    def __init__(self) -> None:
        super().__init__()
        self._looked_at = threading.Event()
        self._seen_at = float("-inf")
        self._thread: threading.Thread | None = None

    def _tick(self) -> bool:
        """Brings the widget up to date; False where nothing more will come."""
        raise AssertionError("who inherits says what there is to look at")

    def _start(self) -> None:
        self.widget.on_msg(self._hear)
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._follow, name=f"sparklab-{self.kind}", daemon=True)
            self._thread.start()

    def _hear(self, _widget: Any, content: Any, _buffers: Any) -> None:
        if isinstance(content, dict) and content.get("looking"):
            self._seen_at = time.monotonic()
            self._looked_at.set()

    def _follow(self) -> None:
        """The thread: sleeps until a page looks, ticks while it does, and leaves the newest twin behind when it looks away."""
        going = True
        while going:
            self._looked_at.wait()
            with self._guard:
                going = self._tick()
            if time.monotonic() - self._seen_at > LOOKING_SECONDS:
                self._looked_at.clear()
                self._keep()
            time.sleep(self.every_seconds)
        self._keep()
