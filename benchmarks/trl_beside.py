"""TRL for the benchmarks that measure beside it, in a folder of its own on top of this environment, so that both sides have the same torch and PEFT."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Final

TRL: Final = "trl==1.16.0"


def trl_folder() -> Path | None:
    """The folder that holds TRL, installed there first where it is not; None where it is installed anyway. Where it cannot be had its measurements say so."""
    if find_spec("trl") is not None:
        return None
    folder = Path(tempfile.gettempdir()) / "sparklab-bench-trl"
    if not (folder / "trl").exists():
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), TRL], check=False)
    return folder
