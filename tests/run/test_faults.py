"""What goes wrong around a run: each with a clear word, no checkpoint lost, and a resume that ends as if nothing had been."""

import contextlib
import errno
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from support import stop_after

import sparklab as sl
from sparklab.errors import RunBusy, RunChanged, RunError
from sparklab.run import events as diary
from sparklab.run import inputs, lock, worker
from sparklab.run.directory import RunDirectory
from sparklab.run.events import EventReader, EventWriter, story
from sparklab.units import KIB

pytestmark = pytest.mark.slow

NOBODY = 65534


def events(run, kind=None):
    found = [json.loads(line) for line in run.directory.events_path.read_text().splitlines()]
    return [event for event in found if kind is None or event["event"] == kind]


def wait_for(condition, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen"
        time.sleep(0.05)


def losses(run):
    return [event["loss"] for event in story(EventReader(run.directory.events_path).read_new()) if event["event"] == "step"]


@pytest.fixture
def whole(quick_recipe, tmp_path):
    """The run that nothing happened to."""
    return sl.train(quick_recipe(save_every=2, eval_every=3), tmp_path / "whole", inline=True, panel=False)


# the disk


def full():
    raise OSError(errno.ENOSPC, "No space left on device")


WRITES = {
    "a checkpoint's weights": ("sparklab.engine.checkpoint.save_weights", 2),
    "its moments": ("sparklab.engine.checkpoint.save_optimizer", 2),
    "its small files": ("sparklab.engine.checkpoint._write_json", 5),
    "its manifest": ("sparklab.engine.checkpoint._seal", 2),
    "its name": ("os.rename", 2),
    "bringing it to the disk": ("sparklab.engine.checkpoint.sync", 5),
    "the result": ("sparklab.engine.checkpoint.save_weights", 5),
    "the tokenizer": ("transformers.PreTrainedTokenizerBase.save_pretrained", 1),
}


def test_a_disk_that_fills_at_any_write_is_said_and_costs_no_update(whole, quick_recipe, tmp_path, monkeypatch):
    """Four checkpoints and a result: at whichever of their writes the disk is full, the last good checkpoint stays, and the end is the same."""
    recipe = whole.recipe
    for number, (what, (place, call)) in enumerate(WRITES.items()):
        module, name = place.rsplit(".", 1)
        real, calls = pytest.MonkeyPatch(), []
        target = _named(module)
        original = getattr(target, name)

        def counted(*arguments, original=original, calls=calls, call=call, **options):
            calls.append(1)
            return full() if len(calls) == call else original(*arguments, **options)

        real.setattr(target, name, counted)
        try:
            run = sl.train(recipe, tmp_path / f"run{number}", inline=True, panel=False)
        finally:
            real.undo()
        assert (run.status, events(run, "failed")[-1]["error"]) == ("failed", "DiskFull"), what
        assert "free some space" in run.state.fix and "disk is full" in run.state.reason
        assert all((entry / "manifest.json").is_file() for entry in (run.path / "checkpoints").iterdir() if entry.name.startswith("step")), what
        assert run.resume(inline=True, panel=False).status == "finished", what
        assert losses(run) == losses(whole) and len(events(run, "started")) == 2, what
        assert not list(run.path.rglob(".*.new")) and not (run.path / ".reserve").exists()
        assert (run.path / "adapter" / "adapter_model.safetensors").read_bytes() == (whole.path / "adapter" / "adapter_model.safetensors").read_bytes()


def _named(module):
    """The module or class of a dotted name."""
    import importlib

    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        home, _, name = module.rpartition(".")
        return getattr(importlib.import_module(home), name)


def test_a_really_full_disk(quick_recipe, tmp_path, monkeypatch):
    """A small file system of its own where the tests may mount one; elsewhere a limit on the size of any file: the kernel says no in both."""
    from sparklab.engine import checkpoint

    recipe = quick_recipe("full", save_every=2)  # the room holds one checkpoint, and not the next
    mount = tmp_path / "small"
    mount.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)], capture_output=True, check=False).returncode == 0
    monkeypatch.setattr("sparklab.run.launch.check_disk", lambda *_: None)
    try:
        with contextlib.nullcontext() if mounted else _file_limit(300 * KIB):
            run = sl.train(recipe, mount / "run", inline=True, panel=False)
        assert (run.status, events(run, "failed")[-1]["error"]) == ("failed", "DiskFull")
        assert all(checkpoint.faults(entry) == [] for entry in (run.path / "checkpoints").iterdir()), "half a checkpoint"
        if mounted:
            subprocess.run(["mount", "-o", "remount,size=100m", str(mount)], check=True)
        assert run.resume(inline=True, panel=False).status == "finished"
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(mount)], check=True)


