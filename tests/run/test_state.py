"""The diary and what it adds up to: events, the state they reduce to, and the directory they lie in."""

import json
import math
import os
import subprocess
import sys
import threading
import time
import tracemalloc
from random import Random

import pytest

import sparklab as sl
from sparklab.errors import RunBusy, RunError, RunExists, RunNotFound
from sparklab.files import write_json
from sparklab.run import events as diary
from sparklab.run.directory import RunDirectory
from sparklab.run.events import EventReader, EventWriter, recall, steering, story
from sparklab.run.state import RunState


def recipe(**changes):
    return sl.Recipe(model="tiny", data="chats.jsonl", **changes)


@pytest.fixture
def directory(tmp_path):
    return RunDirectory.create(tmp_path / "run", recipe(), {"peak_gib": 1.5}, {"python": "3"})


def step(number, *, loss=1.0, tokens=100, seconds=0.5, steps=10, **more):
    return {"event": "step", "time": 1000.0 + number, "step": number, "steps": steps, "epoch": number / steps, "loss": loss, "learning_rate": 1e-4,
            "grad_norm": 0.5, "tokens": tokens, "seconds": seconds, **more}  # fmt: skip


def state_of(*events):
    state = RunState()
    for event in events:
        state.add({"time": 1000.0, **event})
    return state


STARTED = {"event": "started", "time": 1000.0, "device": "cpu", "method": "lora", "resumed_from": None}


# the reducer


def test_a_run_adds_up():
    state = state_of(STARTED, {"event": "model", "parameters": 1000, "trainable_parameters": 10}, *(step(i, tokens=100 + i, seconds=0.5) for i in range(1, 5)))
    assert (state.status, state.step, state.steps, state.epoch) == ("running", 4, 10, 0.4)
    assert state.tokens == 101 + 102 + 103 + 104
    assert state.tokens_per_second == (101 + 102 + 103 + 104) / 2.0
    assert state.eta_seconds == (10 - 4) * 0.5
    assert (state.parameters, state.trainable_parameters) == (1000, 10)


def test_speed_is_that_of_the_last_fifty_updates():
    state = state_of(STARTED, *(step(i, tokens=1 if i <= 10 else 200, seconds=1.0) for i in range(1, 61)))
    assert state.tokens_per_second == 200


def test_before_the_first_step_nothing_is_known():
    state = RunState()
    assert math.isnan(state.tokens_per_second) and math.isnan(state.eta_seconds) and math.isnan(state.elapsed_seconds)
    assert state.best_eval is None and not state.is_over


def test_the_end_stops_the_clock():
    state = state_of(STARTED, step(1), {"event": "finished", "time": 1042.0, "step": 1, "peak_bytes": 5e9})
    assert state.is_over and state.status == "finished" and state.elapsed_seconds == 42.0
    assert state.peak_bytes == 5e9
    assert math.isnan(state.eta_seconds)


@pytest.mark.parametrize(
    ("event", "status", "reason", "fix"),
    [
        ({"event": "stopped", "reason": "asked to stop"}, "stopped", "asked to stop", "resume the run to go on"),
        ({"event": "failed", "fact": "loss nan", "fix": "lower the rate"}, "failed", "loss nan", "lower the rate"),
    ],
)
def test_early_ends_carry_reason_and_fix(event, status, reason, fix):
    state = state_of(STARTED, step(1), event)
    assert (state.status, state.reason, state.fix) == (status, reason, fix)
    assert state.messages[-1]["text"] == f"{status}: {reason}"


def test_a_resume_rewinds_to_its_checkpoint_and_clears_the_reason():
    first = [STARTED, *(step(i) for i in range(1, 8)), {"event": "eval", "step": 4, "loss": 1.1}, {"event": "eval", "step": 6, "loss": 0.9}]
    state = state_of(*first, {"event": "stopped", "reason": "asked to stop"}, {**STARTED, "time": 2000.0, "resumed_from": 4})
    assert (state.status, state.reason, state.step) == ("running", "", 4)
    assert list(state.loss_steps) == [1, 2, 3, 4] and [entry["step"] for entry in state.evals] == [4]
    for i in range(5, 8):
        state.add(step(i))
    assert list(state.loss_steps) == list(range(1, 8)) and state.tokens == 700
    assert len({len(s) for s in (state.losses, state.grad_norms, state.learning_rates, state.step_tokens, state.step_seconds)}) == 1


