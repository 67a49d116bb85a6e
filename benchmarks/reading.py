"""How fast records are read and how much memory that takes, by kind of file; and that broken files end in an error.

::

    python benchmarks/reading.py                     # 100,000 chats of about 400 characters
    python benchmarks/reading.py --broken 20000      # as many broken files of every kind, each read to its end or its error
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.json
import pyarrow.parquet

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("jsonl", "json", "csv", "parquet", "arrow")


def write(folder: Path, count: int) -> None:
    """The same chats as every kind of file."""
    said = [(f"Question {index}: how many apples are in the basket? " * 3, f"There are {index} apples. " * 5) for index in range(count)]
    chats = [{"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]} for asked, answer in said]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, chats)), encoding="utf-8")
    (folder / "a.json").write_text(json.dumps(chats), encoding="utf-8")
    (folder / "a.csv").write_text("prompt,completion\n" + "".join(f'"{asked}","{answer}"\n' for asked, answer in said), encoding="utf-8")
    table = pa.json.read_json(folder / "a.jsonl")
    pa.parquet.write_table(table, folder / "a.parquet")
    with pa.OSFile(str(folder / "a.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=1000)


def read(path: str) -> None:
    """Read one file, in a process of its own, and print what it took."""
    from sparklab.data.faults import Faults  # noqa: PLC0415 - so that its imports count
    from sparklab.data.read import open_source  # noqa: PLC0415

    began = time.process_time()
    count = sum(1 for _ in open_source(path).records(Faults()))
    seconds = time.process_time() - began
    # Not getrusage: what the parent held when it started this process counts there.
    peak = next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")) / 2**10
    print(f"{path.rsplit('.', 1)[1]:8} {count:,} records, {seconds / count * 1e6:5.1f} us of CPU each, peak {peak:4.0f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--broken", type=int, default=0)
    parser.add_argument("--read", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read:
        read(options.read)
        return
    with tempfile.TemporaryDirectory() as name:
        if options.broken:
            sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "data")]
            from test_sources import break_and_read  # noqa: PLC0415

            said = break_and_read(Path(name), options.broken)
            print(f"{len(said):,} broken files: {sum(map(bool, said)):,} refused in one error, the others read")
            return
        write(Path(name), options.records)
        for kind in KINDS:
            subprocess.run([sys.executable, __file__, "--read", f"{name}/a.{kind}"], check=True)


if __name__ == "__main__":
    main()
