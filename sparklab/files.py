"""Files that somebody else may have made, and files that must be there whole: how both are opened, read and written.

A symbolic link is refused wherever a run keeps a file of its own, and so is a pipe or a device that bears such a name: opening one could
wait for ever, or wake something. What is written is written beside its place, brought to the disk, and renamed.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any, Final

from sparklab.units import MIB, format_bytes

LARGEST_JSON: Final = 16 * MIB
"""Bytes of the largest JSON file that is read from a run directory."""


def open_plain(path: Path, flags: int = os.O_RDONLY, mode: int = 0o644) -> int:
    """A file descriptor of a plain file; follows no link in the last place and never waits. Raises OSError: ELOOP for a link, EINVAL for a pipe."""
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, mode)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a plain file", str(path))
    return descriptor


def read_plain(path: Path, limit_bytes: int = LARGEST_JSON) -> str:
    """The text of a plain file of at most ``limit_bytes``. Raises OSError, and ValueError where it is larger or no text."""
    with open(open_plain(path), "rb") as file:
        content = file.read(limit_bytes + 1)
    if len(content) > limit_bytes:
        raise ValueError(f"larger than {format_bytes(limit_bytes)}")
    return content.decode("utf-8")


def read_json(path: Path, limit_bytes: int = LARGEST_JSON) -> Any:
    """What a JSON file holds. Raises OSError and ValueError, also where it is nested beyond reason."""
    try:
        return json.loads(read_plain(path, limit_bytes))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file whole or not at all: beside, to the disk, renamed, and the name brought to the disk too."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        with open(draft, "w", encoding="utf-8") as file:
            json.dump(content, file, ensure_ascii=False, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
        sync(path.parent)
    finally:
        draft.unlink(missing_ok=True)


def reason(error: Exception) -> str:
    """Why a path could not be used, as the system says it; in Python's words where the system was not asked (a NUL in a name)."""
    return getattr(error, "strerror", None) or str(error)


def sync(path: Path) -> None:
    """Brings a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