def test_a_run_that_begins_anew_forgets_what_it_made_before(directory):
    """Ended before its first checkpoint: nothing of it counts twice."""
    first = [STARTED, {"event": "eval", "step": 0, "loss": 2.0}, {"event": "sample", "step": 0, "prompt": "p", "text": "t"}, step(1), step(2)]
    state = state_of(*first, *first)
    assert (list(state.loss_steps), state.tokens, len(state.evals), len(state.samples), state.step) == ([1, 2], 200, 1, 1, 2)


def test_what_the_data_warns_of_is_said_once_also_where_a_run_goes_on():
    state = RunState()
    for warnings in (["3 repeat"], ["3 repeat", "2 were cut"], None, {"a": 1}, [7, "2 were cut"]):
        state.add({"event": "data", "time": 1.0, "warnings": warnings})
    assert [note["text"] for note in state.messages] == ["data: 3 repeat", "data: 2 were cut", "data: 2 were cut"], "what says nothing clears it"
    assert {note["event"] for note in state.messages} == {"warning"}


def test_the_best_evaluation_ignores_what_is_not_a_number():
    evals = [{"event": "eval", "step": i, "loss": loss} for i, loss in enumerate([None, 2.0, 1.5, None, 1.7])]
    assert state_of(STARTED, *evals).best_eval["loss"] == 1.5


def test_peak_memory_is_the_highest_ever_reported():
    state = state_of(STARTED, *({"event": "memory", "process_bytes": 1e9, "peak_bytes": peak} for peak in (2e9, 3e9, 2.5e9, None)))
    assert state.peak_bytes == 3e9 and len(state.memory) == 4


@pytest.mark.parametrize("rubbish", [None, "many", [], {}, True, float("nan"), float("inf")])
def test_damaged_figures_become_unknown(rubbish):
    state = state_of(STARTED, step(1), step(2, loss=rubbish, grad_norm=rubbish, tokens=rubbish, seconds=rubbish))
    assert math.isnan(state.losses[-1]) and math.isnan(state.step_tokens[-1]) and state.step == 2
    assert not state_of(STARTED, {"event": "step", "step": rubbish}).loss_steps


RUBBISH = [None, "many", [], {}, True, float("nan"), float("inf"), -1, 0.5, 10**400, 2**60]


def a_rough_diary(random):
    """Updates as a worker tells them, some of them damaged, between all that may stand between them."""
    number = 0
    for _ in range(300):
        number += 1
        event = step(number, loss=random.random(), tokens=random.randrange(9, 99), seconds=random.random(), steps=400, wait_seconds=0.001)
        if random.random() < 0.2:
            for name in random.sample(sorted(event.keys() - {"event"}), 3):
                event[name] = random.choice(RUBBISH)
        yield event
        if random.random() < 0.1:
            yield {
                "event": "memory",
                "time": 1000.0 + number,
                "process_bytes": 1e9 + number,
                "peak_bytes": 2e9 + number,
                "watts": random.choice([9.5, *RUBBISH]),
            }
        if random.random() < 0.1:
            yield {"event": random.choice(["eval", "sample", "warning", "checkpoint"]), "time": 1000.0 + number, "step": number, "loss": 1.0, "message": "m"}
        if random.random() < 0.02:
            number -= random.randrange(5)
            yield {**STARTED, "resumed_from": number}


