"""Where a ``config.json`` comes from: a path, a directory, the bundled model, or the hub, of which nothing else is ever fetched."""

from __future__ import annotations

import difflib
import json
import re
import threading
from pathlib import Path
from typing import Any, Final

from sparklab.errors import ModelError, ModelNotFound
from sparklab.files import reason

TINY_PATH: Final = Path(__file__).resolve().parent / "tiny"
_FORMS: Final = "give a directory with config.json, a config.json, a hub name (owner/name) or 'tiny', the bundled model"
SECONDS_TO_WAIT: Final = 10.0  # a plan is asked for interactively; a network that takes longer for 1 KB counts as none


def load_config(source: str) -> Any:
    """The parsed config.json that ``source`` means; asked of the hub only where no such path exists and the name has the hub's form."""
    path = TINY_PATH if source == "tiny" else Path(source).expanduser()
    try:
        is_dir = path.is_dir()
    except (OSError, ValueError) as error:  # a name that no file can have
        raise ModelNotFound(f"No model at {source[:300]!r}: {reason(error)}", _FORMS) from None
    if is_dir:
        path = path / "config.json"
        if not path.is_file():
            raise ModelNotFound(f"The directory {path.parent} has no config.json", _nearest(path))
    elif not path.is_file():
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", source) or source.endswith(".json"):
            raise ModelNotFound(f"No model at {source!r}", _nearest(path))
        return _parse(_fetch_config(source), source)
    try:
        return _parse(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise _not_json(str(path), error) from None
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}", "check the file's permissions") from None


def _parse(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise _not_json(name, error) from None


def _not_json(name: str, error: Exception) -> ModelError:
    if name.endswith((".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".txt")):
        return ModelError(f"{name} looks like data, and stands where the model should", "name the model first, then the data: sparklab train MODEL DATA")
    return ModelError(f"{name} is not JSON: {error}", "point at the model's config.json, or download it again")


def _nearest(path: Path) -> str:
    """The likeliest thing that was meant: a sibling of nearly that name, the bundled model, or the forms a name can have."""
    try:
        siblings = sorted(item.name for item in path.parent.iterdir() if item.is_dir() or item.suffix == ".json")
    except OSError:
        return f"the directory {path.parent} does not exist or cannot be read; {_FORMS}"
    close = difflib.get_close_matches(path.name, [*siblings, "tiny"], n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0] if close[0] == 'tiny' and 'tiny' not in siblings else str(path.parent / close[0])!r}? Else {_FORMS}"
    return _FORMS


def _fetch_config(name: str) -> str:
    """The text of ``config.json`` of hub model ``owner/name``: from the local cache, else asked for once.

    Raises :class:`ModelNotFound`, within ten seconds, whatever went wrong.
    """
    from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415 - only a hub name needs it

    cached = try_to_load_from_cache(name, "config.json")
    if isinstance(cached, str):
        return Path(cached).read_text(encoding="utf-8")
    answers: list[tuple[str, str]] = []
    # A thread, because name resolution on a half-dead network ignores every timeout; a plain request, because hf_hub_download retries for minutes.
    thread = threading.Thread(target=lambda: answers.append(_ask_hub(name)), daemon=True)
    thread.start()
    thread.join(SECONDS_TO_WAIT)
    text, reason = answers[0] if answers else ("", f"the hub did not answer in {SECONDS_TO_WAIT:.0f} seconds")
    if text:
        return text
    raise ModelNotFound(f"No model {name!r}: no such path here, not in the local hub cache, and {reason}",
                        "check the spelling and the network; a gated model needs `hf auth login`; 'tiny' works offline")  # fmt: skip


def _ask_hub(name: str) -> tuple[str, str]:
    """(config.json's text, "") or ("", why there is none)."""
    from huggingface_hub import get_session, hf_hub_url  # noqa: PLC0415 - only a hub name needs it
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # noqa: PLC0415 - exported without saying so

    try:
        answer = get_session().get(hf_hub_url(name, "config.json"), headers=build_hf_headers(), timeout=SECONDS_TO_WAIT / 2)
    except Exception as error:  # noqa: BLE001 - the transport's dozens of unrelated types all mean the same here
        return "", f"the hub cannot be reached ({type(error).__name__})"
    reasons = {401: "the hub has none of this name (or it is private)", 403: "the hub says it is gated", 404: "the hub has no such config.json"}
    if answer.status_code != 200:
        return "", reasons.get(answer.status_code, f"the hub answered {answer.status_code}")
    return answer.text, ""
