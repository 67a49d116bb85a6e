"""Runs side by side: figures against the events they come from, differences named, the best marked, nothing hostile let through."""

import json
import math

import pytest
from scenes import ARABIC, HOSTILE, STARTED, assert_inert, make_directory, steps, write
from support import run_cli

import sparklab as sl
from sparklab.errors import RunNotFound
from sparklab.panels import parts, runs_view


@pytest.fixture
def folder(tmp_path):
    """Three runs: two rates, one in larger updates; the second is the best. And things that are no runs."""
    for index, (name, rate, tokens) in enumerate((("a", 1e-4, 2048), ("b", 2e-4, 2048), (ARABIC, 2e-4, 4096))):
        directory = make_directory(tmp_path / "runs" / name, learning_rate=rate, micro_batch_tokens=tokens)
        made = steps(40, loss=lambda i, index=index: (3 + index) / i, seconds=0.5)
        held = [0.9, 0.5, 0.7][index]
        write(directory, STARTED, *made, {"event": "eval", "step": 20, "loss": held + 0.2, "exact_match": 0.25, "n": 8},
              {"event": "eval", "step": 40, "loss": held}, {"event": "finished", "step": 40, "seconds": 20, "peak_bytes": 2**31})  # fmt: skip
    (tmp_path / "runs" / "lesson").mkdir()
    (tmp_path / "runs" / ".half.new").mkdir()
    (tmp_path / "runs" / ".half.new" / "recipe.json").write_text("{}")
    return tmp_path / "runs"


def test_the_table_says_what_the_events_say(folder):
    table = sl.runs(folder)
    assert [run.path.name for run in table] == ["a", "b", ARABIC]
    assert table.best.path.name == "b" and isinstance(table[0], sl.Run) and len(table[1:]) == 2
    found = table.to_dict()
    json.dumps(found, allow_nan=False)
    assert found["differing"] == ["micro_batch_tokens", "learning_rate"]
    second = found["runs"][1]
    assert second["settings"] == {"micro_batch_tokens": 2048, "learning_rate": 2e-4}
    assert (second["best_held_out_loss"], second["exact_match"], second["peak_gib"], second["step"]) == (0.5, 0.25, 2.0, 40)
    assert second["tokens_per_second"] == pytest.approx(40 * 100 / (40 * 0.5 + 1e-6 * 40 * 41 / 2))
    assert second["loss"] == pytest.approx(parts.smooth([4 / i for i in range(1, 41)], parts.smoothing(100))[-1])
    lines = str(table).splitlines()
    assert [line.split()[0] for line in lines[1::2]] == ["a", "b", ARABIC.split()[0]]
    assert lines[3].endswith("best") and "learning_rate 0.0002" in lines[4]


def test_tokens_are_the_axis_where_updates_differ_in_size(folder):
    entries = sl.runs(folder).entries()
    assert runs_view.by_tokens(entries) and not runs_view.by_tokens(entries[:2])
    xs, ys, evals = runs_view.points(entries[0], tokens=True)
    assert xs[:2] == [100.0, 200.0] and len(ys) == 40 and evals == [(2000.0, 1.1), (4000.0, 0.9)]
    assert runs_view.points(entries[0], tokens=False)[2] == [(20.0, 1.1), (40.0, 0.9)]
    content = sl.runs(folder)._repr_html_()
    assert "4k tokens" in content and ">40<" not in content


def test_a_long_run_is_smoothed_once_until_it_goes_on_and_where_it_is_drawn(tmp_path, monkeypatch):
    directory = make_directory(tmp_path / "long")
    loss = {"loss": lambda i: 3 / i + 0.1 * math.sin(i)}
    write(directory, STARTED, *steps(1201, total=1300, **loss), {"event": "eval", "step": 600, "loss": 0.5})
    asked, smooth = [], parts.smooth
    monkeypatch.setattr(parts, "smooth", lambda values, *more: asked.append(len(values)) or smooth(values, *more))
    table = sl.runs(directory.path)
    for _ in range(2):
        view, _ = runs_view.view(table.entries())
        table._repr_html_(), table.to_dict(), str(table)
    assert asked == [1201]
    xs, ys, evals = runs_view.points(table.entries()[0], tokens=False)
    whole = smooth([loss["loss"](i) for i in range(1, 1202)], parts.smoothing(1300))
    assert xs == [*map(float, range(1, 1202, 3))] and ys == [whole[int(x) - 1] for x in xs] and evals == [(600.0, 0.5)]
    assert view["curves"][0]["count"] == len(xs) == 401 and table.to_dict()["runs"][0]["loss"] == whole[-1]
    write(directory, *steps(1, first=1202, total=1300, **loss))
    assert runs_view.points(table.entries()[0], tokens=False)[0][-2:] == [1201.0, 1202.0] and asked == [1201, 1202]