@contextlib.contextmanager
def _file_limit(size_bytes):
    import resource
    import signal

    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_a_diary_that_cannot_grow_still_takes_the_last_word(whole, quick_recipe, tmp_path, monkeypatch):
    """The disk fills while an event is written: what was held back at the start makes room for the word that says so."""
    write = EventWriter.write

    def until_full(self, event, **fields):
        if (event == "step" and fields["step"] == 5) or (event == "failed" and (tmp_path / "run" / ".reserve").exists()):
            full()
        return write(self, event, **fields)

    monkeypatch.setattr(EventWriter, "write", until_full)
    run = sl.train(whole.recipe, tmp_path / "run", inline=True, panel=False)
    monkeypatch.undo()
    assert (run.status, events(run, "failed")[0]["error"]) == ("failed", "DiskFull")
    assert run.resume(inline=True, panel=False).status == "finished" and losses(run) == losses(whole)


@contextlib.contextmanager
def _without_privileges():
    """As root nothing is read-only; as nobody it is."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_read_only_directory_is_watched_and_refuses_work(whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        run = sl.train(whole.recipe, tmp_path / "run", inline=True, panel=False)
    with tempfile.TemporaryDirectory() as folder:  # where others may look in, unlike in pytest's own
        os.chmod(folder, 0o755)
        copy = Path(folder) / "run"
        shutil.copytree(run.path, copy)
        folders = [copy, *(path for path in copy.rglob("*") if path.is_dir())]
        for path in folders:
            path.chmod(0o555)
        for path in copy.glob("*.*"):
            path.chmod(0o444)
        with _without_privileges():
            watched = sl.Run.open(copy)
            assert watched.status == "stopped" and not watched.directory.is_alive and watched.state.step == 2
            with pytest.raises(RunError, match=r"cannot be locked"):
                watched.resume(inline=True, panel=False)
        for path in folders:
            path.chmod(0o755)
    assert run.resume(inline=True, panel=False).status == "finished" and losses(run) == losses(whole)


def test_permission_taken_away_on_the_way_is_said_and_costs_no_update(whole, tmp_path, monkeypatch):
    """The run directory turns read-only between two checkpoints, as on a disk whose file system is mounted anew after an error."""
    rename = os.rename

    def once(source, target):
        if "step-000004" in str(target):
            raise OSError(errno.EROFS, "Read-only file system", str(source), None, str(target))
        return rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", once)
        run = sl.train(whole.recipe, tmp_path / "run", inline=True, panel=False)
    assert run.status == "failed" and events(run, "failed")[-1]["error"] == "RunError"
    assert re.search(r"cannot be written: Read-only file system", run.state.reason)
    assert run.state.fix == f"make {run.path} writable again, then resume the run; its last checkpoint is good"
    assert run.resume(inline=True, panel=False).status == "finished" and losses(run) == losses(whole)


def test_what_is_denied_elsewhere_is_not_blamed_on_the_run_directory(tmp_path):
    directory = RunDirectory.create(tmp_path / "run", sl.Recipe(model="tiny", data="x"), {}, {})
    for number in (errno.EACCES, errno.EPERM, errno.EROFS):
        assert worker._not_written(OSError(number, "x", str(directory.path / "checkpoints" / "a")), directory) is not None
        assert worker._not_written(OSError(number, "x", str(tmp_path / "runs" / "a")), directory) is None
    assert worker._not_written(OSError(errno.EIO, "x", str(directory.path / "a")), directory) is None


def test_a_command_that_cannot_be_left_is_said(tmp_path):
    """Somebody else's run: it can be watched, and asked nothing."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        directory = RunDirectory.create(Path(folder) / "run", sl.Recipe(model="tiny", data="x"), {}, {})
        held = directory.lock()
        for path in (directory.path, directory.path / "commands"):
            path.chmod(0o555)
        try:
            with _without_privileges(), pytest.raises(RunError, match=r"the command 'stop' cannot be left in .*commands: Permission denied"):
                sl.Run(directory).stop()
        finally:
            lock.release(held)
            for path in (directory.path, directory.path / "commands"):
                path.chmod(0o755)


# files that changed in between


