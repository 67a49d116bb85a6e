"""What a run depends on is known by its content, and a change is named before anything is read."""

import json
import os
from pathlib import Path

import pytest
from support import write_chats

from sparklab.errors import RunChanged, RunError
from sparklab.planner.recipe import Recipe
from sparklab.run import inputs
from sparklab.run.directory import RunDirectory


@pytest.fixture
def recipe(tmp_path):
    return Recipe(model="tiny", data=str(write_chats(tmp_path / "chats.jsonl")), held_out=str(write_chats(tmp_path / "held.jsonl", 8, "held_out")))


@pytest.fixture
def directory(tmp_path, recipe):
    return RunDirectory.create(tmp_path / "run", recipe, {}, inputs.describe(recipe))


def edit(directory, name, change):
    path = directory.path / f"{name}.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def longer(path):
    Path(path).write_text(Path(path).read_text() + "\n")


def test_nothing_has_changed(directory):
    assert inputs.changes(directory) == {} == inputs.check(directory)
    manifest = directory.read_json("environment")["model"]["files"]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(manifest)


def test_every_change_is_named_with_what_it_was(directory, recipe):
    text = Path(recipe.data).read_text()
    Path(recipe.data).write_text(text.replace("a", "b", 1))
    longer(recipe.held_out)
    edit(directory, "recipe", lambda values: values.update(epochs=9.0, learning_rate=1e-3))
    edit(directory, "environment", lambda values: values["versions"].update(torch="1.0"))
    edit(directory, "environment", lambda values: values["model"]["files"]["config.json"].update(sha256="0"))
    found = inputs.changes(directory)
    assert list(found) == list(inputs.NAMES)
    assert found["recipe"] == "epochs was 1.0, is 9.0; learning_rate was 0.0002, is 0.001"
    assert found["data"] == f"{recipe.data} has other content of the same size" and "bytes, and had" in found["held_out"]
    assert found["model"] == "tiny: config.json is not as before" and found["versions"].startswith("torch was 1.0, is ")
    with pytest.raises(RunChanged, match=r"epochs was[\s\S]*--accept recipe data held_out model versions") as caught:
        inputs.check(directory)
    assert caught.value.changed == inputs.NAMES
    with pytest.raises(RunChanged) as caught:
        inputs.check(directory, ("recipe", "data"))
    assert "epochs" not in caught.value.fact and "torch was" in caught.value.fact


def test_data_that_is_not_there_cannot_be_accepted_but_linked_to(directory, recipe, tmp_path):
    moved = Path(recipe.data).rename(tmp_path / "elsewhere.jsonl")
    for accept in ((), ("data",)):
        with pytest.raises(RunChanged, match=r"data: .* cannot be read: No such file") as caught:
            inputs.check(directory, accept)
        assert caught.value.fix == f"put {recipe.data} back where it was, or a link to where it is now"
    Path(recipe.data).symlink_to(moved)
    assert inputs.check(directory) == {}


def test_what_is_accepted_is_the_new_start(directory, recipe):
    before = directory.read_json("environment")
    longer(recipe.data)
    found = inputs.check(directory, ("data", "versions"))
    assert list(found) == ["data"] and inputs.changes(directory) == {}
    assert inputs.accepted(directory) == [found] and directory.read_json("environment")["before"] == [before]
    longer(recipe.data)
    inputs.check(directory, ("data",))
    assert len(inputs.accepted(directory)) == 2 == len(directory.read_json("environment")["before"])
    with pytest.raises(RunError, match="nothing called 'everything' to accept"):
        inputs.check(directory, ("everything",))


def test_a_large_file_is_told_by_its_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "WHOLE_BYTES", 1000)
    file = tmp_path / "model.safetensors"
    file.write_bytes(os.urandom(5_000_000))
    first = inputs.model_manifest(str(tmp_path))
    assert set(first["files"]["model.safetensors"]) == {"bytes", "pieces_sha256"}
    for place in (0, 999_999, 4_999_999):
        content = bytearray(file.read_bytes())
        content[place] ^= 1
        file.write_bytes(content)
        assert inputs.model_manifest(str(tmp_path)) != first, place
        content[place] ^= 1
        file.write_bytes(content)
    assert inputs.model_manifest(str(tmp_path)) == first


@pytest.mark.parametrize("path", ["/dev/zero", "/etc/passwd", "/proc/self/environ", "."])
def test_a_strangers_recipe_cannot_have_a_file_read(directory, path):
    """Whatever the recipe points at, nothing of it is read before its content is known by hash, and nothing of it is shown."""
    edit(directory, "recipe", lambda values: values.update(data=path))
    edit(directory, "environment", lambda values: values["recipe"].update(data=path))
    with pytest.raises(RunChanged) as caught:
        inputs.check(directory)
    assert caught.value.changed == ("data",) and "/bin/" not in caught.value.fact and "PATH=" not in caught.value.fact


@pytest.mark.parametrize("damage", [{}, {"versions": []}, {"data": "x"}, {"model": {"files": 3}}, {"recipe": {"no": "field"}}, {"data": {"sha256": 1}}])
def test_a_damaged_record_is_a_change(directory, damage):
    if damage:
        edit(directory, "environment", lambda values: values.update(damage))
    else:
        (directory.path / "environment.json").write_text("{}")
    assert set(inputs.changes(directory)) == (set(damage) or set(inputs.NAMES))


def test_a_hub_models_files_are_filled_in_once_they_are_there(directory):
    files = directory.read_json("environment")["model"]["files"]
    edit(directory, "environment", lambda values: values["model"].update(files={}))
    assert inputs.changes(directory)["model"].endswith("are not as before")
    inputs.complete(directory)
    assert directory.read_json("environment")["model"]["files"] == files
