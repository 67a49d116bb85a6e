"""The script that makes the bundled model, at a size that takes seconds: it reproduces itself, and releases nothing that cannot copy."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "examples" / "make_tiny.py"


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("make_tiny", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_tiny"] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    module.TOKENIZER_CHATS = 400
    module.PROBE_CHATS = 8
    yield module
    del sys.modules["make_tiny"]


def settings(script: Any, out: Path, **changes: Any) -> Any:
    small = {"steps": 3, "rows": 2, "row_tokens": 128, "vocabulary": 400, "hidden": 32, "heads": 2, "layers": 1, "feed_forward": 48, "threads": 1}
    return script.Settings(out=out, **{**small, **changes})


def test_the_same_seed_makes_the_same_files(script: Any, tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        assert script.make(settings(script, tmp_path / name, seed=seed, force=True))
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len(names) == 7
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    assert (tmp_path / "one" / "model.safetensors").read_bytes() != (tmp_path / "other" / "model.safetensors").read_bytes()


def test_nothing_is_released_that_fails_the_gate(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not script.make(settings(script, tmp_path / "none"))
    assert not (tmp_path / "none").exists()
    assert "the validation gate failed: copy 0.000, 0.85 needed" in capsys.readouterr().err


def test_muon_is_torchs_muon(script: Any) -> None:
    """Two steps on three shapes against torch.optim.Muon, which rounds to bf16 inside."""
    torch.manual_seed(0)
    start = [torch.randn(shape) * 0.02 for shape in ((32, 32), (48, 32), (32, 48), (32, 32))]
    gradients = [[torch.randn_like(matrix) for matrix in start] for _ in range(2)]
    ours, theirs = ([torch.nn.Parameter(matrix.clone()) for matrix in start] for _ in range(2))
    mine = script.Muon(ours, weight_decay=0.1)
    reference = torch.optim.Muon(theirs, lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for step in gradients:
        for parameters in (ours, theirs):
            for parameter, gradient in zip(parameters, step, strict=True):
                parameter.grad = gradient.clone()
        mine.step(0.01)
        reference.step()
    for parameter, other, before in zip(ours, theirs, start, strict=True):
        moved, expected = parameter.detach() - before, other.detach() - before
        assert (moved - expected).norm() < 0.03 * expected.norm()


def test_a_chat_sees_only_itself(script: Any) -> None:
    document = torch.tensor([[0, 0, 1, 1, 1]])
    batch = script.Batch(ids_BT=document, position_BT=document, document_BT=document, weight_BT=document)
    assert batch.mask_B1TT()[0, 0].int().tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]


def test_the_loss_is_on_answers(script: Any) -> None:
    assistant, end = 7, 9
    ids = torch.tensor([[1, 5, 9, 7, 3, 4, 9, 5, 9, 7, 2]])
    assert script.answer_mask(ids, assistant, end).int().tolist() == [[0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 1]]
