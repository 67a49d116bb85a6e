"""Inspections in a process of its own: ``python -m sparklab.run.inspecting``. It loads the tokenizer, and no torch (:mod:`sparklab.run.process`)."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparklab.data import store
from sparklab.errors import DataError, DataNotFound, DiskFull, ModelError, ModelNotFound
from sparklab.model.source import resolve
from sparklab.planner.recipe import Recipe
from sparklab.run.launch import child_environment
from sparklab.run.process import answer_process, ask_process
from sparklab.text import first_line

Progress = Callable[[int, int | None], Any]
_ERRORS = {error.__name__: error for error in (DataError, DataNotFound, DiskFull, ModelError, ModelNotFound)}


def inspect_data(recipe: Recipe, folder: Path, on_progress: Progress | None = None) -> dict[str, Any]:
    """What :func:`sparklab.data.inspection.look` finds; what is needed to page through the records is left in ``folder``.

    ``on_progress`` hears how many records are tokenised, of how many where that is known, about twice a second.
    Raises what it raises, :class:`ModelNotFound` where there is no tokenizer, :class:`RunFailed` where the process ended without an answer.
    """
    environment = child_environment(offline=Path(resolve(recipe.model)).is_dir())
    if store.root() is None:  # nothing is kept: tokens live as long as the inspection
        environment[store.SWITCH] = str(folder / "tokens")
    request = {"recipe": recipe.to_dict(), "folder": str(folder)}
    with _following(folder / "progress", on_progress):
        found = ask_process("sparklab.run.inspecting", request, environment, "the inspection", "check the data file, or report this with the file")
    if "error" in found:
        raise _ERRORS.get(found["error"], DataError)(found["fact"], found["fix"])
    return found


@contextmanager
def _following(path: Path, on_progress: Progress | None) -> Iterator[None]:
    """Passes on what the process writes down of its progress, from a thread."""
    if on_progress is None:
        yield
        return
    over = threading.Event()

    def follow() -> None:
        told = ""
        while not over.wait(0.4):
            words = path.read_text(encoding="ascii") if path.is_file() else ""
            if words and words != told:
                told = words
                done, total = words.split()
                on_progress(int(done), int(total) or None)

    thread = threading.Thread(target=follow, name="sparklab-inspection", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The inspection that the request asks for."""
    from transformers import AutoTokenizer  # noqa: PLC0415

    from sparklab.data.inspection import look  # noqa: PLC0415

    recipe = Recipe.from_dict(request["recipe"])
    where = resolve(recipe.model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False, local_files_only=os.path.isdir(where))
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise ModelNotFound(f"the tokenizer of {recipe.model!r} cannot be loaded: {reason}", "check the model's name or directory") from error
    folder = Path(request["folder"])

    def tell(done: int, total: int | None) -> None:
        (folder / "progress.new").write_text(f"{done} {total or 0}", encoding="ascii")
        os.replace(folder / "progress.new", folder / "progress")

    return look(recipe, tokenizer, folder, tell)


if __name__ == "__main__":
    sys.modules["torch"] = None  # type: ignore[assignment]  # transformers' tokenizers do without, in a fifth of the memory and of the time
    sys.exit(answer_process(answer))
