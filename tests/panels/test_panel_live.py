"""The live panel's life without a browser: it follows, answers, freezes, and its thread ends."""

import importlib.metadata
import sys
import threading
import time
import types
import warnings

import nbformat
import pytest
from scenes import STARTED, make_directory, start_worker, steps, write

from sparklab.panels import run_panel
from sparklab.panels.watch import Watch


class Handle:
    def __init__(self, bundle):
        self.bundles = [bundle]

    def update(self, bundle, raw):
        assert raw
        self.bundles.append(bundle)


@pytest.fixture
def kernel(monkeypatch, widget_class):
    """A pretended kernel whose outputs are kept."""
    handles = []

    def display(bundle, raw, display_id):
        assert raw and display_id
        handles.append(Handle(bundle))
        return handles[-1]

    import IPython.display

    monkeypatch.setattr(IPython.display, "display", display)
    monkeypatch.setattr(sys.modules["IPython"], "get_ipython", lambda: types.SimpleNamespace(kernel=object()))
    return handles


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def hold(directory):
    import os

    descriptor = directory.lock()
    return lambda: os.close(descriptor)


def test_outside_a_kernel_there_is_no_panel(directory):
    assert run_panel.show(directory) is None


def test_it_follows_answers_and_freezes(directory, kernel):
    release = hold(directory)
    write(directory, STARTED, *steps(5))
    panel = run_panel.show(directory)
    assert set(kernel[0].bundles[0]) == {"text/plain", "text/html"} and panel.widget.home in kernel[0].bundles[0]["text/html"], "the twin, with a place"
    wait_for(lambda: panel.widget.head["rows"] == 5)
    write(directory, *steps(5, first=6))
    wait_for(lambda: panel.widget.head["rows"] == 10)

    panel.command("stop")
    assert panel.widget.ack["text"] == "Stopping…" and panel.widget.ack["waiting"] == ["stop"]
    assert [content["command"] for _, content in directory.take_commands()] == ["stop"]
    write(directory, {"event": "command", "name": "stop", "id": "1", "detail": "after this step"})
    wait_for(lambda: panel.widget.ack["waiting"] == [])
    assert panel.widget.ack["text"] == "stop: after this step"

    write(directory, {"event": "stopped", "step": 10, "reason": "asked to stop"})
    release()
    assert panel.join(10), "the thread ends with the run"
    last = kernel[0].bundles[-1]
    assert set(last) == {"text/plain", "text/html"} and "asked to stop" in last["text/html"]
    assert panel.widget.home and panel.widget.home not in last["text/html"], "nothing takes the last picture's place"
    count = len(kernel[0].bundles)
    panel.freeze()
    assert len(kernel[0].bundles) == count + 1, "wait() repeats the freeze for nbclient"


def test_a_button_that_cannot_reach_the_worker_says_so(directory, kernel):
    release = hold(directory)
    write(directory, STARTED, *steps(1))
    panel = run_panel.show(directory)
    (directory.path / "commands").rmdir()
    panel.command("checkpoint")
    assert "could not be asked for" in panel.widget.ack["text"] and panel.widget.ack["waiting"] == []
    panel.command("format the disk")
    assert "format" not in panel.widget.ack["text"]
    panel.freeze()
    release()
    assert panel.join(10)


def test_a_finished_run_is_shown_as_its_twin_at_once(directory, kernel):
    write(directory, STARTED, *steps(5), {"event": "finished", "step": 5})
    panel = run_panel.show(directory)
    assert panel.widget is None and set(kernel[0].bundles[0]) == {"text/plain", "text/html"} and panel.join(0)
    assert "Finished" in kernel[0].bundles[0]["text/html"] and "Finished, step 5 of 100" in kernel[0].bundles[0]["text/plain"]
    panel.freeze()


def test_freezing_early_ends_the_thread_and_leaves_the_run_alone(directory, kernel):
    release = hold(directory)
    write(directory, STARTED, *steps(5))
    panel = run_panel.show(directory)
    panel.freeze()
    assert panel.join(10) and directory.take_commands() == []
    assert "text/html" in kernel[0].bundles[-1]
    release()


