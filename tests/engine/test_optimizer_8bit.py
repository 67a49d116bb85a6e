"""AdamW with 8-bit states, in real runs of the bundled model: as large as planned, exact after a resume, close to AdamW in what it learns."""

import pytest
from safetensors.torch import load_file
from support import stop_after

import sparklab as sl

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("method", ["full", "lora"])
def test_states_are_as_planned_and_survive_a_stop(small_recipe, tmp_path, monkeypatch, method):
    recipe = small_recipe(method, optimizer="adamw_8bit", max_steps=4, epochs=20)
    whole = sl.train(recipe, tmp_path / "whole", inline=True, panel=False)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        run = sl.train(recipe, tmp_path / "stopped", inline=True, panel=False)
    saved = run.path / "checkpoints" / "step-000002" / "optimizer.safetensors"
    tensors = load_file(saved)
    bits = {str(tensor.dtype) for name, tensor in tensors.items() if name.endswith(("state1", "state2"))}
    assert "torch.uint8" in bits
    if method == "full":
        assert "torch.float32" in bits  # embedding and norms
    kept = sum(tensor.nbytes for name, tensor in tensors.items() if "qmap" not in name)  # one table for all of them while training
    planned = {item.name: item.size_bytes for item in sl.plan(recipe).ledger.states}
    assert kept == planned["optimizer"]
    run.resume(inline=True, panel=False)
    assert run.state.losses == whole.state.losses
    if method == "lora":
        plain = sl.train(recipe.replace(optimizer="adamw"), tmp_path / "plain", inline=True, panel=False)
        assert whole.state.losses != plain.state.losses
        assert whole.state.losses == pytest.approx(plain.state.losses, rel=0.02)
