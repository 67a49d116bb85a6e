"""A question about a finished run, answered in a process of its own: ``python -m sparklab.results.job``.

The notebook's kernel never loads torch, and all memory comes back when the process ends (:mod:`sparklab.run.process`).
"""

from __future__ import annotations

import sys
from typing import Any

from sparklab.errors import RunError
from sparklab.run import inputs
from sparklab.run.directory import RunDirectory
from sparklab.run.launch import worker_environment
from sparklab.run.process import answer_process, ask_process
from sparklab.text import one_line


def ask(directory: RunDirectory, question: str, **details: Any) -> dict[str, Any]:
    """Starts the process, waits and returns its answer. Raises :class:`RunError` with the process's own fact and fix.

    ``question`` is ``"compare"`` (prompts, max_new_tokens) or ``"evaluate"`` (n). Raises :class:`RunChanged` where base or records are others by now.
    """
    if not (directory.result_path / "manifest.json").is_file():
        if directory.state.status == "finished":
            raise RunError(f"{directory.path} is finished, and its result is gone from {directory.result_path}", "put it back, or train anew")
        raise RunError(f"{directory.path} has no result yet", "wait for the run to finish, or resume it")
    if question == "evaluate" and (gone := inputs.missing(directory.recipe)):
        raise RunError(f"{directory.path} was trained on {' and '.join(map(one_line, gone))}, which is not there any more", inputs.put_back(gone))
    inputs.check_same(directory, ("model", "data", "held_out") if question == "evaluate" else ("model",))
    request = {"directory": str(directory.path.resolve()), "question": question, **details}
    again = "run it again; if it stays, the model does not fit"
    answer = ask_process("sparklab.results.job", request, worker_environment(directory.recipe), question, again)
    if "error" in answer:
        raise RunError(answer["fact"], answer["fix"])
    return answer


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """What the run answers to the question."""
    from sparklab.results.answers import compare, evaluate  # noqa: PLC0415 - torch

    directory, question = RunDirectory(request.pop("directory")), request.pop("question")
    return compare(directory, **request) if question == "compare" else evaluate(directory, **request)


if __name__ == "__main__":
    sys.exit(answer_process(answer))
