"""One question, one process: a JSON object goes in on standard input, and one comes back in the file it names.

Whoever asks need not load torch, and all the answerer's memory comes back when its process ends.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparklab.errors import RunFailed, SparklabError


def ask_process(module: str, request: dict[str, Any], environment: dict[str, str], name: str, fix: str) -> dict[str, Any]:
    """The answer of ``python -m module``, or the error it met (:meth:`SparklabError.to_dict`: ``error``, ``fact``, ``fix``).

    Raises :class:`RunFailed`, with ``name`` and the end of what the process said, where it ended without an answer; with ``fix`` where something
    ended it, as the kernel does when memory runs out.
    """
    with tempfile.TemporaryDirectory(prefix="sparklab-") as folder:
        answer_path = Path(folder) / "answer.json"
        asked = json.dumps({**request, "answer": str(answer_path)}).encode()
        process = subprocess.run([sys.executable, "-m", module], input=asked, capture_output=True, check=False, env=environment)
        if not answer_path.is_file():
            tail = process.stderr.decode("utf-8", "replace").strip().splitlines()[-5:]
            if process.returncode > 0:  # its own error, which nobody foresaw
                fix = "report it with these lines"
            raise RunFailed(f"{name} ended with exit status {process.returncode}:\n" + "\n".join(tail), fix)
        answer: dict[str, Any] = json.loads(answer_path.read_text(encoding="utf-8"))
    return answer


def answer_process(work: Callable[[dict[str, Any]], dict[str, Any]]) -> int:
    """The other side: reads the request, works, writes the answer whole."""
    request = json.loads(sys.stdin.read())
    answer_path = Path(request.pop("answer"))
    try:
        answer = work(request)
    except SparklabError as error:
        answer = error.to_dict()
    draft = answer_path.with_suffix(".new")
    draft.write_text(json.dumps(answer), encoding="utf-8")
    os.replace(draft, answer_path)
    return 0
