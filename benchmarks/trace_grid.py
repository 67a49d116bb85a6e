"""The ledger against the trace, point by point: the grid of tests/planner/grid.py.

    python benchmarks/trace_grid.py [MODEL ...] [--all]

Prints every point more than 2 % apart (``--all``: every point) and the worst, and ends with status 1 where there is one. "moving": of the bytes
that come and go alone.
"""

from __future__ import annotations

import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tests"))
sys.path.append(str(Path(__file__).parents[1] / "tests" / "planner"))
from family_configs import REAL
from grid import RECIPES, Compared, compared, write_config

MOST_APART = 0.02


def main() -> int:
    """Prints the comparison."""
    models = [name for name in sys.argv[1:] if name != "--all"] or list(REAL)
    threshold = 0.0 if "--all" in sys.argv else MOST_APART
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        found = {}
        for model in models:
            path = write_config(Path(folder), model)
            found |= {(model, number): pool.submit(compared, path, changes) for number, changes in enumerate(RECIPES)}
        ratios: dict[tuple[str, int], Compared] = {}
        for (model, number), point in found.items():
            try:
                ratios[model, number] = point.result()
            except Exception as error:  # noqa: BLE001 - whatever torch cannot trace is a failure to show
                print(f"{model} {RECIPES[number]}: {type(error).__name__}: {error}", flush=True)
                continue
            ratio = ratios[model, number]
            if abs(ratio.peak - 1) >= threshold:
                print(f"{model} {number} {RECIPES[number]}: ledger / trace {ratio.peak:.4f}, moving {ratio.moving:.4f}", flush=True)
    wrong = sum(abs(ratio.peak - 1) > MOST_APART for ratio in ratios.values())
    failed = len(found) - len(ratios)
    worst = max(ratios, key=lambda point: abs(ratios[point].peak - 1))
    moving = max(ratios, key=lambda point: abs(ratios[point].moving - 1))
    print(
        f"{len(found)} points, {wrong} more than {MOST_APART:.0%} apart, {failed} not traced; worst {ratios[worst].peak:.4f} ({worst[0]}, {RECIPES[worst[1]]})"
    )
    print(f"worst of what comes and goes: {ratios[moving].moving:.4f} ({moving[0]}, {RECIPES[moving[1]]})")
    return int(wrong + failed > 0)


if __name__ == "__main__":
    sys.exit(main())
