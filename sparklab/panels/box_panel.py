"""The box, live: the one pool of memory, who holds it, and how hard it is pressed."""

from __future__ import annotations

import shutil
import threading
import time
from collections import deque
from collections.abc import Mapping
from typing import Any, Final, TextIO

from sparklab.box import Box
from sparklab.box.detect import run_command
from sparklab.box.doctor import Examination, Finding, Machine
from sparklab.box.others import device_sizes
from sparklab.box.pool import Pool, read_pool
from sparklab.panels import box_view
from sparklab.panels.resident import Watcher
from sparklab.units import gib

DEVICE_SECONDS: Final = 10.0
"""Between two questions to nvidia-smi, each of which takes a tenth of a second."""


def monitor() -> BoxPanel:
    """The memory of this machine, live: what holds it, what can be had back, how hard it is pressed, and what to do about it.

    In a notebook a panel that keeps itself up to date while somebody looks; printed, how it stands now.

    ::

        sl.monitor()
    """
    return BoxPanel(Box.detect())


def follow(panel: BoxPanel, stream: TextIO, every_seconds: float = 1.0) -> None:
    """Draws the panel on a terminal, in place, until KeyboardInterrupt reaches the caller."""
    lines = 0
    while True:
        text = str(panel)
        stream.write((f"\x1b[{lines}F" if lines else "") + "".join(f"\x1b[2K{line}\n" for line in text.splitlines()) + "\x1b[J")
        stream.flush()
        lines = len(text.splitlines())
        time.sleep(every_seconds)


class BoxPanel(Watcher):
    """The panel of one box; :attr:`pool` is what it holds now."""

    kind = "box"

    def __init__(self, box: Box) -> None:
        super().__init__()
        self.box = box
        self._on_device: Mapping[int, float] = {}
        self._device_due = float("-inf")
        self._trail: deque[float] = deque(maxlen=box_view.TRAIL)
        self._findings: list[Finding] = []

    @property
    def pool(self) -> Pool:
        """The pool, looked at now."""
        if self.box.is_gpu and self.box.unified and time.monotonic() >= self._device_due:
            self._on_device, self._device_due = device_sizes(run_command), time.monotonic() + DEVICE_SECONDS
        return read_pool(self.box.reserve_bytes, on_device=self._on_device, unified=self.box.is_gpu and self.box.unified)

    def to_dict(self) -> dict[str, Any]:
        """The pool in bytes, for JSON."""
        return {"chip": self.box.chip, "unified": self.box.unified, **self.pool.to_dict()}

    def __repr__(self) -> str:
        level, reason = self.pool.pressure
        return f"<BoxPanel: {level}, {reason}>"

    def __str__(self) -> str:
        return box_view.text(self._look(), shutil.get_terminal_size((80, 24)).columns - 1)

    def _look(self) -> dict[str, Any]:
        pool = self.pool
        self._trail.append(gib(pool.memory.available_bytes))
        return box_view.view(self.box, pool, self._trail, self._findings)

    def _twin(self) -> str:
        return box_view.twin_html(self._look(), self._home)

    def _make_widget(self) -> Any:
        from sparklab.panels.resident_widgets import BoxWidget  # noqa: PLC0415 - ipywidgets loads when a widget is made, not before

        return BoxWidget(home=self._home, view=self._look())

    def _tick(self) -> bool:
        self.widget.view = self._look()
        return True

    def _start(self) -> None:
        super()._start()
        threading.Thread(target=self._examine, name="sparklab-doctor", daemon=True).start()

    def _examine(self) -> None:
        """What the doctor would have mended; it asks torch in a process of its own, which takes seconds."""
        self._findings = [finding for finding in Examination(Machine()).findings() if finding.level in ("warning", "fault")]
