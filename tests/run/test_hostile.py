"""A run directory from a stranger: opened, watched, summed up, compared, evaluated and resumed, it runs nothing, reads nothing outside and says
nothing to the terminal or the page but text."""

import json
import os
import pickle
import shutil
import subprocess
import sys

import pytest
from support import run_cli, stop_after

import sparklab as sl
from sparklab.errors import RunError, SparklabError
from sparklab.files import read_json, write_json
from sparklab.run.directory import RunDirectory
from sparklab.run.events import EventReader
from sparklab.text import harmless_json

EVIL = "\x1b]0;owned\x07\x1b[31m\x9b31m\u202e<script>alert(1)</script><img src=x onerror=alert(2)>"


class Bomb:
    """A pickle that leaves a file behind when it is loaded."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def harmless(text):
    """No terminal escape, no control character, no direction override."""
    return not any(char in text for char in "\x1b\x07\x9b\u202e")


@pytest.fixture
def hostile(tmp_path):
    """A finished run whose every text is an attack, with pickles in every place where somebody might look for weights."""
    mark = tmp_path / "owned"
    recipe = sl.Recipe(model="tiny", data=f"chats{EVIL}.jsonl", sample_prompts=(EVIL,))
    directory = RunDirectory.create(tmp_path / "run", recipe, {"peak_gib": EVIL, "lines": [{"name": EVIL, "phase": EVIL, "gib": 1, "formula": EVIL}]}, {})
    bomb = pickle.dumps(Bomb(mark))
    for folder in (directory.path / "adapter", directory.path / "checkpoints" / "step-000004"):
        folder.mkdir(parents=True)
        for name in ("adapter_model.bin", "pytorch_model.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "scaler.pt", "x.pkl"):
            (folder / name).write_bytes(bomb)
        (folder / "adapter_config.json").write_text(
            json.dumps({"base_model_name_or_path": "../../secret", "auto_mapping": {"parent_library": "os"}, "peft_type": EVIL})
        )
        (folder / "modeling_evil.py").write_text(f"import os; os.system('touch {mark}')")
        (folder / "config.json").write_text(json.dumps({"auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"}}))
    events = [
        {"event": "started", "device": EVIL, "method": EVIL, "resumed_from": EVIL, "nth": -5}, {"event": "phase", "phase": EVIL, "detail": EVIL},
        {"event": "step", "step": 10**400, "loss": EVIL, "nth": 10**30}, {"event": "sample", "step": 1, "prompt": EVIL, "text": EVIL * 1000, "nth": []},
        {"event": "command", "name": EVIL, "detail": EVIL}, {"event": "warning", "message": EVIL}, {"event": "retry", "row_tokens": EVIL, "phase": EVIL},
        {"event": "learning_rate", "learning_rate": EVIL}, {"event": "changed", "what": {EVIL: EVIL}},
        {"event": "checkpoint", "path": "../../../etc/passwd", "step": EVIL},
        {"event": EVIL}, {"event": "memory", "others": {EVIL: EVIL}}, {"event": "failed", "fact": EVIL, "fix": EVIL},
    ]  # fmt: skip
    lines = [json.dumps({"seq": number, "time": 1000.0 + number, **event}) for number, event in enumerate(events)]
    directory.events_path.write_text("\n".join([*lines, "[" * 50_000, '{"event":"warning","message":"' + "x" * 3_000_000 + '"}', ""]))
    directory.log_path.write_text(EVIL)
    (directory.path / "worker.lock").write_text(json.dumps({"pid": 1, "host": EVIL, "boot": EVIL, "pids": EVIL, "ticks": EVIL, "since": 0}))
    os.utime(directory.path / "worker.lock", (2e9, 2e9))  # and a heartbeat from the future
    (directory.path / "guard.json").write_text(json.dumps({"reason": EVIL, "fix": EVIL, "numbers": {EVIL: EVIL}}))
    return directory.path, mark


def test_it_is_opened_watched_and_summed_up_and_nothing_happens(hostile):
    from sparklab.panels.terminal import summary

    path, mark = hostile
    run = sl.Run.open(path)
    state = run.state
    assert state.status == "failed" and len(state.samples) == 1
    texts = [
        repr(run),
        harmless_json(json.dumps(run.to_dict(), default=str)),
        summary(state, run.directory.plan),
        str(run.directory.owner),
        run.directory.log_tail(),
    ]
    with pytest.raises(SparklabError) as caught:
        run.wait(5)
    texts.append(str(caught.value))
    for text in texts:
        assert harmless(text)
    assert not mark.exists()


def test_resumed_compared_and_evaluated_it_is_refused(hostile):
    path, mark = hostile
    run = sl.Run.open(path)
    for ask in (lambda: run.resume(inline=True, panel=False), lambda: run.compare([EVIL]), lambda: run.evaluate(1)):
        with pytest.raises(SparklabError) as caught:
            ask()
        assert harmless(str(caught.value))
    assert not mark.exists() and EventReader(path / "events.jsonl").path.stat().st_size > 3_000_000, "nothing was written into it"


@pytest.mark.slow
def test_the_command_line_says_text_and_nothing_else(hostile):
    path, mark = hostile
    for verb in (["watch"], ["watch", "--json"], ["resume"], ["resume", "--json"], ["compare", "--json"], ["stop"]):
        done = run_cli(verb[0], path, *(["hello"] if verb[0] == "compare" else []), *verb[1:])
        assert harmless(done.stdout + done.stderr) and done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        if "--json" in verb:
            assert json.loads(done.stdout.splitlines()[0])
    assert not mark.exists()


@pytest.mark.parametrize(
    "name", ["recipe.json", "events.jsonl", "environment.json", "plan.json", "commands", "checkpoints", "adapter", "worker.lock", "worker.log", "guard.json"]
)
def test_no_link_is_followed(tmp_path, name):
    """Whatever a run keeps in its directory: a link in its place is named, and what it leads to is neither read nor touched."""
    secret = tmp_path / "secret"
    if "." in name:
        secret.write_text('{"event": "warning", "message": "secret"}\n')
    else:
        secret.mkdir()
        (secret / "1-stop.json").write_text('{"command": "stop"}')
    directory = RunDirectory.create(tmp_path / "run", sl.Recipe(model="tiny", data="x.jsonl"), {}, {})
    place = directory.path / name
    if place.is_dir():
        place.rmdir()
    if name == "recipe.json":
        secret.write_text(place.read_text())
    place.unlink(missing_ok=True)
    place.symlink_to(secret)
    before = secret.read_text() if secret.is_file() else sorted(secret.iterdir())
    with pytest.raises(RunError, match=f"{name} leads elsewhere"):
        RunDirectory(directory.path)
    with pytest.raises(RunError, match="nothing outside a run directory is followed"):
        sl.Run.open(directory.path)
    assert (secret.read_text() if secret.is_file() else sorted(secret.iterdir())) == before


def test_links_that_come_after_the_opening_are_not_followed_either(tmp_path):
    directory = RunDirectory.create(tmp_path / "run", sl.Recipe(model="tiny", data="x.jsonl"), {}, {})
    secret = tmp_path / "secret"
    secret.write_text('{"event": "warning", "message": "secret"}\n')
    for name in ("events.jsonl", "plan.json", "worker.log", "worker.lock"):
        (directory.path / name).unlink(missing_ok=True)
        (directory.path / name).symlink_to(secret)
    assert directory.state.messages == [] and directory.plan == {} and directory.log_tail() == "" and not directory.is_alive
    for write in (directory.open_log, directory.lock):
        with pytest.raises((OSError, RunError)):
            write()
    assert secret.read_text().count("\n") == 1


@pytest.mark.parametrize(
    "make", [os.mkfifo, lambda path: path.write_bytes(b" " * 20_000_000), lambda path: path.write_text("[" * 100_000), lambda path: path.mkdir()]
)
def test_json_that_is_a_pipe_or_endless_is_refused_at_once(tmp_path, make):
    make(tmp_path / "plan.json")
    with pytest.raises((OSError, ValueError)):
        read_json(tmp_path / "plan.json")


def test_paths_in_a_checkpoint_lead_nowhere(tmp_path):
    from sparklab.engine import checkpoint

    (tmp_path / "secret").write_text("x")
    folder = tmp_path / "checkpoints" / "step-000001"
    folder.mkdir(parents=True)
    for files in ({"../../secret": [1, "x"]}, {"/etc/passwd": [1, "x"]}, {"a": 3}, {"a": [1]}, {"a": ["x", "y"]}, [], None):
        write_json(folder / "manifest.json", {"files": files})
        assert checkpoint.faults(folder), files
    shutil.rmtree(folder)
    folder.symlink_to(tmp_path)
    assert checkpoint.steps(tmp_path / "checkpoints") == []
    (folder.parent / "step-99999999999999999999").mkdir()
    assert checkpoint.steps(folder.parent) == []


@pytest.mark.slow
def test_pickles_beside_a_good_result_are_never_loaded(quick_recipe, tmp_path, monkeypatch):
    """A real run with pickles planted beside every file that is read: it resumes and answers, and none of them goes off."""
    mark = tmp_path / "owned"
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        run = sl.train(quick_recipe(), tmp_path / "run", inline=True, panel=False)
    bomb = pickle.dumps(Bomb(mark))

    def plant(folder):
        for name in (
            "adapter_model.bin",
            "pytorch_model.bin",
            "optimizer.pt",
            "optimizer.bin",
            "scheduler.pt",
            "rng_state.pth",
            "training_args.bin",
            "scaler.pt",
        ):
            (folder / name).write_bytes(bomb)

    plant(run.path / "checkpoints" / "step-000003")
    assert run.resume(inline=True, panel=False).status == "finished"
    plant(run.path / "adapter")
    assert len(run.compare(["Hello!"]).rows) == 1
    assert not mark.exists()
    subprocess.run([sys.executable, "-c", "import pickle, sys; pickle.load(open(sys.argv[1], 'rb'))", str(run.path / "adapter" / "optimizer.pt")], check=True)
    assert mark.exists(), "the bomb works"
