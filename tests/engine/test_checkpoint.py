"""Checkpoints: whole or not there, exact, and free of pickles."""

import os
import random

import numpy as np
import pytest
import torch

from sparklab.engine import checkpoint
from sparklab.errors import RunError


def seal(folder, content=b"abc"):
    with checkpoint.written_whole(folder) as draft:
        (draft / "weights").write_bytes(content)


def test_a_sealed_folder_has_no_faults_and_a_touched_one_names_the_file(tmp_path):
    seal(tmp_path / "step-000001")
    assert checkpoint.faults(tmp_path / "step-000001") == []
    (tmp_path / "step-000001" / "weights").write_bytes(b"abd")
    assert checkpoint.faults(tmp_path / "step-000001") == ["weights is not as it was written"]
    (tmp_path / "step-000001" / "weights").unlink()
    assert checkpoint.faults(tmp_path / "step-000001") == ["weights is missing"]
    (tmp_path / "step-000001" / "manifest.json").write_text("{")
    assert checkpoint.faults(tmp_path / "step-000001") == ["manifest.json is missing or damaged"]


def test_an_error_while_writing_leaves_nothing(tmp_path):
    def write():
        with checkpoint.written_whole(tmp_path / "step-000001") as draft:
            (draft / "weights").write_bytes(b"abc")
            raise OSError(28, "disk full")

    with pytest.raises(OSError, match="full"):
        write()
    assert list(tmp_path.iterdir()) == []


def test_the_newest_good_one_wins_and_the_damaged_one_is_named(tmp_path):
    for step in (1, 20, 3):
        seal(checkpoint.step_path(tmp_path, step))
    (tmp_path / "step-000020" / "weights").write_bytes(b"torn")
    (tmp_path / ".step-000099.1.new").mkdir()
    path, complaints = checkpoint.newest_good(tmp_path)
    assert path == tmp_path / "step-000003"
    assert complaints == ["checkpoint step-000020 is damaged (weights is not as it was written)"]
    checkpoint.keep_last(tmp_path, 1)
    assert checkpoint.steps(tmp_path) == [20]


def test_a_manifest_cannot_point_outside(tmp_path):
    seal(tmp_path / "step-000001")
    os.symlink("/etc/hostname", tmp_path / "step-000001" / "weights2")
    manifest = '{"files": {"../secret": [1, "x"], "weights2": [1, "x"]}}'
    (tmp_path / "step-000001" / "manifest.json").write_text(manifest)
    assert checkpoint.faults(tmp_path / "step-000001") == ["../secret is missing", "weights2 is missing"]


def test_optimizer_comes_back_bit_for_bit(tmp_path):
    def fresh():
        torch.manual_seed(0)
        model = torch.nn.Linear(5, 3)
        return model, torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.8, 0.99), fused=True)

    def step(model, optimizer):
        model(torch.ones(2, 5)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer = fresh()
    for _ in range(3):
        step(model, optimizer)
    checkpoint.save_optimizer(optimizer, tmp_path)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    step(model, optimizer)
    again, optimizer_again = fresh()
    again.load_state_dict(weights)
    checkpoint.load_optimizer(optimizer_again, tmp_path)
    step(again, optimizer_again)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    assert optimizer_again.param_groups[0]["betas"] == (0.8, 0.99)
    assert {file.suffix for file in tmp_path.iterdir()} == {".safetensors", ".json"}


def test_random_generators_come_back(tmp_path):
    random.gauss(0, 1)  # leaves a second value waiting inside the generator
    np.random.standard_normal()
    checkpoint.save_rng(tmp_path)

    def draw():
        return random.gauss(0, 1), random.random(), np.random.standard_normal(), np.random.randint(1 << 30), torch.rand(3).tolist()

    first = draw()
    assert draw() != first
    checkpoint.load_rng(tmp_path)
    assert draw() == first


def test_weights_of_another_model_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"strange": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(RunError, match="does not belong"):
        checkpoint.load_weights(torch.nn.Linear(2, 2), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(RunError, match="neither"):
        checkpoint.load_weights(torch.nn.Linear(2, 2), tmp_path)