def test_the_twin_is_inert(tmp_path):
    directory = make_directory(tmp_path / f"x{HOSTILE[:9]}", targets=HOSTILE[:40])
    other = make_directory(tmp_path / "y")
    write(directory, STARTED, *steps(3, loss=lambda i: math.nan), {"event": "failed", "step": 3, "error": HOSTILE, "fact": HOSTILE, "fix": HOSTILE})
    content = sl.runs(directory.path, other.path)._repr_html_()
    assert_inert(content, "div", "span", "b", "img", "table", "tr", "th", "td")
    assert "&lt;img" in content
    assert "No step was made yet" in content
    assert "\x1b" not in str(sl.runs(directory.path, other.path))


def test_more_runs_than_colours(tmp_path):
    for index in range(4, runs_view.MOST_DRAWN + 6):
        write(make_directory(tmp_path / f"run-{index}"), STARTED, *steps(5))
    assert [run.path.name for run in sl.runs(tmp_path)][:2] == ["run-4", "run-5"]  # 10 comes after 9
    content = sl.runs(tmp_path)._repr_html_()
    assert f"{runs_view.MOST_DRAWN + 2} runs" in content and f"curves of the first {runs_view.MOST_DRAWN}" in content


def test_losses_on_different_held_out_data_are_not_compared(folder):
    """By content where the run wrote it down: another file, seed or share of it is another question; a copy of the file is the same."""
    before = {run.path: run.recipe.to_dict() for run in sl.runs(folder)}

    def held(index, **changes):
        path = list(before)[index]
        (path / "environment.json").write_text(json.dumps({"data": {"path": "x", "sha256": changes.pop("sha256", "aa")}}))
        (path / "recipe.json").write_text(json.dumps({**before[path], **changes}))

    def best():
        found = sl.runs(folder)
        told = (found.best, [row["best"] for row in runs_view.table(found.entries())["rows"]])
        said = [runs_view.APART in words for words in (str(found), found._repr_html_(), runs_view.view(found.entries())[0]["about"])]
        assert len(set(said)) == 1
        return (told[0] and told[0].path.name, told[1], said[0])

    for index in range(3):
        held(index, data=f"copy-{index}.jsonl")
    assert best() == ("b", [False, True, False], False)
    for changes in ({"sha256": "bb"}, {"seed": 1}, {"held_out": 0.3}, {"max_length": 64}):
        held(1, **changes)
        assert best() == (None, [False, False, True], True), changes
        held(1)
        assert best()[0] == "b"

    def measured(index, loss, tokens):
        with open(list(before)[index] / "events.jsonl", "a") as file:
            file.write(json.dumps({"event": "eval", "step": 41, "loss": loss, "tokens": tokens}) + "\n")

    for index in range(3):
        measured(index, 0.1 * (3 - index), 18)
    held(1, max_length=64)  # no matter, where it cut nothing that counts
    assert best() == (ARABIC, [False, False, True], False)
    held(1, max_length=64, on_long="split")
    assert best() == (None, [False, False, True], True)
    held(1)
    measured(2, 0.05, 17)
    assert best() == (None, [False, True, False], True)
    for index in range(3):
        held(index, sha256=str(index))
    assert best() == (None, [False] * 3, True)


def test_a_damaged_run_is_still_listed(tmp_path):
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "recipe.json").write_text('{"model": 3, "colour": "blue"}')
    write(make_directory(tmp_path / "sound"), STARTED, *steps(5))
    table = sl.runs(tmp_path)
    assert [row["model"] for row in table.to_dict()["runs"]] == [None, "Qwen/Qwen3-0.6B"]
    assert table.best is None and "odd" in str(table)
    assert "No runs here" in sl.runs(tmp_path / "sound" / "commands")._repr_html_()


def test_what_is_no_run_is_said_at_once(tmp_path):
    with pytest.raises(RunNotFound, match=r"nowhere, .*void"):
        sl.runs(tmp_path / "nowhere", tmp_path, tmp_path / "void")


def test_from_the_shell(folder):
    done = run_cli("runs", folder, "--json")
    assert [row["status"] for row in json.loads(done.stdout)["runs"]] == ["finished"] * 3
    assert run_cli("runs", cwd=folder.parent).stdout.splitlines()[0].split()[:2] == ["run", "state"]
    assert run_cli("runs", "nowhere").returncode == 2
