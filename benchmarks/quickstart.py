"""The quickstart, five seeds by three methods: exact match before and after, and how long each took.

    python benchmarks/quickstart.py [--jobs N]

Writes benchmarks/quickstart.md. Every run is the command a newcomer types, in a process and a directory of its own; with more than one job they
run beside each other, which makes each slower.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import sparklab as sl

SEEDS = range(5)
METHODS = ("lora", "qlora", "full")
COLUMNS = ("exact_match_before", "exact_match_after", "seconds", "tokens_per_second", "planned_gib", "measured_gib")


def quickstart(method: str, seed: int) -> dict[str, Any]:
    """What ``sparklab quickstart --json`` prints."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "sparklab", "quickstart", "--method", method, "--seed", str(seed), "--run", f"{folder}/run", "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout)
    print(method, seed, {name: result[name] for name in COLUMNS}, flush=True)
    return {"seed": seed, **result}


def table(results: list[dict[str, Any]], jobs: int) -> str:
    lines = [
        "# The quickstart, five seeds by three methods",
        "",
        f"`python benchmarks/quickstart.py --jobs {jobs}` on {sl.Box.detect().chip}, Python {platform.python_version()}: {jobs} at a time.",
        f"Exact match on {results[0]['held_out']} held-out orders; seconds of the worker, from its start to its end; non-pad tokens a second.",
        "",
        "| method | seed | before | after | seconds | tokens/s | planned GiB | measured GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['method']} | {r['seed']} | {r['exact_match_before']:.1%} | {r['exact_match_after']:.1%} | {r['seconds']:.0f} "
        f"| {r['tokens_per_second']:,.0f} | {r['planned_gib']:.2f} | {r['measured_gib']:.2f} |"
        for r in results
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="runs beside each other")
    jobs = parser.parse_args().jobs
    pairs = [(method, seed) for method in METHODS for seed in SEEDS]
    with ThreadPoolExecutor(jobs) as pool:
        results = list(pool.map(lambda pair: quickstart(*pair), pairs))
    Path(__file__).with_suffix(".md").write_text(table(results, jobs), encoding="utf-8")


if __name__ == "__main__":
    main()
