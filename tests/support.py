"""Helpers of many tests: the repository's root, a JSONL file of orders, the command line as typed."""

import json
import subprocess
import sys
from pathlib import Path

from sparklab.data.world import orders

ROOT = Path(__file__).parent.parent


def write_chats(path, count=64, split="train", seed=0):
    """A JSONL file of ``count`` orders and their JSON."""
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in orders(split, count, seed)), encoding="utf-8")
    return path


def run_cli(*arguments, cwd=None, timeout=300):
    """``sparklab ARGUMENTS`` as a user types it, in a process of its own."""
    return subprocess.run([sys.executable, "-m", "sparklab", *map(str, arguments)], capture_output=True, text=True, cwd=cwd, timeout=timeout, check=False)


def stop_after(monkeypatch, step):
    """The user's stop command, arriving during a certain update."""
    from sparklab.run.reporter import Reporter  # torch: only those who train pay

    obey = Reporter._obey

    def obey_and_stop(self, control):
        if self.trainer.state.global_step == step:
            self.directory.send("stop")
        obey(self, control)

    monkeypatch.setattr(Reporter, "_obey", obey_and_stop)
