"""What many tests share: a lesson of a few records on the bundled model, small enough for seconds."""

import os

import pytest
from support import write_chats

from sparklab.box import calibration
from sparklab.data.lesson import lesson

os.environ["SPARKLAB_DATA_CACHE"] = "off"  # nor does one find what another has tokenised
os.environ["SPARKLAB_CALIBRATION"] = "off"  # no test looks at what its machine has measured, or leaves something there


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


@pytest.fixture
def calibrated(tmp_path, monkeypatch):
    """Calibration on, in a cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(calibration.SWITCH)
    return tmp_path / "cache" / "sparklab" / "calibration.json"
