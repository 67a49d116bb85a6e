"""``events.jsonl``: the append-only diary of a run, one JSON object a line, and the only thing a panel needs to draw it.

Every event has ``event`` (its kind), ``seq`` (its number, counting from 0 through every resume) and ``time`` (Unix seconds). By kind:

=============  ==========================================================================================================
started        pid, host, device, dtype, method, resumed_from (step or null), soft_floor_bytes, hard_floor_bytes (null: no guard)
phase          phase: load | prepare | evaluate | train | sample | save | paused; seconds-long, so panels can say what is going on; detail in words
data           the data report's figures (records, tokens, supervised_tokens, fill ...)
model          parameters, trainable_parameters
step           step, steps, epoch, loss (mean over supervised tokens), learning_rate, grad_norm, tokens (non-pad), seconds,
               wait_seconds (of these, for its rows)
eval           step, loss, tokens; with answers: exact_match (0 to 1), n
sample         step, prompt, text
memory         process_bytes, peak_bytes, available_bytes, total_bytes, free_bytes, cached_bytes, swap_used_bytes, pressure_percent,
               and on CUDA allocated_bytes, reserved_bytes; where known others (name to bytes), watts, floor_bytes (of the guard)
checkpoint     step, path (inside the run), bytes
command        name, id, detail: a command was carried out (or refused)
warning        message; kind: "guard" with numbers (what it saw), "nonfinite" with step, rows, lines of the data (an update that was not made)
stopped        step, reason; by ("guard") and fix where somebody else than the user asked
failed         step, error, fact, fix
finished       step, seconds, tokens, tokens_per_second (non-pad), peak_bytes
=============  ==========================================================================================================
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from sparklab.errors import RunError
from sparklab.units import jsonable

Event = dict[str, Any]

TERMINAL = frozenset({"stopped", "failed", "finished"})
KINDS = TERMINAL | {"started", "phase", "data", "model", "step", "eval", "sample", "memory", "checkpoint", "command", "warning"}


class EventWriter:
    """Appends events to a file; each line reaches the operating system whole, terminal events and checkpoints reach the disk.

    A torn last line (a crash in mid-write) is cut off on opening, so that numbering goes on from the last good event.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "ab+", buffering=0)  # noqa: SIM115 - closed by close(), lives as long as the worker
        try:
            self._next = self._mend()
        except BaseException:
            self._file.close()
            raise

    def _mend(self) -> int:
        """Cuts a torn last line off; returns the number of the next event."""
        self._file.seek(0)
        content = self._file.read()
        end = content.rfind(b"\n") + 1
        if end != len(content):
            self._file.truncate(end)
        lines = content[:end].splitlines()
        try:
            return int(json.loads(lines[-1])["seq"]) + 1 if lines else 0
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{self._file.name} is damaged: its last line is not an event", "start the run anew in another directory") from error

    def write(self, event: str, **fields: Any) -> Event:
        """Writes one event and returns it. OSError (a full disk) reaches the caller."""
        assert event in KINDS, event
        record: Event = {"event": event, "seq": self._next, "time": round(time.time(), 3), **jsonable(fields)}
        line = json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "backslashreplace") + b"\n"
        written = self._file.write(line)
        if written != len(line):  # a full disk may take a part: take it back rather than leave a torn line in the middle
            self._file.truncate(self._file.seek(0, os.SEEK_END) - (written or 0))
            raise OSError(28, "No space left on device", self._file.name)
        self._next += 1
        if event in TERMINAL or event == "checkpoint":
            os.fsync(self._file.fileno())
        return record

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def __enter__(self) -> EventWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class EventReader:
    """Reads a growing events file from where it last stopped; a half-written last line waits for its end.

    Lines that are not events (a damaged or hostile file) are counted in ``bad_lines`` and passed over.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bad_lines = 0
        self._offset = 0

    def read_new(self) -> Iterator[Event]:
        """The events that came since the last call; none where the file does not exist yet."""
        try:
            with open(self.path, "rb") as file:
                file.seek(self._offset)
                content = file.read()
        except FileNotFoundError:
            return
        end = content.rfind(b"\n") + 1
        self._offset += end
        for line in content[:end].splitlines():
            try:
                record = json.loads(line)
                if not isinstance(record, dict) or record.get("event") not in KINDS:
                    raise ValueError("not an event")
            except (ValueError, TypeError, RecursionError):
                self.bad_lines += 1
                continue
            yield record
