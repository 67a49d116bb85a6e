"""Compare and evaluate, on a run that learned."""

import math
import os
from pathlib import Path

import pytest

import sparklab as sl
from sparklab.engine.answer import exact_match
from sparklab.errors import RecipeError, RunChanged, RunError, RunFailed
from sparklab.panels.tables import Evaluation
from sparklab.run.directory import RunDirectory
from sparklab.run.events import EventWriter
from sparklab.run.process import ask_process

pytestmark = pytest.mark.slow


def test_exact_match_by_hand():
    assert exact_match(["a ", "b", "c", "d"], ["a", "b", "x", "D"]) == {"exact_match": 0.5, "n": 4, "standard_error": 0.25}


@pytest.mark.parametrize("method", ["lora", "full"])
def test_compare_and_evaluate(small_recipe, tmp_path, method):
    run = sl.train(small_recipe(method, max_steps=40, epochs=20), tmp_path / "run", inline=True, panel=False)
    prompt = "Hello <b>there</b>!"
    comparison = run.compare([prompt], max_new_tokens=12)
    (row,) = comparison.rows
    assert row["prompt"] == prompt
    assert row["base"] != row["tuned"]
    assert prompt in str(comparison)
    assert "<b>there" not in comparison._repr_html_()
    evaluation = run.evaluate(4)
    assert (evaluation.held_out, evaluation.answered) == (8, 4)
    # the same loss the run itself measured at its end and at its start, computed by another process from the saved files
    assert evaluation.tuned.loss == pytest.approx(run.state.evals[-1]["loss"], rel=1e-5)
    assert evaluation.base.loss == pytest.approx(run.state.evals[0]["loss"], rel=1e-5)
    assert evaluation.tuned.loss < evaluation.base.loss
    assert not math.isnan(evaluation.tuned.exact_match)
    assert "±" in str(evaluation)


def test_of_plain_text_nothing_is_asked():
    loss = {"base": {"loss": 2.5, "tokens": 40}, "tuned": {"loss": 1.25, "tokens": 40}}  # as answers.evaluate gives it where no record is a question
    evaluation = Evaluation.from_answer({"held_out": 0, "answered": 0, **loss})
    assert (evaluation.tuned.n, evaluation.tuned.loss) == (0, 1.25) and math.isnan(evaluation.tuned.exact_match)
    assert "1.2500" in str(evaluation) and "exact" not in str(evaluation) + evaluation._repr_html_()


def test_what_cannot_be_asked_is_said_before_a_process_is_made():
    run = sl.Run(RunDirectory.__new__(RunDirectory))
    for n in (0, -1, "three", True):
        with pytest.raises(RunError, match=f"n is {n!r}; it must be a whole number of at least 1"):
            run.evaluate(n)
        with pytest.raises(RunError, match=f"max_new_tokens is {n!r}; "):
            run.compare("Hello!", max_new_tokens=n)
    for prompts in ([], [3], ["a", None]):
        with pytest.raises(RunError, match="it must be one text or some"):
            run.compare(prompts)
    with pytest.raises(RecipeError, match=r"a str, not a recipe[\s\S]*sl.recipes.lora"):
        sl.train("tiny")


def test_a_process_that_was_ended_is_not_one_that_failed(tmp_path):
    for name, code in (("failed", "raise KeyError('n')"), ("killed", "import os; os.kill(os.getpid(), 9)")):
        (tmp_path / f"{name}.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    with pytest.raises(RunFailed, match=r"KeyError: 'n'[\s\S]*report it with these lines"):
        ask_process("failed", {}, environment, "compare", "free memory")
    with pytest.raises(RunFailed, match=r"exit status -9[\s\S]*free memory"):
        ask_process("killed", {}, environment, "compare", "free memory")


def test_data_that_has_moved_is_named_with_where_it_was(small_recipe, tmp_path):
    run = sl.train(small_recipe(), tmp_path / "run", inline=True, panel=False)
    moved = Path(run.recipe.data).rename(tmp_path / "elsewhere.jsonl")
    with pytest.raises(RunError, match=f"was trained on {run.recipe.data}, which is not there any more") as caught:
        run.evaluate()
    assert caught.value.fix == f"put {run.recipe.data} back where it was, or a link to where it is now"
    Path(run.recipe.data).symlink_to(moved)
    assert run.evaluate(n=1).to_dict()["tuned"]["n"] == 1
    records = moved.read_text(encoding="utf-8").splitlines(keepends=True)
    moved.write_text("".join(records[::-1]), encoding="utf-8")  # another split: records that were learned would count as held out
    with pytest.raises(RunChanged, match=r"started with something else than what lies there now:\s+- data: ") as changed:
        run.evaluate()
    assert changed.value.changed == ("data",)
    assert run.compare("Hello!", max_new_tokens=2).rows  # which asks nothing of the records


def test_no_result_yet(small_recipe, tmp_path):
    run = sl.Run(RunDirectory.create(tmp_path / "run", small_recipe(), {}, {}))
    with pytest.raises(RunError, match="no result yet"):
        run.compare(["Hello"])
    with EventWriter(run.directory.events_path) as events:
        events.write("finished", step=1)
    with pytest.raises(RunError, match=r"is finished, and its result is gone from .*adapter"):
        run.compare(["Hello"])
