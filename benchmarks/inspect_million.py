"""Time and peak memory of inspecting a large JSONL file: writes benchmarks/inspect_million.md.

    python benchmarks/inspect_million.py [--records N]

Memory is the proportional share (PSS) of the whole process tree, looked at five times a second: what the machine gives up for it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from sparklab.box import Box
from sparklab.data.world import orders
from sparklab.units import format_bytes, format_seconds


def write(path: Path, count: int) -> None:
    """A file of ``count`` orders, each with a number of its own."""
    some = list(orders("train", 20_000, 0))
    with path.open("w", encoding="utf-8") as file:
        for number, record in zip(range(count), itertools.cycle(some), strict=False):
            first, *others = record["messages"]
            messages: list[dict[str, Any]] = [{**first, "content": f"{number}: {first['content']}"}, *others]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def tree_bytes(root: int) -> int:
    """The proportional share of a process and all that descend from it."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue
    family = {root}
    while more := {child for child, parent in parents.items() if parent in family} - family:
        family |= more
    total = 0
    for pid in family:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))
        except OSError:
            continue
    return total


def watched(command: list[str], environment: dict[str, str]) -> tuple[float, float, int, dict[str, Any]]:
    """Seconds, processor seconds of all processes, peak bytes, and the JSON that the command printed."""
    started, peak, before = time.perf_counter(), 0, _processor_seconds()
    with tempfile.TemporaryFile() as out, subprocess.Popen(command, stdout=out, env=environment) as process:
        while process.poll() is None:
            peak = max(peak, tree_bytes(process.pid))
            time.sleep(0.2)
        assert process.returncode == 0
        out.seek(0)
        return time.perf_counter() - started, _processor_seconds() - before, peak, json.loads(out.read())


def _processor_seconds() -> float:
    """Of the processes that this one started, once they are over."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=1_000_000)
    count = parser.parse_args().records
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "chats.jsonl"
        write(data, count)
        size = data.stat().st_size
        environment = {**os.environ, "SPARKLAB_DATA_CACHE": f"{folder}/cache"}
        runs = [watched([sys.executable, "-m", "sparklab", "inspect", str(data), "--json"], environment) for _ in range(2)]
        kept = sum(file.stat().st_size for file in Path(folder, "cache").rglob("*") if file.is_file())
    found = runs[0][3]
    report = found["report"]
    assert report["records"] == count
    lines = [
        f"| {name} | {format_seconds(seconds)} | {format_seconds(busy)} | {count / seconds:,.0f} | {format_bytes(peak)} |"
        for name, (seconds, busy, peak, _) in zip(("first time", "again, from the cache"), runs, strict=True)
    ]
    text = f"""# Inspecting {count:,} records

`python benchmarks/inspect_million.py --records {count}`, {Box.detect().chip}, which others used at the same time.

JSONL of {format_bytes(size)}, {report["tokens"] + report["held_out_tokens"]:,} tokens (the bundled tokenizer), in {report["rows"]:,} rows of
{report["row_tokens"]:,}, {report["fill"]:.2%} full. Tokens kept on disk: {format_bytes(kept)}. Peak memory is that of the processes' own, of the command
and all it starts, shared pages counted once (PSS, anonymous and shared); pages of mapped files can be had back and are not in it.

| | time | processor time, all cores | records/s | peak memory |
|---|---|---|---|---|
""" + "\n".join(lines)
    Path(__file__).with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
