"""A run is a directory, and the directory is the only interface between the one who trains and those who look.

::

    recipe.json        what to do                       written once
    plan.json          what was expected                written once
    environment.json   versions, machine, data hash     written once
    events.jsonl       what happened                    appended by the worker
    commands/          what is asked of the worker      one small file each, removed when carried out
    checkpoints/       step-000123/                     written beside, then renamed
    adapter/ or model/ the result                       written at the end
    worker.lock        held (flock) by the living worker, and says who that is
    worker.log         what its libraries print
    guard.json         why the watchdog ended the worker   only where it had to
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Final

from sparklab.errors import RunError, RunExists, RunNotFound
from sparklab.files import open_plain, read_json, reason, write_json
from sparklab.planner.recipe import Recipe
from sparklab.run.events import EventReader
from sparklab.run.guard import left_behind
from sparklab.run.lock import Owner, acquire, is_held, owner_of, wait_for
from sparklab.run.state import RunState
from sparklab.text import clean
from sparklab.units import MIB

COMMANDS = ("stop", "pause", "resume", "checkpoint", "evaluate", "sample", "learning_rate")

NAMES: Final = (
    "recipe.json", "plan.json", "environment.json", "events.jsonl", "commands", "checkpoints", "adapter", "model", "worker.lock", "worker.log", "guard.json",
    "skipped.jsonl",
)  # fmt: skip
"""What a run keeps in its directory; none of them may be a link to somewhere else."""

DISK_FULL: Final = 28  # errno.ENOSPC


class RunDirectory:
    """The files of one run. Cheap to make; reads when asked.

    Raises :class:`RunNotFound` where ``path`` holds no run, and :class:`RunError` where one of its files is a link: a directory from a stranger
    may be opened, and leads nowhere else.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not is_run(self.path):
            what = "is not a run directory (no recipe.json)" if self.path.exists() else "does not exist"
            for where, folder in (("in", self.path), ("beside", self.path.parent)):
                if near := sorted(entry.parent.name for entry in folder.glob("*/recipe.json"))[:5] if folder.is_dir() else []:
                    raise RunNotFound(f"{self.path} {what}", f"runs {where} it: {', '.join(near)}")
            raise RunNotFound(f"{self.path} {what}", "start one with sparklab train MODEL DATA --run PATH, sl.train(recipe, path)")
        links = [name for name in NAMES if (self.path / name).is_symlink()]
        if links:
            raise RunError(
                f"{self.path}: {', '.join(links)} leads elsewhere (a symbolic link), and nothing outside a run directory is followed",
                "put the real files in its place, if you trust whoever made them",
            )

    @classmethod
    def create(cls, path: str | os.PathLike[str], recipe: Recipe, plan: dict[str, Any], environment: dict[str, Any]) -> RunDirectory:
        """A new run directory: built beside, then renamed, so that no half of one is ever seen.

        Raises :class:`RunExists` where something is there already (an empty directory is nothing).
        """
        target = Path(path)
        holds_run = (target / "recipe.json").exists()
        occupied = RunExists(
            f"{target} exists already" + (" and holds a run" if holds_run else ""),
            f"choose another path{f', or go on with that run: sparklab resume {target}, sl.Run.open(path).resume()' if holds_run else ''}",
        )
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise occupied
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = target.with_name(f".{target.name}.{os.getpid()}.new")
        shutil.rmtree(draft, ignore_errors=True)
        try:
            (draft / "commands").mkdir(parents=True)
            (draft / "checkpoints").mkdir()
            for name, content in (("recipe", recipe.to_dict()), ("plan", plan), ("environment", environment)):
                write_json(draft / f"{name}.json", content)
            (draft / "events.jsonl").touch()
            os.rename(draft, target)  # onto an empty directory or nothing; anything else fails, also when it came a moment ago
        except OSError as error:
            if target.is_dir() and any(target.iterdir()):
                raise occupied from error
            raise
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        return cls(target)

    @property
    def recipe(self) -> Recipe:
        """The recipe as it was started with."""
        return Recipe.from_dict(self.read_json("recipe"))

    @property
    def plan(self) -> dict[str, Any]:
        """The plan as JSON, ``{}`` where it cannot be read (panels draw without it)."""
        try:
            return self.read_json("plan")
        except RunError:
            return {}

    def read_json(self, name: str) -> dict[str, Any]:
        """One of the files written once; :class:`RunError` where it is damaged."""
        try:
            content = read_json(self.path / f"{name}.json")
        except (OSError, ValueError) as error:
            raise RunError(f"{self.path / name}.json cannot be read: {error}", "start the run anew in another directory") from error
        if not isinstance(content, dict):
            raise RunError(f"{self.path / name}.json holds no JSON object", "start the run anew in another directory")
        return content

    @property
    def events_path(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def log_path(self) -> Path:
        return self.path / "worker.log"

    @property
    def checkpoints_path(self) -> Path:
        return self.path / "checkpoints"

    @property
    def result_path(self) -> Path:
        """Where the trained weights are at the end: ``adapter/`` in PEFT's format, or ``model/`` after full fine-tuning."""
        return self.path / ("model" if self.recipe.method == "full" else "adapter")

    # who works on it

    @property
    def _lock_path(self) -> Path:
        return self.path / "worker.lock"

    def try_lock(self) -> int | None:
        """An open file descriptor that holds the run's lock, or None where a living worker has it; :func:`lock.release` gives it back."""
        return acquire(self._lock_path)

    def lock(self) -> int:
        """As :meth:`try_lock`; raises :class:`RunBusy`, which names the worker, where a living one has it, and RunError where nothing may be written."""
        try:
            return wait_for(self._lock_path)
        except OSError as error:
            if error.errno == DISK_FULL:
                raise
            raise RunError(f"{self.path} cannot be locked: {reason(error)}", "a run needs a directory that may be written to") from error

    @property
    def is_alive(self) -> bool:
        """True while a worker holds the run."""
        return is_held(self._lock_path)

    @property
    def owner(self) -> Owner | None:
        """The living worker: its process, machine, and since when; None where there is none."""
        return owner_of(self._lock_path) if self.is_alive else None

    # what is asked of the worker

    def send(self, command: str, **details: Any) -> str:
        """Leaves a command for the worker and returns its id; the worker answers with a ``command`` event."""
        if command not in COMMANDS:
            raise RunError(f"there is no command {command!r}", f"use one of {', '.join(COMMANDS)}")
        folder = self.path / "commands"
        try:
            # Later than all that wait, also where the clock went back in between.
            waiting = [int(match[0]) for name in os.listdir(folder) if (match := re.match(r"\d{1,20}(?=-)", name))]
            name = f"{max([time.time_ns(), *(number + 1 for number in waiting)])}-{command}"
            write_json(folder / f"{name}.json", {"command": command, **details})
        except OSError as error:
            fact = f"the command {command!r} cannot be left in {folder}: {reason(error)}"
            raise RunError(fact, "look whose the folder is, whether it may be written to, and whether its disk is full") from error
        return name

    def take_commands(self, wanted: Callable[[dict[str, Any]], bool] | None = None) -> list[tuple[str, dict[str, Any]]]:
        """The commands waiting (all, or those ``wanted``), oldest first, as (id, content); each is removed as it is taken.

        What is no command has an empty content.
        """
        folder, taken = self.path / "commands", []
        for name in sorted(os.listdir(folder)):
            file = folder / name
            if not name.endswith(".json") or name.startswith(".") or file.is_symlink() or not file.is_file():
                continue
            try:
                content = read_json(file, MIB)
            except (OSError, ValueError):
                content = None
            command = content if isinstance(content, dict) else {}
            if wanted is None or wanted(command):
                file.unlink(missing_ok=True)
                taken.append((clean(name.removesuffix(".json"), 80), command))
        return taken

    def open_log(self) -> IO[bytes]:
        """``worker.log``, to append to."""
        return open(open_plain(self.log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "ab")

    # what happened

    def follow(self) -> RunFollower:
        """A reader that keeps a :class:`RunState` up to date."""
        return RunFollower(self)

    @property
    def state(self) -> RunState:
        """The run as it stands now."""
        return self.follow().refresh()

    def log_tail(self, lines: int = 20) -> str:
        """The last lines of ``worker.log``."""
        try:
            with open(open_plain(self.log_path), "rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 16_384))
                return clean("\n".join(file.read(16_384).decode("utf-8", "replace").splitlines()[-lines:]))
        except OSError:
            return ""


def is_run(path: Path) -> bool:
    """Whether a run lies there. Raises :class:`RunNotFound` for a name that no directory can have."""
    try:
        return (path / "recipe.json").is_file()
    except (OSError, ValueError) as error:
        raise RunNotFound(f"{clean(path, 300)} cannot be opened: {reason(error)}", "name a run directory") from None


class RunFollower:
    """Reads a run's new events into one state; :meth:`refresh` costs what came since the last call."""

    def __init__(self, directory: RunDirectory) -> None:
        self.directory = directory
        self.state = RunState()
        self._reader = EventReader(directory.events_path)

    def refresh(self) -> RunState:
        """The state, with all events written until now, and whether the worker still lives."""
        alive = self.directory.is_alive  # asked first: a worker that ends between the two questions has written its last word
        for events in self._reader.read_batches():
            self.state.add_all(events)
        if not alive and not self.state.is_over:
            self.state.mark_lost(self.directory.log_tail(5), left_behind(self.directory.path))
        if alive and self.state.is_over and self._is_resumed():
            return dataclasses.replace(self.state, status="starting", phase="start", detail="", reason="", fix="", ended_by="")  # shares the series
        return self.state

    def _is_resumed(self) -> bool:
        """Whether the living worker came after the last word: that is an earlier worker's, and this one is on its way to its first."""
        owner = self.directory.owner
        return owner is not None and owner.since > self.state.last_time
