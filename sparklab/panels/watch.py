"""A run watched from outside: its state, and whether anything more will come."""

from __future__ import annotations

import dataclasses
import time
from typing import Final

from sparklab.run.directory import RunDirectory
from sparklab.run.state import RunState
from sparklab.units import is_na

PATIENCE_SECONDS: Final = 60.0
"""How long a run may lie without a worker before it counts as lost or over: a cold start of Python and torch takes some of it."""


class Watch:
    """Follows one run directory; :attr:`over` is True once no worker will add to it.

    A run is not over merely because its last word is old: a worker that holds the lock is about to say something new. ``starting`` promises
    a worker that does not hold the lock yet, to a run that ended before.
    """

    def __init__(self, directory: RunDirectory, *, starting: bool = False) -> None:
        self.directory = directory
        self.over = False
        self.state = RunState()
        """The run as of the last :meth:`refresh`."""
        self._follower = directory.follow()
        self._wait_until = time.monotonic() + PATIENCE_SECONDS if starting else 0.0
        self._first_time: float | None = None

    def refresh(self) -> RunState:
        """The state as of now."""
        state = self._follower.refresh()
        alive = self.directory.is_alive
        if self._first_time is None:
            self._first_time = state.last_time
        elif alive or (state.last_time != self._first_time and not is_na(state.last_time)):
            self._wait_until = 0.0  # the promised worker came
        awaited = time.monotonic() < self._wait_until or self._just_created(state)
        self.over = state.is_over and not alive and not awaited
        if state.is_over and not self.over and (awaited or state.status == "lost"):
            state = dataclasses.replace(state, status="starting", phase="start", reason="", fix="")  # shares the series: costs nothing
        self.state = state
        return state

    def _just_created(self, state: RunState) -> bool:
        """True before the first event of a young run: its worker is still on the way to the lock."""
        if not is_na(state.last_time):
            return False
        try:
            return time.time() - self.directory.events_path.stat().st_mtime < PATIENCE_SECONDS
        except OSError:
            return False
