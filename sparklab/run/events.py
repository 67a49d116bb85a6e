"""``events.jsonl``: the append-only diary of a run, one JSON object a line, and the only thing a panel needs to draw it.

Every event has ``event`` (its kind), ``seq`` (its number in the file, counting from 0 through every resume, without a gap) and ``time``
(Unix seconds). The diary only grows: what a crash undid stays in it, and is told again. So step, eval, sample and finished also have ``nth``,
their number in the story that counts: a run that goes on from a checkpoint goes on with the number it had there, and of two events with the
same ``nth`` the later one is true. The story (:func:`story`) of a run that was interrupted is that of one that was not. By kind:

=============  ==========================================================================================================
started        pid, host, device, dtype, method, resumed_from (step or null), nth (of the story's next event), soft_floor_bytes, hard_floor_bytes
               (null: no guard)
phase          phase: load | prepare | evaluate | train | sample | save | paused; seconds-long, so panels can say what is going on; detail in words, share
data           the data report's figures (records, tokens, supervised, fill ...) and its warnings, in words
model          parameters, trainable_parameters
step           step, steps, epoch, loss (mean over supervised tokens), learning_rate, grad_norm, tokens (non-pad), seconds,
               wait_seconds (of these, for its rows)
eval           step, loss, tokens; with answers: exact_match (0 to 1), n
sample         step, prompt, text
memory         process_bytes (on a unified box with what it holds on the device), available_bytes, total_bytes, free_bytes, cached_bytes,
               swap_used_bytes, pressure_percent, held_bytes (what a plan speaks of, where that is not process_bytes but a GPU's own memory),
               peak_bytes (the most of it); on CUDA allocated_bytes, reserved_bytes (at most); where known others (name to bytes), watts,
               floor_bytes (of the guard);
               at most one a second, and one in ten seconds while nothing changes
checkpoint     step, path (inside the run), bytes, held_out_loss (null where it was not measured at this step)
command        name, id, refused, detail: a command was carried out, or refused (true), and why
learning_rate  step, learning_rate, was: from the next update on the schedule peaks at learning_rate; holds through every resume
retry          step, phase, row_tokens, was: memory ran out in that phase, and from the next update on no more than row_tokens tokens go
               through the model at once; the tokens of an update stay the same; holds through every resume
changed        what: {name: how it changed}: the run goes on with these, accepted by name
warning        message; kind: "guard" with numbers (what it saw), "nonfinite" with step, rows, lines of the data (an update that was not made);
               "stock": what runs on the libraries' own code and not on sparklab's, and why
stopped        step, reason; by ("guard") and fix where somebody else than the user asked
failed         step, error, fact, fix; out of memory also: phase, planned_bytes, measured_bytes, changes (of the recipe that would fit)
finished       step, seconds, tokens, tokens_per_second (non-pad), peak_bytes
=============  ==========================================================================================================
"""

from __future__ import annotations

import json
import math
import operator
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final

import orjson

from sparklab.errors import RunError
from sparklab.files import open_plain
from sparklab.units import KIB, MIB, jsonable

Event = dict[str, Any]

TERMINAL = frozenset({"stopped", "failed", "finished"})
STORY = frozenset({"step", "eval", "sample", "finished"})
STEERING = frozenset({"learning_rate", "retry"})
"""What was changed on the way and holds from then on."""
KINDS = TERMINAL | STORY | STEERING | {"started", "phase", "data", "model", "memory", "checkpoint", "command", "changed", "warning"}
_KIND = operator.itemgetter("event")
_LASTING = TERMINAL | STEERING | {"checkpoint", "changed"}

LONGEST_LINE: Final = MIB
"""Bytes of the longest line that is taken for an event."""
LONGEST_TEXT: Final = 20_000
"""Characters a text is cut to in an event whose line would be longer."""
_AT_ONCE: Final = 4 * MIB
_PARSED_AT_ONCE: Final = 256 * KIB  # a thousand lines: fewer cost more calls, more no longer fit into a core's cache
_TAIL: Final = 64 * KIB


class EventWriter:
    """Appends events to a file; each line reaches the operating system whole, what a resume builds on reaches the disk.

    A torn last line (a crash in mid-write) is cut off on opening, so that numbering goes on from the last good event.
    """

    def __init__(self, path: Path) -> None:
        self._file: IO[bytes] = open(open_plain(path, os.O_RDWR | os.O_CREAT | os.O_APPEND), "ab+", buffering=0)  # noqa: SIM115 - lives as long as the worker
        self.told = 0
        """``nth`` of the story's next event; a resume sets it to what its checkpoint says."""
        try:
            self._next = self._mend()
        except BaseException:
            self._file.close()
            raise

    def _mend(self) -> int:
        """Cuts a torn last line off; returns the number of the next event."""
        size = self._file.seek(0, os.SEEK_END)
        length = _TAIL
        while True:  # from the end backwards, until a whole line is in sight
            start = max(0, size - length)
            self._file.seek(start)
            tail = self._file.read(size - start)
            end = tail.rfind(b"\n") + 1
            lines = tail[:end].splitlines()
            if start == 0 or len(lines) > 1 or length > 2 * LONGEST_LINE:
                break
            length *= 4
        if end != len(tail):
            self._file.truncate(start + end)
            self._file.seek(0, os.SEEK_END)
        try:
            return int(json.loads(lines[-1])["seq"]) + 1 if lines else 0
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{self._file.name} is damaged: its last line is not an event", "start the run anew in another directory") from error

    def write(self, event: str, **fields: Any) -> Event:
        """Writes one event and returns it. OSError (a full disk) reaches the caller, and then nothing of the event is in the file."""
        assert event in KINDS, event
        record: Event = {"event": event, "seq": self._next, "time": round(time.time(), 3)}
        if event in STORY:
            record["nth"] = self.told
        record |= jsonable(fields)
        line = _line(record)
        if len(line) > LONGEST_LINE:
            record = {name: value[:LONGEST_TEXT] + "…" if isinstance(value, str) and len(value) > LONGEST_TEXT else value for name, value in record.items()}
            line = _line(record)
        written = self._file.write(line)
        if written != len(line):  # a full disk may take a part: take it back rather than leave a torn line in the middle
            self._file.truncate(self._file.seek(0, os.SEEK_END) - (written or 0))
            raise OSError(28, "No space left on device", self._file.name)
        self._next += 1
        self.told += event in STORY
        if event in _LASTING:
            os.fsync(self._file.fileno())
        return record

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def __enter__(self) -> EventWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _line(record: Event) -> bytes:
    return json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "backslashreplace") + b"\n"