@pytest.mark.parametrize("seed", range(8))
def test_many_events_at_once_add_up_as_one_by_one(seed):
    events = list(a_rough_diary(Random(seed)))
    together, alone = RunState(), RunState()
    together.add_all(events)
    for event in events:
        alone.add(event)
    assert repr(together) == repr(alone) and len(alone.losses) > 100 and alone.messages and alone.memory and alone.evals
    plain, numbers = {"loss": [], "tokens": []}, []  # the same by hand, a value at a time
    for event in events:
        if event["event"] == "started":
            kept = [at for at, number in enumerate(numbers) if number <= event["resumed_from"]]
            for values in (numbers, *plain.values()):
                del values[len(kept) :]
        number = event.get("step")
        if event["event"] != "step" or type(number) not in (int, float) or not abs(number) < 2**53:
            continue
        numbers.append(int(number))
        for name, values in plain.items():
            value = event.get(name)
            values.append(float(value) if type(value) in (int, float) and abs(value) < 1e300 else math.nan)
    assert repr(list(alone.losses)) == repr(plain["loss"]) and repr(list(alone.step_tokens)) == repr(plain["tokens"])
    assert alone.tokens == sum(plain["tokens"]) or math.isnan(sum(plain["tokens"]))


def test_a_run_that_never_stops_talking_does_not_grow_whoever_looks_on():
    state = state_of(STARTED)
    best = 3333
    for number in range(10_000):
        state.add_all([
            {"event": "warning", "message": f"{number} " + "m" * 100_000}, {"event": "sample", "step": number, "prompt": "p" * 50_000, "text": f"{number}"},
            {"event": "eval", "step": number, "loss": abs(number - best) + 1.0}, {"event": "checkpoint", "step": number, "path": "c" * 50_000},
            {"event": "learning_rate", "step": number, "learning_rate": 1.0, "was": 2.0},
        ])  # fmt: skip
    assert state.messages_told == 30_000 and state.samples_told == 10_000
    assert len(state.messages) == len(state.samples) == len(state.checkpoints) == len(state.rate_changes) == 1000 and len(state.evals) <= 4096
    assert state.messages[-1]["text"].startswith("the learning rate") and state.samples[-1]["text"] == "9999" and state.evals[0]["step"] == 0
    unknown = pytest.approx(math.nan, nan_ok=True)
    assert state.best_eval == {"step": best, "loss": 1.0, "exact_match": unknown, "n": unknown, "tokens": unknown}
    assert state.evals[-1]["step"] == 9999 and [entry["step"] for entry in state.evals] == sorted({entry["step"] for entry in state.evals})
    assert max(len(entry["text"]) for entry in state.messages) == max(len(entry["prompt"]) for entry in state.samples) == 20_000
    assert state.messages_since(29_998) == state.messages[-2:] and state.messages_since(30_000) == [] and len(state.messages_since(0)) == 1000
    state.add({**STARTED, "resumed_from": 9_500})
    assert state.samples_told == 9_501 and len(state.samples) == 501


def test_pausing_shows_and_ends():
    state = state_of(STARTED, {"event": "phase", "phase": "paused"})
    assert state.status == "paused"
    state.add({"event": "phase", "phase": "train", "time": 1.0})
    assert state.status == "running"


# the diary


def test_what_is_written_is_read_in_order(tmp_path):
    with EventWriter(tmp_path / "events.jsonl") as writer:
        for i in range(5):
            writer.write("warning", message=f"مرحبا {i}\n\x1b[31m \udc80", value=math.nan)
    events = list(EventReader(tmp_path / "events.jsonl").read_new())
    assert [event["seq"] for event in events] == list(range(5)) and len(events) == 5
    assert events[0]["message"] == "مرحبا 0\n\x1b[31m \udc80" and events[0]["value"] is None


def interrupted(seed):
    """A diary with crashes: updates and evaluations numbered through, taken back to some earlier number now and then."""
    random, told, made = Random(seed), 0, [{"event": "started", "nth": 0}]
    for _ in range(200):
        kind = random.choices(("step", "eval", "started", "learning_rate", "changed"), (60, 30, 6, 2, 2))[0]
        if kind == "started":
            told = random.randrange(told + 1)
        made.append({"event": kind, "step": told} | ({"nth": told} if kind in diary.STORY | {"started"} else {}))
        if kind in diary.STORY:
            made[-1]["loss"] = None if random.random() < 0.1 else round(random.random() + 50 / (1 + told), 2)
            told += 1
    return made


