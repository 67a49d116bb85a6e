"""Several runs side by side: a table, and their loss curves on one axis. Live while one of them is, a picture when all are over."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

from sparklab.errors import RunNotFound
from sparklab.panels import runs_view
from sparklab.panels.resident import Watcher
from sparklab.panels.runs_view import Drawn, Entry
from sparklab.run.directory import RunDirectory, is_run

R = TypeVar("R")
Place = str | os.PathLike[str]


def find(places: Place | Iterable[Place]) -> list[RunDirectory]:
    """The runs that ``places`` name: each a run directory, or a folder with runs in it (by name).

    Raises :class:`RunNotFound` where a place is neither, naming them all.
    """
    found: dict[Path, RunDirectory] = {}
    missing = []
    for place in [places] if isinstance(places, (str, os.PathLike)) else places:
        path = Path(place)
        if is_run(path):
            inside = [path]
        elif path.is_dir():
            inside = sorted((entry.parent for entry in path.glob("*/recipe.json") if not entry.parent.name.startswith(".")), key=_in_order)
        else:
            missing.append(str(path))
            continue
        found.update({run.resolve(): RunDirectory(run) for run in inside})
    if missing:
        raise RunNotFound(f"there is no run and no folder of runs at {', '.join(missing)}", "name run directories, or the folder they are in")
    return list(found.values())


def _in_order(path: Path) -> list[tuple[int, str]]:
    """By name, numbers by their size: ``chat-8`` before ``chat-16``."""
    return [(int(word), "") if word.isdecimal() else (0, word) for word in re.split(r"(\d+)", path.name)]


class RunTable(Watcher, Sequence[R], Generic[R]):
    """Runs beside each other; a sequence of them, that shows itself in a notebook and prints as a table.

    ::

        table = sl.runs("runs")
        table.best              # the run with the lowest held-out loss, where all were measured on the same data
    """

    kind = "runs"

    def __init__(self, directories: Sequence[RunDirectory], make: Callable[[RunDirectory], R]) -> None:
        super().__init__()
        self._directories = tuple(directories)
        self._make = make
        self._followers = [directory.follow() for directory in directories]
        self._drawn = [Drawn() for _ in directories]

    def entries(self) -> list[Entry]:
        """The runs as they stand now."""
        return [
            Entry(directory, follower.refresh(), runs_view.recipe_of(directory), directory.plan, drawn)
            for directory, follower, drawn in zip(self._directories, self._followers, self._drawn, strict=True)
        ]

    @property
    def best(self) -> R | None:
        """The run with the lowest held-out loss; None where none was measured, or not all on the same data: such losses cannot be compared."""
        entries = self.entries()
        groups = runs_view.comparable(entries)
        if len(groups) != 1:
            return None
        losses = {index: best["loss"] for index in groups[0] if (best := entries[index].state.best_eval)}
        return self[min(losses, key=losses.__getitem__)]

    def to_dict(self) -> dict[str, Any]:
        """``{"runs": [...], "differing": [...]}``: figures of each run, and the recipe's fields in which they differ."""
        entries = self.entries()
        names = runs_view.differing(entries)
        runs = [{**runs_view.figures(entry), "settings": {name: getattr(entry.recipe, name, None) for name in names}} for entry in entries]
        return {"runs": runs, "differing": names}

    def __len__(self) -> int:
        return len(self._directories)

    @overload
    def __getitem__(self, index: int) -> R: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[R]: ...
    def __getitem__(self, index: int | slice) -> R | Sequence[R]:
        chosen = self._directories[index]
        return [self._make(one) for one in chosen] if isinstance(chosen, tuple) else self._make(chosen)

    def __iter__(self) -> Iterator[R]:
        return map(self._make, self._directories)

    def __repr__(self) -> str:
        return f"<{len(self)} runs>"

    def __str__(self) -> str:
        return runs_view.text(self.entries())

    def _twin(self) -> str:
        return runs_view.twin_html(self.entries(), self._home)

    def _make_widget(self) -> Any:
        from sparklab.panels.resident_widgets import RunsWidget  # noqa: PLC0415 - ipywidgets loads when a widget is made, not before

        view, points = runs_view.view(self.entries())
        return RunsWidget(home=self._home, view=view, points=points)

    def _tick(self) -> bool:
        entries = self.entries()
        view, points = runs_view.view(entries)
        with self.widget.hold_sync():
            self.widget.view, self.widget.points = view, points
        return not all(entry.state.is_over for entry in entries)
