"""Our Triton kernels for experts: in Triton's interpreter, as far as a CPU can; and what happens where they are missing or wrong."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from support import ROOT

from sparklab.model import expert_kernels

FOLDER = ROOT / ".venv" / "liger"
CPU = torch.device("cpu")


@pytest.fixture
def fresh():
    """The decision is made anew, and forgotten after the test."""
    expert_kernels._decide.cache_clear()
    yield
    expert_kernels._decide.cache_clear()


@pytest.mark.slow
def test_our_kernels_in_tritons_interpreter():
    if not (FOLDER / "triton").is_dir():
        pytest.skip("Triton is not in .venv/liger (`make .venv/liger`)")
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests", FOLDER)))
    environ = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/engine/interpreted_experts.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environ, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    counts = re.search(r"(\d+) passed", done.stdout)
    assert counts is not None and int(counts[1]) == 15


def test_on_a_cpu_nothing_of_them_is_asked_for(fresh, monkeypatch):
    monkeypatch.setattr(expert_kernels, "_decide", lambda: pytest.fail("asked"))
    x = torch.randn(4, 8)
    assert expert_kernels.product(x) is None and expert_kernels.gradients_(x, x) is None and expert_kernels.gather_sum(x, x, x) is None
    assert expert_kernels.refusal(CPU) == ""


def test_without_triton_nothing_is_said(fresh, monkeypatch):
    monkeypatch.setattr(expert_kernels, "DEVICE", "cpu")
    monkeypatch.setattr(expert_kernels, "find_spec", lambda name: None)
    assert expert_kernels.refusal(CPU) == "" and expert_kernels.product(torch.randn(2, 4)) is None


def test_a_triton_that_cannot_be_loaded_is_told(fresh, monkeypatch):
    monkeypatch.setattr(expert_kernels, "DEVICE", "cpu")
    monkeypatch.setattr(expert_kernels, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "sparklab.model.expert_triton", raising=False)
    assert re.search(r"a trial of our Triton kernels for experts failed \(ModuleNotFoundError: .*triton", expert_kernels.refusal(CPU))
    assert expert_kernels.product(torch.randn(2, 4)) is None


def kernels(wrong=""):
    """Torch's arithmetic in the shape of the kernels, one of them wrong."""

    def product(gate_up):
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * (up + 1e-3 if wrong == "product" else up)

    def gradients_(grad, gate_up):
        leaf = gate_up.clone().requires_grad_()
        gate, up = leaf.chunk(2, -1)
        made = F.silu(gate) * up
        gate_up.copy_(torch.autograd.grad(made, leaf, grad)[0] * (1.01 if wrong == "gradients" else 1))
        return (made.detach() * grad).sum(-1) + (0.01 if wrong == "along" else 0)

    def gather_sum(rows, places, shares):
        weights = 1 if shares is None or wrong == "weights" else shares[..., None]
        return (rows[places] * weights).sum(1)

    return SimpleNamespace(product=product, gradients_=gradients_, gather_sum=gather_sum)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [("", ""), ("product", "gated product gives"), ("gradients", "gradients are"), ("along", "gradients are"), ("weights", "sums of rows are")],
)
def test_the_trial_finds_which_is_wrong(monkeypatch, wrong, said):
    monkeypatch.setattr(expert_kernels, "DEVICE", "cpu")
    found = expert_kernels._disagreement(kernels(wrong))
    assert said in found and bool(found) == bool(wrong)