@pytest.mark.parametrize("seed", range(20))
def test_what_a_resume_recalls_is_what_the_whole_diary_says(seed):
    events = interrupted(seed)
    losses = [event["loss"] for event in story(events) if event["event"] == "eval" and event["loss"] is not None]
    past = recall(iter(events))
    assert (past.steering, past.best_loss) == (steering(events), min(losses, default=math.inf))
    assert past.changes == sum(event["event"] == "changed" for event in events)


def test_what_a_resume_holds_of_a_diary_does_not_grow_with_it():
    peaks = []
    for count in (100, 10_000):
        events = ({"event": ("step", "eval")[index % 2], "nth": index, "step": index, "loss": 2.0 + index % 7} for index in range(count))
        tracemalloc.start()
        assert recall(events).best_loss == 2.0
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 4096, peaks


def test_a_reader_waits_for_the_end_of_a_line(tmp_path):
    path = tmp_path / "events.jsonl"
    reader = EventReader(path)
    assert list(reader.read_new()) == []
    path.write_text('{"event":"warning","seq":0,"ti')
    assert list(reader.read_new()) == []
    with open(path, "a") as file:
        file.write('me":1,"message":"m"}\n{"event":"wa')
    assert [event["message"] for event in reader.read_new()] == ["m"]
    assert list(reader.read_new()) == [] and reader.bad_lines == 0


def test_a_writer_cuts_a_torn_line_off_and_counts_on(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_text('{"event":"warning","seq":6,"time":1,"message":"m"}\n{"event":"step","seq":7,"lo')
    with EventWriter(path) as writer:
        assert writer.write("warning", message="next")["seq"] == 7
    assert [event["seq"] for event in EventReader(path).read_new()] == [6, 7]


def test_bad_lines_are_counted_and_passed_over(tmp_path):
    path = tmp_path / "events.jsonl"
    bad = [b"nonsense", b"[1, 2]", b'{"event": "unheard of"}', b"\xff\xfe", b'{"no": "event"}', b"", b"[" * 100_000]
    path.write_bytes(b"\n".join([*bad, b'{"event": "warning", "message": "good"}']) + b"\n")
    reader = EventReader(path)
    assert [event["message"] for event in reader.read_new()] == ["good"] and reader.bad_lines == len(bad)


@pytest.mark.parametrize("at_once", [1, 100, 1000, 10**6])
def test_however_many_lines_are_parsed_at_once_they_are_the_same(tmp_path, monkeypatch, at_once):
    monkeypatch.setattr(diary, "_PARSED_AT_ONCE", at_once)
    monkeypatch.setattr(diary, "_AT_ONCE", 2000)
    monkeypatch.setattr(diary, "LONGEST_LINE", 1500)
    events = [{"event": "warning", "seq": number, "message": "م" * (number * 37 % 200)} for number in range(200)]
    lines = [json.dumps(event, ensure_ascii=number % 2 == 0).encode() for number, event in enumerate(events)]
    lines[50:50] = [b"rubbish", b'{"event": "warning"}, {"event": "warning"}', b"x" * 5000, b""]
    (tmp_path / "events.jsonl").write_bytes(b"\n".join(lines) + b'\n{"event": "torn')
    reader = EventReader(tmp_path / "events.jsonl")
    assert list(reader.read_new()) == events and reader.bad_lines == 4 and list(reader.read_new()) == []


@pytest.mark.parametrize(
    "line",
    [
        pytest.param('{"event": []}', id="unhashable kind"),
        pytest.param(
            '{"event": "step", "step": 1, "loss": 1' + "0" * 400 + "}",
            id="an integer no float can hold",
        ),
        pytest.param('{"event": "step", "step": 1e308, "steps": 1e308}', id="a step beyond all steps"),
    ],
)
def test_no_line_breaks_the_state(directory, line):
    directory.events_path.write_text(line + "\n" + '{"event": "warning", "time": 1, "message": "after it"}\n')
    assert directory.state.messages[-1]["text"] == "after it"


# the directory


def test_create_writes_everything_and_reads_back(directory):
    assert directory.recipe == recipe() and directory.plan == {"peak_gib": 1.5} and directory.read_json("environment") == {"python": "3"}
    assert sorted(entry.name for entry in directory.path.iterdir()) == [
        "checkpoints", "commands", "environment.json", "events.jsonl", "plan.json", "recipe.json"]  # fmt: skip
    assert [entry.name for entry in directory.path.parent.iterdir()] == ["run"], "a draft was left behind"


def test_create_takes_an_empty_directory_and_nothing_else(tmp_path, directory):
    (tmp_path / "empty").mkdir()
    RunDirectory.create(tmp_path / "empty", recipe(), {}, {})
    with pytest.raises(RunExists, match="holds a run"):
        RunDirectory.create(directory.path, recipe(), {}, {})
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunExists):
        RunDirectory.create(tmp_path / "file", recipe(), {}, {})
    assert (tmp_path / "file").read_text() == "mine" and directory.plan == {"peak_gib": 1.5}


