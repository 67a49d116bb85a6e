"""What rehearsals have measured on this box, kept for its later plans: a JSON file in the user's cache directory.

::

    {"format": 1, "boxes": {"NVIDIA GB10; torch 2.13.0, transformers 5.23.0, peft 0.21.2": {
        "runtime_bytes": 1.9e9, "slack_share": 0.021, "compute_shares": {"lora bf16": 0.46}}}}

Figures hold for one chip and one set of versions. ``SPARKLAB_CALIBRATION=off`` in the environment: the file is neither read nor written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from sparklab.units import format_bytes

FORMAT: Final = 1
SWITCH: Final = "SPARKLAB_CALIBRATION"
PACKAGES: Final = ("torch", "transformers", "peft")  # what the figures depend on beside the chip


def cache_folder() -> Path:
    """Where sparklab keeps what it can make anew: ``$XDG_CACHE_HOME/sparklab``, or ``~/.cache/sparklab``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparklab"


def calibration_path() -> Path:
    """The file."""
    return cache_folder() / "calibration.json"


def is_on() -> bool:
    """False where the environment switches calibration off."""
    return os.environ.get(SWITCH, "").lower() not in ("off", "0", "no", "false")


def calibrated(facts: dict[str, Any]) -> dict[str, Any]:
    """The fields of a box with what was measured on it in place of what was assumed; unchanged where nothing was. Never raises.

    A file that is not one of ours is left out, and the box's note says so.
    """
    if not is_on() or not calibration_path().is_file():
        return facts
    boxes, complaint = _read()
    if complaint:
        return {**facts, "note": " ".join(filter(None, (facts.get("note"), complaint)))}
    entry = boxes.get(_key(facts["chip"]))
    if entry is None:
        return facts
    measured: dict[str, Any] = {name: entry[name] for name in ("runtime_bytes", "slack_share", "compute_shares") if name in entry}
    return {**facts, **measured, "sources": {**facts.get("sources", {}), **dict.fromkeys(measured, "measured")}}


def learn(chip: str, measured: Mapping[str, Any]) -> str:
    """Writes figures measured on this box over older ones; those not named stay. Returns a sentence on what was kept, or on why nothing was.

    ``measured`` may have ``runtime_bytes``, ``slack_share`` and ``compute_shares`` (by method and type). The file is replaced whole, so
    whoever reads it meanwhile sees the old one or the new one; one that is not ours is replaced too.
    """
    if not is_on():
        return f"nothing was kept for later plans: {SWITCH} is off"
    boxes, _ = _read() if calibration_path().is_file() else ({}, "")
    key = _key(chip)
    entry = boxes.get(key, {})
    shares = {**entry.get("compute_shares", {}), **measured.get("compute_shares", {})}
    entry = {**entry, **measured, **({"compute_shares": shares} if shares else {})}
    wrong = _fault(entry)
    if wrong:
        return f"nothing was kept for later plans: {wrong}"
    draft = calibration_path().with_suffix(f".{os.getpid()}.new")
    try:
        draft.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps({"format": FORMAT, "boxes": {**boxes, key: entry}}, indent=1), encoding="utf-8")
        os.replace(draft, calibration_path())
    except OSError as error:
        return f"nothing was kept for later plans: {calibration_path()} cannot be written ({error.strerror})"
    return f"later plans on this box use what was measured: {_words(measured)}"


def _words(measured: Mapping[str, Any]) -> str:
    words = []
    if "runtime_bytes" in measured:
        words.append(f"{format_bytes(measured['runtime_bytes'])} beside the tensors")
    if "slack_share" in measured:
        words.append(f"{measured['slack_share']:.1%} allocator slack")
    words += [f"{share:.1%} of the chip's compute ({kind})" for kind, share in measured.get("compute_shares", {}).items()]
    return ", ".join(words) or "nothing new"


def _key(chip: str) -> str:
    from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415 - takes milliseconds that only a calibrated box spends

    versions = []
    for package in PACKAGES:
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            versions.append(f"no {package}")
    return f"{chip}; {', '.join(versions)}"


def _read() -> tuple[dict[str, Any], str]:
    """(entries by box, ""), or ({}, what is wrong with the file)."""
    path = calibration_path()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']!r}, not {FORMAT}")
        boxes = dict(content["boxes"])
        wrong = next((fault for entry in boxes.values() if (fault := _fault(entry))), "")
        if wrong:
            raise ValueError(wrong)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return {}, f"{path} is not a calibration of ours and is ignored ({error}); the next rehearsal writes it anew."
    return boxes, ""


def _fault(entry: Any) -> str:
    """Why an entry cannot be believed; "" where it can."""
    if not isinstance(entry, dict):
        return f"an entry is {entry!r}"
    shares = entry.get("compute_shares", {})
    if not isinstance(shares, dict):
        return f"compute_shares is {shares!r}"
    # (what, figure, most that can be)
    figures = [("runtime_bytes", entry.get("runtime_bytes", 1), 2**50), ("slack_share", entry.get("slack_share", 0.5), 1)]
    figures += [(f"the share of compute of {kind}", share, 1) for kind, share in shares.items()]
    for what, figure, most in figures:
        if isinstance(figure, bool) or not isinstance(figure, (int, float)) or not 0 < figure <= most:
            return f"{what} is {figure!r}, which cannot be"
    return ""
