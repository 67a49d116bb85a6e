"""The guard of a run: the floors below which memory must not fall, and the watchdog that holds a worker to them.

The process itself is :mod:`sparklab.box.watchdog`; what it asked for or did comes back as a ``stop`` command, or as ``guard.json`` in the run's
directory, each with its reason, its cheapest fix and the figures it saw.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from sparklab.box import Box, watchdog
from sparklab.errors import DoesNotFit
from sparklab.files import read_json
from sparklab.planner.recipe import Recipe
from sparklab.text import one_line
from sparklab.units import GIB, NA, format_bytes, is_na

PROC: Final = "SPARKLAB_GUARD_PROC"  # a directory that stands for /proc as the guard sees it: rehearsals of the trip, and tests
LEFT: Final = "guard.json"
SHARE_OF_HOST: Final = 0.04  # soft floor where memory that runs out ends a process and not the box
MOST_ON_HOST: Final = 2.0 * GIB


@dataclass(frozen=True)
class Floors:
    """MemAvailable below ``soft_bytes``: save a checkpoint and stop. Below ``hard_bytes``: be ended. The other two are those of a container's limit."""

    soft_bytes: float
    hard_bytes: float
    limit_soft_bytes: float = NA
    limit_hard_bytes: float = NA


def floors_of(recipe: Recipe, box: Box) -> Floors | None:
    """The recipe's floors, or the box's own; None where the recipe has no guard, or the system does not tell what is available.

    On a unified box the soft floor is what every plan leaves free (8 GiB on a DGX Spark: others' watchdogs there use 8 to 16), so that a plan
    that fits never trips it, and the hard floor half of that. Elsewhere it is the host's memory that is watched, which a run that computes on
    a GPU hardly fills and whose end the system survives: 4 % of it up to 2 GiB, and half of that. The same holds within the limit of a container,
    whose end the box survives too. Floors that the recipe names are those of both.
    """
    pool = watchdog.read_pool(proc())
    if not recipe.guard or is_na(pool["available_bytes"]) or not hasattr(os, "pidfd_open"):
        return None
    system = _pair(recipe, box.reserve_bytes if box.unified else min(SHARE_OF_HOST * pool["total_bytes"], MOST_ON_HOST))
    limit = watchdog.read_group(proc(), pool["total_bytes"]).get("limit_bytes")
    return Floors(*system) if limit is None else Floors(*system, *_pair(recipe, min(SHARE_OF_HOST * limit, MOST_ON_HOST)))


def _pair(recipe: Recipe, soft: float) -> tuple[float, float]:
    """(soft, hard): the recipe's own, or ``soft`` and half of it."""
    hard = soft / 2
    if recipe.hard_floor_gib is not None:
        hard = recipe.hard_floor_gib * GIB
        soft = max(soft, hard)
    if recipe.soft_floor_gib is not None:
        soft = recipe.soft_floor_gib * GIB
        hard = hard if recipe.hard_floor_gib is not None else min(hard, soft / 2)
    return soft, hard


def last_floor(recipe: Recipe, box: Box) -> Floors | None:
    """The hard floor alone: for what has nothing to save, such as a rehearsal."""
    floors = floors_of(recipe, box)
    return floors and Floors(floors.hard_bytes, floors.hard_bytes, floors.limit_hard_bytes, floors.limit_hard_bytes)


def check_plan(recipe: Recipe, box: Box, peak_bytes: float) -> None:
    """Raises :class:`DoesNotFit` where the plan would leave less than the recipe's own soft floor: the guard would stop the run as soon as it is at work.

    The box's own floor is below what every plan leaves. Where a GPU has memory of its own, that is not what the guard watches.
    """
    soft = None if not recipe.guard or recipe.soft_floor_gib is None else recipe.soft_floor_gib * GIB
    left = box.available_bytes - peak_bytes
    if soft is None or (box.is_gpu and not box.unified) or not left < soft:  # NA compares false
        return
    raise DoesNotFit(
        f"the plan leaves {format_bytes(max(0.0, left))} of memory free, less than soft_floor_gib, {format_bytes(soft)}: the guard would stop the run",
        f"soft_floor_gib of at most {max(0.0, left) / GIB:.3g}, or a smaller plan: fewer micro_batch_tokens, more checkpoint_layers",
    )


def proc() -> str:
    """What the guard reads: /proc, unless the environment names a directory in its place."""
    return os.environ.get(PROC) or "/proc"


@contextmanager
def watching(run: Path, floors: Floors | None, group: bool) -> Iterator[None]:
    """A watchdog beside this process as long as the block lasts; it goes with this process whatever becomes of it.

    ``group``: what this process started ends with it, which is right for a worker that leads a session of its own and wrong in a notebook.
    """
    if floors is None:
        yield
        return
    known = {name: size for name, size in asdict(floors).items() if not is_na(size)}
    options = {"pid": os.getpid(), "group": group, "run": str(run.resolve()), "proc": proc(), **known}
    command = [sys.executable, "-I", "-S", watchdog.__file__, json.dumps(options)]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def left_behind(run: Path) -> dict[str, Any] | None:
    """What the watchdog left when it ended the last worker: ``level``, ``reason``, ``fix``, ``numbers`` ...; None where it did not.

    The file is anybody's: what is not as it should be counts as nothing.
    """
    try:
        content = read_json(run / LEFT, 2**16)
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict) or not isinstance(content.get("numbers"), dict):
        return None
    return {**content, "reason": one_line(content.get("reason", ""), 1000), "fix": one_line(content.get("fix", ""), 1000)}


def clear(run: Path) -> None:
    """Takes away what was left behind, once it is written down elsewhere."""
    (run / LEFT).unlink(missing_ok=True)