def test_a_young_run_is_awaited_and_an_old_one_is_lost(directory):
    watch = Watch(directory)
    assert watch.refresh().status == "starting" and not watch.over
    import os

    os.utime(directory.events_path, (1, 1))
    watch.refresh()
    assert watch.over and watch.state.status == "lost"


def test_a_promised_worker_is_awaited_until_it_comes(directory):
    write(directory, STARTED, *steps(2), {"event": "stopped", "step": 2, "reason": "asked"})
    assert Watch(directory).refresh().status == "stopped"
    watch = Watch(directory, starting=True)
    assert watch.refresh().status == "starting" and not watch.over
    release = hold(directory)
    write(directory, {**STARTED, "resumed_from": 2})
    assert watch.refresh().status == "running" and not watch.over
    write(directory, {"event": "finished", "step": 2})
    release()
    watch.refresh()
    assert watch.over and watch.state.status == "finished"


def test_a_vanished_worker_is_told(directory, kernel):
    worker = start_worker(directory, "--steps", "50", "--delay", "0.01", "--load", "0", "--die-at", "20")
    panel = run_panel.show(directory)
    assert worker.wait(30) == 9 and panel.join(10)
    assert "Lost" in kernel[0].bundles[-1]["text/html"] and "resume the run" in kernel[0].bundles[-1]["text/html"]


def test_where_outputs_have_frames_of_their_own_the_widget_is_shown_itself(directory, kernel, monkeypatch):
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    release = hold(directory)
    write(directory, STARTED, *steps(5))
    panel = run_panel.show(directory)
    assert set(kernel[0].bundles[0]) == {"text/plain", "application/vnd.jupyter.widget-view+json"} and panel.widget.home == ""
    panel.freeze()
    assert set(kernel[0].bundles[-1]) == {"text/plain", "text/html"} and panel.join(10)
    release()


def test_where_no_thread_reaches_the_page_a_waiting_cell_moves_the_panel(directory, kernel, monkeypatch):
    import sparklab as sl

    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    monkeypatch.setattr(run_panel.LivePanel, "_start", lambda _panel: None)
    worker = start_worker(directory, "--steps", "40", "--delay", "0.02", "--load", "0")
    wait_for(lambda: directory.is_alive)
    run = sl.Run.open(directory.path)
    run.panel()
    seen = []
    update = run._panel.widget.update
    run._panel.widget.update = lambda state, plan: (update(state, plan), seen.append(state.step))
    run.wait(60)
    assert worker.wait(10) == 0 and len(set(seen)) >= 3, seen
    assert "Finished" in kernel[0].bundles[-1]["text/html"], "and leaves the picture"


def test_a_picture_is_kept_as_the_run_goes_on_and_says_of_when(directory, kernel, monkeypatch):
    monkeypatch.setattr(run_panel, "KEEP_SECONDS", 0.0)
    release = hold(directory)
    write(directory, STARTED, *steps(5))
    panel = run_panel.show(directory)
    panel._keep_every = 0.0
    write(directory, *steps(5, first=6))
    wait_for(lambda: "step 10 of 100" in kernel[0].bundles[-1]["text/html"])
    assert panel.widget.home in kernel[0].bundles[-1]["text/html"], "the live panel finds its place again"
    assert "Picture of 20" in kernel[0].bundles[-1]["text/html"] and ".panel()" in kernel[0].bundles[-1]["text/html"]
    panel.freeze()
    assert panel.join(10)
    release()


def test_nobody_looking_costs_nothing_and_coming_back_shows_all(directory, kernel):
    release = hold(directory)
    write(directory, STARTED, *steps(5))
    panel = run_panel.show(directory)
    wait_for(lambda: panel.widget.head["rows"] == 5)
    sent = []
    panel.widget.send = lambda content, buffers=None: sent.append(content)
    panel.widget._receive(None, {"command": "seen", "page": "a", "seen": False}, [])
    write(directory, *steps(5, first=6))
    panel.refresh()
    assert panel.widget.head["rows"] == 5 and not sent
    panel.widget._receive(None, {"command": "seen", "page": "a", "seen": True}, [])
    wait_for(lambda: panel.widget.head["rows"] == 10)
    assert sent == [{"kind": "rows", "from": 5, "stride": 1}]
    panel.widget._receive(None, {"command": "seen", "page": "a", "seen": False}, [])
    write(directory, {"event": "finished", "step": 10})
    release()
    assert panel.join(10) and panel.widget.head["status"] == "finished", "the end reaches a page that looks away"


