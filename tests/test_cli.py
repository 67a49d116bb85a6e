"""The command line as typed: bad input meets one clear error, exit status 2, no traceback, and leaves nothing behind."""

import json
import shutil
from types import SimpleNamespace

import pytest
from support import ROOT, run_cli, write_chats

import sparklab
from sparklab import Recipe
from sparklab.model.hub import TINY_PATH
from sparklab.run.directory import RunDirectory

GOOD = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})


def fresh(folder):
    """A place with good data to break one thing in."""
    write_chats(folder / "good.jsonl", 8)
    (folder / "empty.jsonl").touch()
    (folder / "broken.jsonl").write_text(GOOD + "\n{nonsense\n")
    (folder / "strange.jsonl").write_text(GOOD + '\n{"text": "hi"}\n')
    (folder / "one.jsonl").write_text(GOOD + "\n")
    (folder / "same.jsonl").write_text(2 * (GOOD + "\n"))
    RunDirectory.create(folder / "run", Recipe(model="tiny", data="good.jsonl"), {}, {})
    (folder / "weightless").mkdir()
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(TINY_PATH / name, folder / "weightless")
    (folder / "pickled").mkdir()
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(TINY_PATH / name, folder / "pickled")
    (folder / "pickled" / "pytorch_model.bin").write_bytes(b"\x80\x04")
    (folder / "bad_config").mkdir()
    (folder / "bad_config" / "config.json").write_text("{")
    (folder / "occupied").mkdir()
    (folder / "occupied" / "thesis.tex").write_text("mine")


BAD = [
    (["train", "tiny", "nowhere.jsonl"], "DataNotFound", "nowhere.jsonl"),
    (["train", "tiny", "empty.jsonl"], "DataError", "empty"),
    (["train", "tiny", "broken.jsonl"], "DataError", "broken.jsonl:2"),
    (["train", "tiny", "strange.jsonl"], "DataError", "messages"),
    (["train", "tiny", "."], "DataError", "directory"),
    (["train", "good.jsonl", "tiny"], "ModelError", "name the model first"),
    (["train", "tiny", "good.jsonl", "--run", "run"], "RunExists", "sparklab resume run"),
    (["train", "tiny", "good.jsonl", "--run", "good.jsonl/run"], "RunError", "good.jsonl is a file"),
    (["train", "tiny", "good.jsonl", "--run", "x" * 300], "RunError", "File name too long"),
    (["report", "run", "--out", "."], "RunError", "is a directory"),
    (["train", "./no-model", "good.jsonl"], "ModelNotFound", "no-model"),
    (["train", "weightless", "good.jsonl"], "ModelError", "weights"),
    (["train", "pickled", "good.jsonl"], "ModelError", "pickle"),
    (["train", "bad_config", "good.jsonl"], "ModelError", "config.json"),
    (["train", "tiny", "good.jsonl", "--run", "occupied"], "RunExists", "occupied"),
    (["train", "tiny", "one.jsonl"], "DataError", "there is one record: none can be held out"),
    (["train", "tiny", "same.jsonl"], "DataError", "there are 2 records, all the same"),
    (["train", "tiny", "good.jsonl", "--rank", "0", "--epochs", "-1"], "RecipeError", "epochs"),
    (["train", "tiny", "good.jsonl", "--held-out", "gone.jsonl"], "DataNotFound", "gone.jsonl"),
    (["train", "tiny", "good.jsonl", "--method", "magic"], "RecipeError", "magic"),
    (["quickstart", "--method", "magic"], "RecipeError", "magic"),
    (["plan", "nowhere/config.json"], "ModelNotFound", "nowhere"),
    (["plan", "tiny", "--box", "toaster"], "BoxError", "dgx-spark"),
    (["box", "toaster"], "BoxError", "toaster"),
    (["watch", "no-run"], "RunNotFound", "no-run"),
    (["watch", "x" * 300], "RunNotFound", "File name too long"),
    (["runs", "x" * 300], "RunNotFound", "File name too long"),
    (["plan", "x" * 300], "ModelNotFound", "File name too long"),
    (["stop", "occupied"], "RunNotFound", "not a run"),
    (["compare", "occupied", "hi"], "RunNotFound", "not a run"),
    (["compare", "run", "hi", "--max-new-tokens", "0"], "RunError", "max_new_tokens is 0"),
    (["resume", "run", "--max-steps", "9"], "RecipeError", "max_steps (None in this run, 9 asked) cannot change on the way"),
]


