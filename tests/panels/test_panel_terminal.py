"""The terminal form: one line where there is a screen, few lines where there is a log, and no code from any text."""

import argparse
import io
import os
import re

import pytest
from scenes import HOSTILE, PLAN, STARTED, start_worker, state_of, steps, write

import sparklab as sl
from sparklab import cli
from sparklab.panels.terminal import ProgressLine, follow, progress, summary

OWN_CODES = re.compile("\r\x1b\\[2K")


class Screen(io.StringIO):
    def isatty(self):
        return True


def test_following_a_worker_to_its_end_in_a_log(directory):
    worker = start_worker(directory, "--steps", "60", "--delay", "0.005", "--load", "0", "--hostile")
    log = io.StringIO()
    state = follow(directory, log, every_seconds=0.02)
    assert state.status == "finished" and worker.wait(10) == 0
    lines = log.getvalue().splitlines()
    assert "Finished · step 60 of 60" in lines[-1] and "tok/s" in lines[-1] and "GiB of 3.20 GiB planned" in lines[-1]
    assert 3 <= len(lines) <= 40 and "\x1b" not in log.getvalue() and "\u202e" not in log.getvalue()


def test_a_screen_has_one_line_that_is_drawn_again(directory):
    write(directory, STARTED, *steps(10, total=10), {"event": "finished", "step": 10})
    screen = Screen()
    follow(directory, screen)
    assert screen.getvalue().startswith("\r\x1b[2K█") and screen.getvalue().count("\n") == 1 and screen.getvalue().endswith("\n")


def test_warnings_stand_above_the_line_without_their_codes():
    screen = Screen()
    line = ProgressLine(PLAN, screen)
    state = state_of(STARTED, *steps(3))
    line.update(state)
    state.add({"event": "warning", "time": 1.0, "message": HOSTILE})
    line.update(state)
    line.update(state)
    line.close()
    rest = OWN_CODES.sub("", screen.getvalue())
    assert "\x1b" not in rest and rest.count("alert(2)") == 1 and "red" in rest


def test_an_unchanged_state_is_not_drawn_again():
    screen = Screen()
    line = ProgressLine(PLAN, screen)
    state = state_of(STARTED, *steps(3), {"event": "finished"})
    line.update(state)
    drawn = screen.getvalue()
    line.update(state)
    assert screen.getvalue() == drawn


def test_an_interrupt_goes_to_the_caller_after_the_line_is_ended(directory, monkeypatch):
    descriptor = directory.lock()
    write(directory, STARTED, *steps(3))

    def interrupt(_seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", interrupt)
    screen = Screen()
    with pytest.raises(KeyboardInterrupt):
        follow(directory, screen)
    assert screen.getvalue().endswith("\n")
    os.close(descriptor)


def test_ctrl_c_stops_what_one_started_and_leaves_what_one_watches(directory, monkeypatch, capsys):
    descriptor = directory.lock()
    write(directory, STARTED, *steps(3), {"event": "checkpoint", "step": 3})
    presses = iter([True, True])

    def press(_seconds):
        if next(presses, False):
            raise KeyboardInterrupt
        ((_, asked),) = directory.take_commands()
        write(directory, {"event": "stopped", "step": 3, "reason": asked["reason"]})
        os.close(descriptor)

    monkeypatch.setattr("time.sleep", press)
    assert cli.main(["watch", str(directory.path)]) == 130
    assert "goes on; to end it: sparklab stop" in capsys.readouterr().err and directory.take_commands() == []
    assert cli._follow(argparse.Namespace(json=False), sl.Run(directory), detach=False) == 130
    told = capsys.readouterr()
    assert told.err.count("checkpoint at step 3") == 1 and "a checkpoint is saved ..." in told.err and "Ctrl-C stops it" in told.err
    assert "stopped, step 3 of 100" in told.out and directory.state.reason == "interrupted in the terminal"


def test_answers_stand_above_the_line_and_old_news_is_not_told_at_length():
    log = io.StringIO()
    old = [{"event": "checkpoint", "time": 1.0, "step": step} for step in range(40)]
    state = state_of(STARTED, *steps(3), *old, {"event": "sample", "time": 1.0, "step": 3, "prompt": "old?", "text": "yes"})
    line = ProgressLine(PLAN, log)
    line.update(state)
    assert "checkpoint at step 39" in log.getvalue() and "step 29" not in log.getvalue() and "old?" not in log.getvalue()
    state.add({"event": "sample", "time": 2.0, "step": 4, "prompt": "ما هذا؟", "text": HOSTILE})
    line.update(state)
    line.update(state)
    assert log.getvalue().count("  ما هذا؟ → ") == 1 and "\x1b" not in log.getvalue()


@pytest.mark.parametrize("columns", [200, 100, 80, 60, 40, 20, 10])
def test_the_line_fits_and_drops_what_matters_least(columns, full_state):
    state = state_of(STARTED, {"event": "phase", "phase": "train"}, *steps(40), {"event": "memory", "process_bytes": 3e9, "peak_bytes": 3e9})
    text = progress(state, PLAN, columns)
    assert len(text) <= columns and text.replace("█", "").replace("░", "").strip().startswith("Training"[:columns])
    assert ("planned" in text) == (columns >= 100)


def test_a_pressed_pool_is_said_in_the_line():
    memory = {"event": "memory", "process_bytes": 3e9, "total_bytes": 24e9, "available_bytes": 3e8, "free_bytes": 1e8, "cached_bytes": 2e8}
    assert "memory critical: 286 MiB available" in progress(state_of(STARTED, *steps(4), memory), PLAN, 0)


def test_an_ascii_terminal_gets_question_marks():
    raw = io.BytesIO()
    line = ProgressLine(PLAN, io.TextIOWrapper(raw, encoding="ascii"))
    line.update(state_of(STARTED, *steps(3)))
    assert b"Training" in raw.getvalue() or b"Starting" in raw.getvalue()


def test_the_summary_says_what_came_of_it(full_state):
    text = summary(full_state, PLAN)
    assert "\x1b" not in text and len(text.splitlines()) == 9
    for words in ("Failed, step 60 of 100", "why ", "fix ", "best 0.400 at step 60", "2 % → 94 %", "peak 3.07 GiB of 3.20 GiB planned, 21.4 GiB usable"):
        assert words in text, words
    assert summary(state_of(), {}) == "Starting, no step yet, –"
