"""What many tests share: a lesson of a few records on the bundled model, small enough for seconds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sparklab.data.lesson import lesson
from sparklab.data.world import orders

ROOT = Path(__file__).parent.parent


def write_chats(path, count=64, split="train", seed=0):
    """A JSONL file of ``count`` orders and their JSON."""
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in orders(split, count, seed)), encoding="utf-8")
    return path


@pytest.fixture
def chats(tmp_path):
    """A JSONL file of 64 orders."""
    return write_chats(tmp_path / "chats.jsonl")


@pytest.fixture
def small_recipe(tmp_path):
    """The quickstart's recipe over 64 records, eight updates of about 256 tokens, seconds long: ``small_recipe(method, **changes)``."""

    def make(method="lora", **changes):
        data = write_chats(tmp_path / "train.jsonl")
        held_out = write_chats(tmp_path / "held_out.jsonl", 8, "held_out")
        base = lesson(method, 0, tmp_path / "lesson")
        settings = {"data": str(data), "held_out": str(held_out), "micro_batch_tokens": 256, "max_length": 256, "max_steps": 8, "answer_held_out": 0}
        return base.replace(**{**settings, "sample_prompts": (), **changes})

    return make


def run_cli(*arguments, cwd=None, timeout=300):
    """``sparklab ARGUMENTS`` as a user types it, in a process of its own."""
    return subprocess.run([sys.executable, "-m", "sparklab", *map(str, arguments)], capture_output=True, text=True, cwd=cwd, timeout=timeout, check=False)