def test_two_who_create_at_once_get_one_run(tmp_path):
    outcomes = []

    def attempt():
        try:
            RunDirectory.create(tmp_path / "run", recipe(), {}, {})
            outcomes.append("made")
        except (RunExists, OSError):  # threads of one process share the name of the draft
            outcomes.append("refused")

    threads = [threading.Thread(target=attempt) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 4 and outcomes.count("made") <= 1


def test_what_is_no_run_says_what_lies_beside_it(tmp_path, directory):
    with pytest.raises(RunNotFound, match=r"does not exist[\s\S]*runs beside it: run"):
        RunDirectory(tmp_path / "rnu")
    RunDirectory.create(tmp_path / "runs" / "chat", sl.Recipe(model="tiny", data="x"), {}, {})
    for name, fix in (("runs", "runs in it: chat"), ("runs/chit", "runs beside it: chat")):
        with pytest.raises(RunNotFound) as caught:
            RunDirectory(tmp_path / name)
        assert caught.value.fix == fix
    with pytest.raises(RunNotFound, match="is not a run directory"):
        RunDirectory(tmp_path)


@pytest.mark.parametrize("name", ["with space", "<script>alert(1)</script>".replace("/", "_"), "\u202egnol", "مرحبا", "-rf", "a\nb", "%s{x}"])
def test_names_nobody_should_choose_still_work(tmp_path, name):
    directory = RunDirectory.create(tmp_path / name, recipe(), {}, {})
    directory.send("stop")
    assert [content["command"] for _, content in directory.take_commands()] == ["stop"] and directory.state.step == 0


def test_damaged_files_are_said_and_never_fatal_to_a_panel(directory):
    (directory.path / "plan.json").write_text("{")
    (directory.path / "recipe.json").write_text("[]")
    assert directory.plan == {}
    with pytest.raises(RunError, match="holds no JSON object"):
        _ = directory.recipe


# who works on it


HOLD = (
    "import fcntl, os, sys, time; fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT); fcntl.flock(fd, fcntl.LOCK_EX); print('held', flush=True); time.sleep(60)"
)


def test_the_lock_goes_with_its_holder(directory):
    assert not directory.is_alive
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(directory.path / "worker.lock")], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        assert directory.is_alive and directory.try_lock() is None
        with pytest.raises(RunBusy, match="a worker is at work"):
            directory.lock()
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    assert not directory.is_alive
    descriptor = directory.lock()
    assert directory.is_alive
    os.close(descriptor)
    assert not directory.is_alive