def test_whatever_is_damaged_in_a_checkpoint_is_named_and_the_one_before_used(whole, quick_recipe, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        stopped = sl.train(whole.recipe.replace(keep_checkpoints=9), tmp_path / "stopped", inline=True, panel=False)
    newest = stopped.path / "checkpoints" / "step-000005"
    cases = [(file.name, damage) for file in sorted(newest.iterdir()) for damage in ("flipped", "gone")]
    assert len(cases) == 2 * 10
    from sparklab.engine import checkpoint

    for name, damage in cases:
        copy = tmp_path / "copy"
        shutil.copytree(stopped.path / "checkpoints", copy)
        file = copy / "step-000005" / name
        if damage == "gone":
            file.unlink()
        else:
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 1
            file.write_bytes(content)
        path, complaints = checkpoint.newest_good(copy)
        assert path == copy / "step-000004" and len(complaints) == 1, (name, damage)
        assert name in complaints[0] or name == "manifest.json", (name, damage)  # a flipped bit of the manifest may be one of another file's hash
        shutil.rmtree(copy)
    (newest / "adapter_model.safetensors").unlink()
    stopped.resume(inline=True, panel=False)
    assert events(stopped, "started")[1]["resumed_from"] == 4
    assert "step-000005 is damaged (adapter_model.safetensors is missing)" in events(stopped, "warning")[0]["message"]
    assert losses(stopped) == losses(whole)


def test_a_checkpoint_that_verifies_and_is_nonsense_is_refused_by_name(whole, quick_recipe, tmp_path, monkeypatch):
    """Sealed by somebody who knows how: every file is as the manifest says, and none is what it should be."""
    from sparklab.engine import checkpoint

    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        run = sl.train(whole.recipe, tmp_path / "run", inline=True, panel=False)
    good = run.path / "checkpoints" / "step-000003"
    kept = tmp_path / "kept"
    shutil.copytree(good, kept)
    nonsense = {
        "optimizer.json": "[]", "scheduler.json": '{"lr_lambdas": "x", "base_lrs": 3}', "rng.json": '{"ranks": [{"python": 1}]}', "progress.json": "{}",
        "trainer_state.json": '{"global_step": 99}', "adapter_model.safetensors": "no tensors",
    }  # fmt: skip
    for name, content in nonsense.items():
        shutil.rmtree(good)
        shutil.copytree(kept, good)
        (good / name).write_text(content)
        (good / "manifest.json").unlink()
        checkpoint._seal(good)
        run.resume(inline=True, panel=False)
        failed = events(run, "failed")[-1]
        assert failed["error"] == "RunError" and "checkpoint step-000003 cannot be used" in failed["fact"], (name, failed)
        assert "resume from the one before" in failed["fix"]
    shutil.rmtree(good)
    shutil.copytree(kept, good)
    assert run.resume(inline=True, panel=False).status == "finished" and losses(run) == losses(whole)


def test_a_torn_last_line_and_a_clock_that_jumps_back(whole, quick_recipe, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        run = sl.train(whole.recipe, tmp_path / "run", inline=True, panel=False)
    with open(run.directory.events_path, "ab") as file:
        file.write(b'{"event":"step","seq":99,"nth":9,"los')
    ids = [run.directory.send("pause")]
    clock = time.time
    monkeypatch.setattr(time, "time", lambda: clock() - 86_400)
    monkeypatch.setattr(time, "time_ns", lambda: int((clock() - 86_400) * 1e9))
    ids.append(run.directory.send("resume"))
    assert [name for name, _ in run.directory.take_commands()] == ids, "in the order they were asked in"
    run.resume(inline=True, panel=False)
    assert run.status == "finished" and losses(run) == losses(whole)
    assert [event["seq"] for event in events(run)] == list(range(len(events(run))))
    assert run.state.elapsed_seconds >= 0 and run.to_dict()["step"] == 8


def test_a_missing_shard_of_the_result_is_named(whole):
    (whole.path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(RunError, match=r"adapter_model\.safetensors is missing"):
        whole.compare(["Hello!"])


# two at once, and one that cannot start


def test_two_workers_on_one_directory(quick_recipe, tmp_path, monkeypatch):
    """The second is told who the first is, and the first does not notice."""
    from sparklab.run.reporter import Reporter

    refused = []
    obey = Reporter._obey

    def second_comes(self, control):
        if self.trainer.state.global_step == 2:
            with pytest.raises(RunBusy, match=f"process {os.getpid()} on ") as caught:
                sl.Run.open(self.directory.path).resume(inline=True, panel=False)
            refused.append(caught.value)
        obey(self, control)

    monkeypatch.setattr(Reporter, "_obey", second_comes)
    run = sl.train(quick_recipe(), tmp_path / "run", inline=True, panel=False)
    assert len(refused) == 1 and run.status == "finished" and len(events(run, "started")) == 1


RESUME = """
import json, sys, time
from pathlib import Path
import sparklab as sl
from sparklab.errors import SparklabError
run, go, changes = sl.Run.open(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
Path(sys.argv[2] + ".ready" + sys.argv[4]).touch()
while not go.exists():
    time.sleep(0.001)
try:
    run.resume(panel=False, **changes)
except SparklabError as error:
    print(json.dumps([type(error).__name__, str(error)]))
else:
    print(json.dumps(["won", ""]))
"""


@pytest.mark.parametrize("changes", [({}, {}), ({"keep_checkpoints": 3}, {"keep_checkpoints": 4})], ids=["as it was", "changed"])
def test_of_two_who_resume_at_once_one_wins(whole, tmp_path, monkeypatch, changes):
    """The other is told why, the diary tells of one worker, and what it trains with is what the winner asked for."""
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        run = sl.train(whole.recipe, tmp_path / "run", inline=True, panel=False)
    go = tmp_path / "go"
    asked = [
        subprocess.Popen([sys.executable, "-c", RESUME, run.path, go, json.dumps(change), str(index)], stdout=subprocess.PIPE)
        for index, change in enumerate(changes)
    ]
    wait_for(lambda: all((tmp_path / f"go.ready{index}").exists() for index in range(2)))
    go.touch()
    told = [json.loads(process.communicate()[0]) for process in asked]
    wait_for(lambda: run.status == "finished" and not run.directory.is_alive)
    (winner,) = [index for index, (word, _) in enumerate(told) if word == "won"]
    word, why = told[1 - winner]
    assert (word == "RunBusy" and "a worker is at work on" in why) or (word == "RunChanged" and "changed already" in why and changes[0]), told
    assert len(events(run, "started")) == 2 and losses(run) == losses(whole)
    assert run.recipe == whole.recipe.replace(**changes[winner])


def test_of_two_who_change_the_recipe_at_once_one_is_refused(tmp_path, monkeypatch):
    recipe = sl.Recipe(model="tiny", data="x")
    directory = RunDirectory.create(tmp_path / "run", recipe, {}, {"recipe": recipe.to_dict()})
    look = inputs.changes_of_recipe

    def second_comes(directory):
        found = look(directory)
        monkeypatch.setattr(inputs, "changes_of_recipe", look)
        with pytest.raises(RunBusy):
            inputs.change_recipe(directory, {"keep_checkpoints": 4})
        return found

    monkeypatch.setattr(inputs, "changes_of_recipe", second_comes)
    inputs.change_recipe(directory, {"keep_checkpoints": 3})
    assert directory.recipe.keep_checkpoints == 3
    with pytest.raises(RunChanged, match="changed already"):
        inputs.change_recipe(directory, {"keep_checkpoints": 4})


def test_a_worker_that_cannot_start_says_so_with_the_end_of_its_log(quick_recipe, tmp_path, monkeypatch):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "torch.py").write_text('raise ImportError("libcudart.so.13: cannot open shared object file\\x1b[31m")\n')
    monkeypatch.setenv("PYTHONPATH", f"{broken}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    run = sl.train(quick_recipe(), tmp_path / "run", panel=False)
    with pytest.raises(sl.errors.RunFailed, match=r"libcudart.so.13: cannot open shared object file") as caught:
        run.wait(120)
    assert "\x1b" not in str(caught.value) and run.status in ("failed", "lost")


def test_a_worker_killed_before_its_first_word(tmp_path):
    from sparklab.planner.recipe import Recipe

    directory = RunDirectory.create(tmp_path / "run", Recipe(model="tiny", data="x.jsonl"), {}, {})
    with directory.open_log() as log:
        log.write(b"Traceback\nModuleNotFoundError: No module named 'torch'\n")
    state = directory.state
    assert state.status == "lost" and "ended before it could begin" in state.reason and "No module named 'torch'" in state.reason


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "x"), OSError(errno.EDQUOT, "x"), OSError(errno.EFBIG, "x")])
def test_a_full_disk_is_known_by_its_number(error):
    assert worker.is_disk_full(error) and not worker.is_disk_full(OSError(errno.EIO, "x"))


def test_a_full_disk_is_known_by_what_safetensors_says(tmp_path):
    """Asked of the library itself, in a process that may not write large files."""
    code = (
        "import resource, signal, sys, torch; from safetensors.torch import save_file; from sparklab.run.worker import is_disk_full\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: save_file({'a': torch.zeros(100_000)}, sys.argv[1])\n"
        "except BaseException as error: sys.exit(0 if is_disk_full(error) else f'{type(error)} {error}')\n"
        "sys.exit('nothing was raised')"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "x.safetensors")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_diary_never_keeps_a_half_line(tmp_path):
    """A disk with room for a part of a line: the part is taken back."""
    with EventWriter(tmp_path / "events.jsonl") as writer:
        writer.write("warning", message="a")
        size = (tmp_path / "events.jsonl").stat().st_size
        with _file_limit(size + 20), pytest.raises(OSError, match=r"File too large|No space left"):
            writer.write("warning", message="b" * 100)
        assert (tmp_path / "events.jsonl").stat().st_size == size
        assert writer.write("warning", message="c")["seq"] == 1
    assert [event["message"] for event in diary.EventReader(tmp_path / "events.jsonl").read_new()] == ["a", "c"]
