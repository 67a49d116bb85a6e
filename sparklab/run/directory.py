"""A run is a directory, and the directory is the only interface between the one who trains and those who look.

::

    recipe.json        what to do                       written once
    plan.json          what was expected                written once
    environment.json   versions, machine, data hash     written once
    events.jsonl       what happened                    appended by the worker
    commands/          what is asked of the worker      one small file each, removed when carried out
    checkpoints/       step-000123/                     written beside, then renamed
    adapter/ or model/ the result                       written at the end
    worker.lock        held (flock) by the living worker
    worker.log         what its libraries print
    guard.json         why the watchdog ended the worker   only where it had to
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from sparklab.errors import RunBusy, RunError, RunExists, RunNotFound
from sparklab.planner.recipe import Recipe
from sparklab.run.events import EventReader
from sparklab.run.guard import left_behind
from sparklab.run.state import RunState

COMMANDS = ("stop", "pause", "resume", "checkpoint", "evaluate", "sample")


class RunDirectory:
    """The files of one run. Cheap to make; reads when asked.

    Raises :class:`RunNotFound` where ``path`` holds no run.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not (self.path / "recipe.json").is_file():
            what = "is not a run directory (no recipe.json)" if self.path.exists() else "does not exist"
            near = sorted(entry.parent.name for entry in self.path.parent.glob("*/recipe.json"))[:5] if self.path.parent.is_dir() else []
            raise RunNotFound(f"{self.path} {what}", f"runs beside it: {', '.join(near)}" if near else "start one with sparklab.train(recipe, path)")

    @classmethod
    def create(cls, path: str | os.PathLike[str], recipe: Recipe, plan: dict[str, Any], environment: dict[str, Any]) -> RunDirectory:
        """A new run directory: built beside, then renamed, so that no half of one is ever seen.

        Raises :class:`RunExists` where something is there already (an empty directory is nothing).
        """
        target = Path(path)
        occupied = RunExists(
            f"{target} exists already" + (" and holds a run" if (target / "recipe.json").exists() else ""),
            "resume it with sparklab.Run.open(path).resume(), or choose another path",
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
            content = json.loads((self.path / f"{name}.json").read_text(encoding="utf-8"))
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

    def try_lock(self) -> int | None:
        """An open file descriptor that holds the run's lock, or None where a living worker has it.

        The lock is the kernel's (flock): it goes with the process that holds it, so it can never be stale.
        """
        descriptor = os.open(self.path / "worker.lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            return None
        return descriptor

    def lock(self) -> int:
        """As :meth:`try_lock`; raises :class:`RunBusy` where a living worker has it."""
        for _ in range(20):  # somebody asking `is_alive` holds the lock for microseconds: not a worker
            descriptor = self.try_lock()
            if descriptor is not None:
                return descriptor
            time.sleep(0.02)
        raise RunBusy(f"a worker is at work on {self.path}", "wait for it, or stop it first: sparklab stop " + str(self.path))

    @property
    def is_alive(self) -> bool:
        """True while a worker holds the run."""
        try:
            descriptor = self.try_lock()
        except OSError:  # a read-only copy has no worker
            return False
        if descriptor is None:
            return True
        os.close(descriptor)
        return False

    # what is asked of the worker

    def send(self, command: str, **details: Any) -> str:
        """Leaves a command for the worker and returns its id; the worker answers with a ``command`` event."""
        if command not in COMMANDS:
            raise RunError(f"there is no command {command!r}", f"use one of {', '.join(COMMANDS)}")
        name = f"{time.time_ns()}-{command}"
        write_json(self.path / "commands" / f"{name}.json", {"command": command, **details})
        return name

    def take_commands(self) -> list[tuple[str, dict[str, Any]]]:
        """The commands waiting, oldest first, as (id, content); each is removed as it is taken."""
        folder, taken = self.path / "commands", []
        for name in sorted(os.listdir(folder)):
            file = folder / name
            if not name.endswith(".json") or file.is_symlink():
                continue
            try:
                content = json.loads(file.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                content = None
            file.unlink(missing_ok=True)
            if isinstance(content, dict) and content.get("command") in COMMANDS:
                taken.append((name.removesuffix(".json"), content))
        return taken

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
            with open(self.log_path, "rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 16_384))
                return "\n".join(file.read().decode("utf-8", "replace").splitlines()[-lines:])
        except OSError:
            return ""


class RunFollower:
    """Reads a run's new events into one state; :meth:`refresh` costs what came since the last call."""

    def __init__(self, directory: RunDirectory) -> None:
        self.directory = directory
        self.state = RunState()
        self._reader = EventReader(directory.events_path)

    def refresh(self) -> RunState:
        """The state, with all events written until now, and whether the worker still lives."""
        alive = self.directory.is_alive  # asked first: a worker that ends between the two questions has written its last word
        for event in self._reader.read_new():
            self.state.add(event)
        if not alive and not self.state.is_over:
            self.state.mark_lost(left_behind(self.directory.path))
        return self.state


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file whole or not at all: beside, to the disk, renamed."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        with open(draft, "w", encoding="utf-8") as file:
            json.dump(content, file, ensure_ascii=False, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
