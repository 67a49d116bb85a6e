"""A question about a finished run, answered in a process of its own: ``python -m sparklab.results.job``.

The notebook's kernel never loads torch: it sends one JSON object on standard input and gets one back in the file named there. All memory
comes back when the process ends.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from sparklab.errors import RunError, RunFailed
from sparklab.run.directory import RunDirectory
from sparklab.run.launch import worker_environment


def ask(directory: RunDirectory, question: str, **details: Any) -> dict[str, Any]:
    """Starts the process, waits and returns its answer. Raises :class:`RunError` with the process's own fact and fix.

    ``question`` is ``"compare"`` (prompts, max_new_tokens) or ``"evaluate"`` (n).
    """
    if not (directory.result_path / "manifest.json").is_file():
        raise RunError(f"{directory.path} has no result yet", "wait for the run to finish, or resume it")
    with tempfile.TemporaryDirectory(prefix="sparklab-") as folder:
        answer_path = Path(folder) / "answer.json"
        request = {"directory": str(directory.path.resolve()), "question": question, "answer": str(answer_path), **details}
        process = subprocess.run(
            [sys.executable, "-m", "sparklab.results.job"], input=json.dumps(request).encode(), capture_output=True, check=False,
            env=worker_environment(directory.recipe),
        )  # fmt: skip
        if not answer_path.is_file():
            tail = process.stderr.decode("utf-8", "replace").strip().splitlines()[-5:]
            raise RunFailed(f"{question} ended with exit status {process.returncode}:\n" + "\n".join(tail), "run it again; if it stays, the model does not fit")
        answer: dict[str, Any] = json.loads(answer_path.read_text(encoding="utf-8"))
    if "error" in answer:
        raise RunError(answer["fact"], answer["fix"])
    return answer


def main() -> int:
    """Reads the question, answers it, writes the answer whole."""
    from sparklab.errors import SparklabError  # noqa: PLC0415
    from sparklab.results.answers import compare, evaluate  # noqa: PLC0415 - torch

    request = json.loads(sys.stdin.read())
    answer_path = Path(request.pop("answer"))
    directory, question = RunDirectory(request.pop("directory")), request.pop("question")
    try:
        answer = compare(directory, **request) if question == "compare" else evaluate(directory, **request)
    except SparklabError as error:
        answer = error.to_dict()
    draft = answer_path.with_suffix(".new")
    draft.write_text(json.dumps(answer), encoding="utf-8")
    os.replace(draft, answer_path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
