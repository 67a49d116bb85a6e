"""A run directory as a worker would have left it, and states made of events."""

import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import sparklab as sl
from sparklab.run.directory import RunDirectory
from sparklab.run.events import EventWriter
from sparklab.run.state import RunState

PLAN = {
    "peak_gib": 3.2,
    "usable_gib": 21.4,
    "peak_phase": "train",
    "method": "lora",
    "lines": [
        {"name": "base weights", "phase": "train", "gib": 1.2, "formula": "0.6e9 x 2 B"},
        {"name": "activations", "phase": "train", "gib": 1.1, "formula": ""},
        {"name": "adapters <i>", "phase": "train", "gib": 0.4, "formula": ""},
        {"name": "Python and libraries", "phase": "train", "gib": 0.5, "formula": ""},
        {"name": "base weights", "phase": "load", "gib": 1.2, "formula": ""},
    ],
}
HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>\x1b[31mred\x1b[0m\x00\u202e\udc80"
ARABIC = "مرحبا بالعالم"
WORKER = Path(__file__).with_name("fake_worker.py")


def make_directory(path, plan=PLAN, **changes):
    return RunDirectory.create(path, sl.Recipe(model="Qwen/Qwen3-0.6B", data="chats.jsonl", **changes), plan, {})


def start_worker(directory, *arguments):
    return subprocess.Popen([sys.executable, str(WORKER), str(directory.path), *map(str, arguments)], stdin=subprocess.DEVNULL)


def steps(count, *, first=1, total=100, loss=lambda i: 2.0 / i, seconds=0.01):
    return [
        {"event": "step", "time": 1000.0 + i, "step": i, "steps": total, "epoch": i / total, "loss": loss(i), "learning_rate": 1e-4, "grad_norm": 0.5,
         "tokens": 100, "seconds": seconds + i * 1e-6}
        for i in range(first, first + count)
    ]  # fmt: skip


STARTED = {"event": "started", "time": 1000.0, "device": "cpu", "method": "lora", "resumed_from": None}


def state_of(*events):
    state = RunState()
    for event in events:
        state.add({"time": 1000.0, **event})
    return state


def write(directory, *events):
    with EventWriter(directory.events_path) as writer:
        for event in events:
            writer.write(event["event"], **{key: value for key, value in event.items() if key not in ("event", "seq", "time")})


def elements(content):
    """(tag, attributes) of every element, as a browser would read them."""
    found = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: found.append((tag, dict(attributes)))
    parser.feed(content)
    return found


def assert_inert(content, *tags):
    """Nothing but these elements, none of which can run anything or load anything but an image that it carries itself."""
    for tag, attributes in elements(content):
        assert tag in tags, tag
        assert not [name for name in attributes if name.startswith("on")], attributes
        assert attributes.get("src", "data:image/svg+xml;base64,").startswith("data:image/svg+xml;base64,")
        assert "url(" not in attributes.get("style", "") and "href" not in attributes
