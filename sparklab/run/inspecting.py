"""Inspections in a process of its own: ``python -m sparklab.run.inspecting``. It loads the tokenizer, and no torch (:mod:`sparklab.run.process`)."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from sparklab.data import store
from sparklab.errors import DataError, DataNotFound, ModelError, ModelNotFound
from sparklab.model.source import resolve
from sparklab.planner.recipe import Recipe
from sparklab.run.launch import child_environment
from sparklab.run.process import answer_process, ask_process

_ERRORS = {error.__name__: error for error in (DataError, DataNotFound, ModelError, ModelNotFound)}


def inspect_data(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """What :func:`sparklab.data.inspection.look` finds; what is needed to page through the records is left in ``folder``.

    Raises what it raises, :class:`ModelNotFound` where there is no tokenizer, :class:`RunFailed` where the process ended without an answer.
    """
    environment = child_environment(offline=Path(resolve(recipe.model)).is_dir())
    if store.root() is None:  # nothing is kept: tokens live as long as the inspection
        environment[store.SWITCH] = str(folder / "tokens")
    request = {"recipe": recipe.to_dict(), "folder": str(folder)}
    found = ask_process("sparklab.run.inspecting", request, environment, "the inspection", "check the data file, or report this with the file")
    if "error" in found:
        raise _ERRORS.get(found["error"], DataError)(found["fact"], found["fix"])
    return found


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The inspection that the request asks for."""
    from transformers import AutoTokenizer  # noqa: PLC0415

    from sparklab.data.inspection import look  # noqa: PLC0415

    recipe = Recipe.from_dict(request["recipe"])
    where = resolve(recipe.model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False, local_files_only=os.path.isdir(where))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:300]
        raise ModelNotFound(f"the tokenizer of {recipe.model!r} cannot be loaded: {reason}", "check the model's name or directory") from error
    return look(recipe, tokenizer, Path(request["folder"]))


if __name__ == "__main__":
    sys.modules["torch"] = None  # type: ignore[assignment]  # transformers' tokenizers do without, in a fifth of the memory and of the time
    sys.exit(answer_process(answer))