@pytest.mark.parametrize(("arguments", "error", "word"), BAD, ids=[" ".join(case[0]) for case in BAD])
def test_bad_input(tmp_path, arguments, error, word):
    fresh(tmp_path)
    before = sorted(str(file) for file in tmp_path.rglob("*"))
    result = run_cli(*arguments, "--json", cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    told = json.loads(result.stdout)
    assert told["error"] == error
    assert word in told["fact"] + told["fix"]
    assert told["fix"]
    assert result.stderr.startswith("sparklab: ")
    assert sorted(str(file) for file in tmp_path.rglob("*")) == before


def test_a_full_disk_is_refused_before_anything_is_written(small_recipe, tmp_path, monkeypatch):
    import sparklab as sl
    from sparklab.errors import DiskFull

    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=100, used=100, free=0))
    recipe = small_recipe()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DiskFull, match="0 B are free"):
        sl.train(recipe, tmp_path / "run", panel=False)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_verb_that_does_not_exist_is_answered_with_the_nearest(tmp_path):
    for word, said in (
        ("tarin", "did you mean train?"),
        ("fly", "sparklab --help lists the verbs"),
        ("merge", "merge_and_unload"),
        ("export", "merge_and_unload"),
    ):
        result = run_cli(word, "run", cwd=tmp_path)
        assert result.returncode == 2 and f"there is no verb '{word}'; " in result.stderr and said in result.stderr
        assert len(result.stderr.splitlines()) == 2


def test_a_flag_that_does_not_exist_is_answered_with_the_nearest(tmp_path):
    for words, said in (
        (["plan", "tiny", "--rnk", "4"], "plan does not know '--rnk'; did you mean --rank?"),
        (["plan", "tiny", "--micro-batch-tokn=4"], "plan does not know '--micro-batch-tokn'; did you mean --micro-batch-tokens?"),
        (["runs", ".", "--zzz"], "runs does not know '--zzz'; sparklab runs --help lists what it takes"),
        (["evaluate", "run", "--held-out", "3"], "evaluate does not know '--held-out'; sparklab evaluate --help"),
        (["box", "this", "that"], "box does not know 'that'; sparklab box --help"),
    ):
        result = run_cli(*words, cwd=tmp_path)
        assert result.returncode == 2 and said in result.stderr and len(result.stderr.splitlines()) == 1


def test_usage_errors_are_argparses(tmp_path):
    for arguments in ([], ["fly"], ["plan"], ["plan", "tiny", "--rank", "--json"]):
        result = run_cli(*arguments, cwd=tmp_path)
        assert result.returncode == 2
        assert "usage: sparklab" in result.stderr


@pytest.mark.parametrize("model", ["llama-3.1-8b", "llama-3.3-70b"])
def test_plan_answers_for_a_config_alone(model):
    path = ROOT / "tests" / "planner" / "configs" / f"{model}.json"
    result = run_cli("plan", path, "--box", "dgx-spark", "--json")
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout)
    assert {plan["method"] for plan in told["plans"]} == {"full", "lora", "qlora"}
    for plan in told["plans"]:
        assert plan["fits"] == (plan["peak_gib"] <= plan["usable_gib"])
        assert plan["lines"]
        assert all(set(line) >= {"name", "phase", "gib", "formula"} for line in plan["lines"])
        assert plan["hours"]
        assert plan["wh"]
    assert told["fits"]
    assert told["method"] == ("qlora" if "70b" in model else told["method"])


def test_box_and_help(tmp_path):
    assert json.loads(run_cli("box", "--json", cwd=tmp_path).stdout)["memory_bytes"] > 2**30
    assert "NVIDIA GB10" in run_cli("box", "dgx-spark", cwd=tmp_path).stdout
    assert run_cli("--version", cwd=tmp_path).stdout == f"sparklab {sparklab.__version__}\n"
    text = run_cli("train", "--help", cwd=tmp_path).stdout
    assert "Peak learning rate." in text  # the sentence under the recipe's field