def test_a_page_that_looks_away_gets_one_picture_and_then_none(directory, kernel, monkeypatch):
    monkeypatch.setattr(run_panel, "UNSEEN_SECONDS", 0.3)
    monkeypatch.setattr(run_panel, "KEEP_SECONDS", 0.5)
    release = hold(directory)
    write(directory, STARTED, *steps(5))
    panel = run_panel.show(directory)
    panel._keep_every = 0.5
    wait_for(lambda: len(kernel[0].bundles) >= 3)
    panel._keep_every = 1000.0
    write(directory, *steps(5, first=6))
    wait_for(lambda: panel.widget.head["rows"] == 10)
    pictures = len(kernel[0].bundles)
    assert "step 10 of 100" not in kernel[0].bundles[-1]["text/html"]
    panel.widget._receive(None, {"command": "seen", "page": "a", "seen": False}, [])
    wait_for(lambda: len(kernel[0].bundles) == pictures + 1)
    assert "step 10 of 100" in kernel[0].bundles[-1]["text/html"], "as it was when the page was left"
    panel._keep_every = 0.5
    write(directory, *steps(5, first=11))
    wait_for(lambda: panel._watch.state.step == 15)
    time.sleep(1.2)
    assert len(kernel[0].bundles) == pictures + 1
    panel.widget._receive(None, {"command": "seen", "page": "a", "seen": True}, [])
    wait_for(lambda: "step 15 of 100" in kernel[0].bundles[-1]["text/html"])
    panel.freeze()
    assert panel.join(10)
    release()


def test_a_prompt_goes_with_the_button(directory, kernel):
    release = hold(directory)
    write(directory, STARTED, *steps(1))
    panel = run_panel.show(directory)
    panel.widget._receive(None, {"command": "sample", "prompts": ["Hello?", "", 3]}, [])
    assert [content for _, content in directory.take_commands()] == [{"command": "sample", "prompts": ["Hello?"]}]
    panel.freeze()
    release()
    assert panel.join(10)


def test_at_most_five_messages_a_second(directory, kernel):
    release = hold(directory)
    write(directory, STARTED)
    panel = run_panel.show(directory)
    sent = []
    panel.widget.send = lambda content, buffers=None: sent.append(content)
    begin = time.monotonic()
    step = 0
    while time.monotonic() - begin < 1.5:
        write(directory, *steps(10, first=step + 1, total=10_000))
        step += 10
        time.sleep(0.005)
    seconds = time.monotonic() - begin
    panel.freeze()
    panel.join(10)
    release()
    assert 1 <= len(sent) <= seconds / run_panel.BUSY_SECONDS + 2
    assert len([thread for thread in threading.enumerate() if thread.name.startswith("sparklab-panel")]) == 0


@pytest.mark.slow
def test_nbclient_neither_hangs_nor_loses_the_freeze(tmp_path, monkeypatch):
    import nbclient

    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    directory = make_directory(tmp_path / "chat-1")
    worker = start_worker(directory, "--steps", "60", "--delay", "0.02")
    cells = [
        f"from sparklab.panels.run_panel import show\nfrom sparklab.run.directory import RunDirectory\npanel = show(RunDirectory({str(directory.path)!r}))",
        "panel.join(60)\npanel.freeze()",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # jupyter_client's and zmq's own, which change from release to release
        nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    assert worker.wait(30) == 0
    (output,) = notebook.cells[0].outputs
    assert set(output.data) == {"text/plain", "text/html"} and "Finished" in output.data["text/html"] and "data:image/svg+xml" in output.data["text/html"]
    assert importlib.metadata.version("nbclient")
