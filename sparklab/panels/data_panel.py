"""The data as the model will see it: numbers, faults, and every record's tokens with what is learned of them, a page at a time."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any, Final

from sparklab.data.pages import Decoder, Leaf, Pages
from sparklab.data.store import Store
from sparklab.errors import DataError
from sparklab.panels import data_view
from sparklab.panels.resident import Resident
from sparklab.planner.kept import kept
from sparklab.planner.recipe import Recipe
from sparklab.run.inspecting import Progress, inspect_data

ON_A_PAGE: Final = 5


def inspect(source: Any, *, model: str | os.PathLike[str] | None = None, on_progress: Progress | None = None, **changes: Any) -> Inspection:
    """What is in the data, and what a model would learn of it: before a single step is spent.

    ``source`` is a :class:`Recipe`, or data as a recipe names it, or records from memory (a pandas DataFrame, a list of dicts, a
    ``datasets.Dataset``): then ``model`` says whose tokenizer and chat template are used (default: the bundled tiny model's, and the
    inspection says so), and ``changes`` are fields of a recipe. The result shows itself in a notebook: the verdict, warnings, lengths, and
    every record to page through, what is learned of it marked. Tokens are kept for the training to come; no torch is loaded.
    ``on_progress`` hears how many records are tokenised, of how many where that is known.

    ::

        seen = sl.inspect("chats.jsonl", model="path/to/model", max_length=4096)
        seen.verdict                    # "ready", "ready with warnings" or "refuse"
        seen.page("odd")                # the first five records with anything odd about them
        seen.check()                    # raises what training would raise

    Raises DataNotFound, DataError where the data cannot be opened at all, ModelNotFound, RecipeError.
    """
    if isinstance(source, Recipe):
        recipe = source if model is None and not changes else source.replace(**{**changes, **({} if model is None else {"model": str(model)})})
        return Inspection(recipe, on_progress=on_progress)
    folder = new_folder()
    data = kept(source, folder / "data")
    return Inspection(Recipe(model="tiny" if model is None else str(model), data=data, **changes), folder, stands_in=model is None, on_progress=on_progress)


def new_folder() -> Path:
    """Where an inspection keeps what it needs as long as it lives."""
    return Path(tempfile.mkdtemp(prefix="sparklab-inspection-"))


class Inspection(Resident):
    """What :func:`inspect` found. Shows itself in a notebook; prints in a terminal."""

    kind = "data"

    def __init__(self, recipe: Recipe, folder: Path | None = None, *, stands_in: bool = False, on_progress: Progress | None = None) -> None:
        super().__init__()
        self.recipe = recipe
        self._stands_in = stands_in
        folder = folder or new_folder()
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self.numbers: dict[str, Any] = inspect_data(recipe, folder, on_progress)
        """Everything counted, as :meth:`to_dict` gives it."""
        self._pages = self._open(folder)
        self._at = ("odd" if self._counts.get("odd") else "all", 0)

    def _open(self, folder: Path) -> Pages | None:
        import numpy as np  # noqa: PLC0415

        entries = self.numbers.pop("entries")
        if not entries:  # nothing became tokens
            return None
        leaves = [
            Leaf(Store(Path(entry["folder"])), np.fromfile(folder / f"held-{number}.bin", bool), str(entry["name"]), str(entry["kind"]))
            for number, entry in enumerate(entries)
        ]
        return Pages(leaves, Decoder(folder), self.numbers["max_length"], self.numbers["on_long"])

    @property
    def _counts(self) -> dict[str, int]:
        return {name: self._pages.count(name) for name in data_view.FILTERS} if self._pages is not None else {}

    @property
    def verdict(self) -> str:
        """``ready``, ``ready with warnings``, or ``refuse``: training would not start."""
        return str(self.numbers["verdict"])

    @property
    def warnings(self) -> list[str]:
        """What is worth knowing before training, in words."""
        return [one["words"] for one in self.numbers["findings"]]

    def check(self) -> Inspection:
        """This, or a :class:`DataError` with everything for which training would refuse the data."""
        refusals = self.numbers["refusals"]
        if refusals:
            raise DataError("\n".join(one["fact"] for one in refusals), "; ".join(dict.fromkeys(one["fix"] for one in refusals if one["fix"])))
        return self

    def page(self, wanted: str = "all", first: int = 0, count: int = ON_A_PAGE) -> list[dict[str, Any]]:
        """Some records: where they stand, how many tokens, what is odd, and ``lines`` of pieces with text, kind and whether they are learned.

        ``wanted``: all, odd, unusable, long, repeated, held_out, nothing_learned, no_end, double_bos, empty_turn, spells, refused. Raises
        :class:`DataError` on another.
        """
        if wanted not in data_view.FILTERS:
            raise DataError(f"records cannot be filtered by {wanted!r}", f"use one of: {', '.join(data_view.FILTERS)}")
        return self._pages.page(wanted, max(0, first), count) if self._pages is not None else []

    def to_dict(self) -> dict[str, Any]:
        """All numbers, the verdict and its reasons, ready for JSON."""
        return {"model": self.recipe.model, "stands_in": self._stands_in, **self.numbers}

    def __repr__(self) -> str:
        return f"<Inspection of {self.recipe.data}: {self.verdict}>"

    def __str__(self) -> str:
        return self.text()

    def text(self, *, colour: bool = False) -> str:
        """For a terminal; with ``colour``, what is learned is green and underlined."""
        return data_view.text(self._view(), self._shown(2), colour=colour)

    def page_text(self, rows: list[dict[str, Any]], *, colour: bool = False) -> str:
        """Records of :meth:`page` for a terminal."""
        return data_view.rows_text(rows, colour=colour) or "none"

    def _view(self) -> dict[str, Any]:
        named = self.recipe.model.rstrip("/").rsplit("/", 1)[-1]
        whose = "tokens of the bundled tiny model, for want of a named one" if self._stands_in else f"tokens of {named}"
        return data_view.view(self.numbers, self._counts, whose)

    def _shown(self, count: int) -> list[tuple[str, list[dict[str, Any]]]]:
        """Some records of the filters that matter most: what is odd, what cannot be used, and the first ones."""
        counts = self._counts
        return [(name.capitalize(), self.page(wanted, 0, count)) for wanted, name in data_view.FILTERS.items() if wanted in _SHOWN and counts.get(wanted)]

    def _twin(self) -> str:
        return data_view.twin_html(self._view(), self._shown(3), self._home)

    def _make_widget(self) -> Any:
        from sparklab.panels.resident_widgets import DataWidget  # noqa: PLC0415 - ipywidgets loads when a widget is made, not before

        widget = DataWidget(home=self._home, view=self._view(), page=self._page(*self._at))
        widget.on_msg(self._hear)
        return widget

    def _page(self, wanted: str, first: int) -> dict[str, Any]:
        rows = self.page(wanted, first)
        shown = [{**row, "head": list(data_view.row_head(row))} for row in rows]
        total = self._pages.count(wanted) if self._pages is not None else 0
        return {"filter": wanted, "first": first, "total": total, "size": ON_A_PAGE, "rows": shown}

    def _hear(self, _widget: Any, content: Any, _buffers: Any) -> None:
        """The page wants other records; what is not on offer changes nothing."""
        if not isinstance(content, dict) or content.get("filter") not in data_view.FILTERS or type(content.get("first")) is not int:
            return
        wanted, total = content["filter"], self._pages.count(content["filter"]) if self._pages is not None else 0
        first = max(0, min(content["first"], (total - 1) // ON_A_PAGE * ON_A_PAGE if total else 0))
        with self._guard:
            self._at = (wanted, first)
            self.widget.page = self._page(wanted, first)


_SHOWN: Final = ("all", "odd", "unusable")
