"""A run directory as a worker would have left it, and a state with something of everything."""

import warnings

import pytest
from scenes import ARABIC, HOSTILE, STARTED, make_directory, state_of, steps


@pytest.fixture
def directory(tmp_path):
    return make_directory(tmp_path / "chat-1")


@pytest.fixture
def full_state():
    """A finished run with something of everything, all text in it hostile."""
    return state_of(
        STARTED,
        {"event": "memory", "process_bytes": 3e9, "peak_bytes": 3.3e9},
        {"event": "eval", "step": 0, "loss": 2.5, "exact_match": 0.02, "n": 200},
        *steps(60, loss=lambda i: None if i == 7 else 2.0 / i),
        {"event": "eval", "step": 60, "loss": 0.4, "exact_match": 0.94, "n": 200},
        {"event": "sample", "step": 60, "prompt": HOSTILE, "text": ARABIC + HOSTILE},
        {"event": "warning", "message": HOSTILE},
        {"event": "failed", "time": 1100.0, "step": 60, "error": HOSTILE, "fact": HOSTILE, "fix": HOSTILE},
    )


@pytest.fixture
def widget_class():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # ipywidgets and anywidget, on import
        from sparklab.panels.widget import RunPanel
    return RunPanel
