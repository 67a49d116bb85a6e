"""Fill and time of packing over length mixes: writes benchmarks/packing.md.

python benchmarks/packing.py [--documents N]
"""

from __future__ import annotations

import argparse
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from sparklab.box import Box
from sparklab.data.pack import pack_flat

MIXES: dict[str, Callable[[random.Random], float]] = {
    "lognormal": lambda rng: rng.lognormvariate(5.5, 1),
    "bimodal": lambda rng: rng.gauss(80, 20) if rng.random() < 0.5 else rng.gauss(700, 150),
    "long": lambda rng: rng.lognormvariate(6.5, 0.6),
    "short": lambda rng: rng.gauss(60, 10),
    "all 683": lambda _rng: 683,
}


def draw(mix: str, count: int, row_tokens: int) -> list[int]:
    """Lengths from 8 to a whole row."""
    rng = random.Random(mix)
    return [min(max(int(MIXES[mix](rng)), 8), row_tokens) for _ in range(count)]


def measure(mix: str, count: int, row_tokens: int) -> str:
    """A line of the table."""
    lengths = draw(mix, count, row_tokens)
    wall, cpu = time.perf_counter(), time.process_time()
    documents, borders = pack_flat(lengths, row_tokens)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    rows = len(borders) - 1
    assert sorted(documents.tolist()) == list(range(count))
    best = -(-count // (row_tokens // lengths[0])) if len(set(lengths)) == 1 else -(-sum(lengths) // row_tokens)
    a_row = (borders[1:] - borders[:-1]).tolist()
    spread = f"{statistics.mean(a_row):.1f} ({min(a_row)} to {max(a_row)})"
    return f"| {mix} | {row_tokens:,} | {rows:,} | {best:,} | {sum(lengths) / (rows * row_tokens):.2%} | {spread} | {wall:.2f} | {cpu:.2f} |"


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=1_000_000)
    count = parser.parse_args().documents
    lines = [measure(mix, count, row_tokens) for mix in MIXES for row_tokens in (2048, 8192)]
    text = f"""# Packing

`python benchmarks/packing.py --documents {count}`, {Box.detect().chip}, one core, Python {platform.python_version()}.

{count:,} documents. *Least* is how many rows there must be at least: all tokens over a row's, or, where all lengths are equal, documents over how
many a row takes. Documents a row: mean, fewest and most; the last says whether some rows are left with nothing but short ones.

| lengths | tokens a row | rows | least | fill | documents a row | seconds | processor seconds |
|---|---|---|---|---|---|---|---|
""" + "\n".join(lines)
    Path(__file__).with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