def test_a_worker_that_died_is_lost_and_a_resumed_one_is_found_again(directory):
    follower = directory.follow()
    with EventWriter(directory.events_path) as writer:
        writer.write("started", device="cpu", method="lora", resumed_from=None)
        descriptor = directory.lock()
        assert follower.refresh().status == "running"
        os.close(descriptor)
        assert follower.refresh().status == "lost" and "gone without a word" in follower.state.reason
        descriptor = directory.lock()
        writer.write("started", device="cpu", method="lora", resumed_from=0)
        assert follower.refresh().status == "running" and follower.state.reason == ""
        os.close(descriptor)


@pytest.mark.parametrize("word", ["stopped", "failed", "finished"])
def test_a_worker_on_its_way_to_a_run_that_ended_is_not_that_end(directory, word):
    with EventWriter(directory.events_path) as writer:
        writer.write("started", device="cpu", method="lora", resumed_from=None)
        descriptor = directory.lock()
        writer.write(word, step=3, reason="asked to stop", fact="asked to stop")
        follower = directory.follow()
        assert follower.refresh().status == word, "its own last word"
        os.close(descriptor)
        time.sleep(0.002)
        descriptor = directory.lock()
        assert (follower.refresh().status, follower.refresh().reason, directory.state.status) == ("starting", "", "starting")
        os.close(descriptor)
        assert follower.refresh().status == word


def test_commands_arrive_once_in_order_and_hostile_files_never(directory):
    ids = [directory.send(name) for name in ("pause", "resume", "stop")]
    folder = directory.path / "commands"
    (folder / "0-bad.json").write_text("{")
    (folder / "1-unknown.json").write_text(json.dumps({"command": "rm -rf"}))
    (folder / "2-link.json").symlink_to("/etc/passwd")
    (folder / "3-note.txt").write_text("not a command")
    taken = directory.take_commands()
    assert [name for name, _ in taken] == ["0-bad", "1-unknown", *ids]
    assert [content.get("command") for _, content in taken] == [None, "rm -rf", "pause", "resume", "stop"]  # whoever obeys refuses the first two
    assert directory.take_commands() == []
    with pytest.raises(RunError, match="there is no command 'explode'"):
        directory.send("explode")


def test_json_is_written_whole_or_not_at_all(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1} and len(list(tmp_path.iterdir())) == 1


def test_following_costs_what_is_new(directory):
    with EventWriter(directory.events_path) as writer:
        for i in range(1, 3001):
            writer.write("step", **{key: value for key, value in step(i, steps=3000).items() if key not in ("event", "time")})
        follower = directory.follow()
        follower.refresh()
        begin = time.perf_counter()
        for _ in range(20):
            follower.refresh()
        assert time.perf_counter() - begin < 1.0 and follower.state.step == 3000


def memory(time, **fields):
    return {"event": "memory", "time": time, "process_bytes": 1e9, **fields}


def test_energy_is_the_draw_over_the_time_it_was_known_for():
    state = state_of(STARTED, memory(1000.0, watts=40.0), memory(1002.0, watts=50.0), memory(1003.0), memory(1500.0, watts=70.0), memory(1501.0, watts=60.0))
    assert state.joules == 50 * 2 + 60 * 1  # a gap of minutes is nobody's guess
    assert math.isnan(state_of(STARTED, memory(1000.0), memory(1001.0)).joules)


def test_readings_of_the_memory_stay_few_and_name_others():
    state = state_of(STARTED, *(memory(1000.0 + i) for i in range(5000)), memory(6000.0, others={"java": 2e9, "bad": "x"}), memory(6001.0, others=[1]))
    assert len(state.memory) <= 240
    assert state.memory[-2]["others"]["java"] == 2e9 and math.isnan(state.memory[-2]["others"]["bad"]) and state.memory[-1]["others"] == {}


def test_waiting_for_data_is_kept_beside_the_step():
    state = state_of(STARTED, {**step(1), "wait_seconds": 0.25}, step(2), {"event": "phase", "phase": "load", "detail": "12 of 40 GiB"})
    assert state.step_waits[0] == 0.25 and math.isnan(state.step_waits[1]) and state.detail == "12 of 40 GiB"