class EventReader:
    """Reads a growing events file from where it last stopped; a half-written last line waits for its end.

    Lines that are not events (a damaged or hostile file) are counted in ``bad_lines`` and passed over, however long they are.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bad_lines = 0
        self._offset = 0
        self._skipping = False  # in the middle of a line longer than any event

    def read_new(self) -> Iterator[Event]:
        """The events that came since the last call; none where the file does not exist yet. Holds a few MiB at a time."""
        for batch in self.read_batches():
            yield from batch

    def read_batches(self) -> Iterator[list[Event]]:
        """As :meth:`read_new`, some thousand at a time."""
        try:
            file = open(open_plain(self.path), "rb")  # noqa: SIM115 - closed below
        except OSError:
            return
        with file:
            while True:
                file.seek(self._offset)
                content = file.read(_AT_ONCE)
                start, end = 0, content.rfind(b"\n") + 1
                if end == 0:
                    if len(content) <= LONGEST_LINE:
                        return
                    self._skipping = True
                    self._offset += len(content)
                    continue
                self._offset += end
                if self._skipping:
                    self._skipping = False
                    self.bad_lines += 1
                    start = content.index(b"\n") + 1
                while start < end:
                    stop = content.rfind(b"\n", start, start + _PARSED_AT_ONCE) + 1 or content.index(b"\n", start) + 1
                    yield self._parse(content[start : stop - 1])
                    start = stop

    def _parse(self, lines: bytes) -> list[Event]:
        """Many lines are parsed as one list by the faster and stricter parser; where it finds one that is none of ours, each by itself."""
        try:
            records = orjson.loads(b"[" + lines.replace(b"\n", b",") + b"]") if len(lines) <= LONGEST_LINE else ()
            if len(records) == lines.count(b"\n") + 1 and KINDS.issuperset(map(_KIND, records)):
                return list(records)
        except (ValueError, TypeError, KeyError, RecursionError):
            pass
        return list(self._one_by_one(lines.split(b"\n")))

    def _one_by_one(self, lines: list[bytes]) -> Iterator[Event]:
        for line in lines:
            try:
                record = json.loads(line) if len(line) <= LONGEST_LINE else None
                if not isinstance(record, dict) or record.get("event") not in KINDS:
                    raise ValueError("not an event")
            except (ValueError, TypeError, RecursionError):
                self.bad_lines += 1
                continue
            yield record


def story(events: Iterable[Event]) -> list[Event]:
    """The events that count, in order: of each ``nth`` the last one told, and nothing after the last."""
    told: list[Event] = []
    for event in events:
        if event["event"] == "started" and isinstance(event.get("nth"), int):
            del told[event["nth"] :]
        elif event["event"] in STORY and isinstance(event.get("nth"), int):
            del told[event["nth"] :]
            told.append(event)
    return told


def steering(events: Iterable[Event]) -> list[Event]:
    """What was changed on the way, each at its step, ascending. What somebody asked for anew replaces what once was to come after it."""
    asked: list[Event] = []
    for event in events:
        if event["event"] in STEERING and isinstance(event.get("step"), int):
            asked = [other for other in asked if other["event"] != event["event"] or other["step"] < event["step"]]
            asked.append(event)
    return sorted(asked, key=lambda event: event["step"])


@dataclass(frozen=True)
class Past:
    """What a worker goes on from, of a diary that others began."""

    steering: list[Event]
    """As :func:`steering` finds it."""
    best_loss: float
    """The lowest held-out loss of the story; infinite where none was measured."""
    changes: int
    """How often the run went on with something changed."""


def recall(events: Iterable[Event]) -> Past:
    """The past in one reading that holds no event longer than it needs: of evaluations those that beat all before them, as a restart may take back the last."""
    asked: list[Event] = []
    best: list[tuple[int, float]] = []  # nth and loss, falling
    changes = 0
    for event in events:
        kind, nth, loss = event["event"], event.get("nth"), event.get("loss")
        if kind in STEERING:
            asked.append(event)
        elif kind == "changed":
            changes += 1
        elif kind in ("started", "eval") and isinstance(nth, int):
            while best and best[-1][0] >= nth:
                best.pop()
            if kind == "eval" and isinstance(loss, float) and loss < (best[-1][1] if best else math.inf):
                best.append((nth, loss))
    return Past(steering(asked), best[-1][1] if best else math.inf, changes)
