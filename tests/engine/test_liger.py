"""Liger's kernels behind our seams: in Triton's interpreter, as far as a CPU can; and what happens where they are missing or wrong."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch
from support import ROOT

from sparklab.engine import liger

FOLDER = ROOT / ".venv" / "liger"
CPU = torch.device("cpu")
WHOLE = "lora-gemma2 or (lora-qwen3 and not moe) or lora-olmo2 or full-llama or frozen-llama"  # each family takes up to 20 s; all pass with `-k whole`


@pytest.fixture
def fresh():
    """The decision is made anew, and forgotten after the test."""
    liger._decide.cache_clear()
    yield
    liger._decide.cache_clear()


@pytest.mark.slow
def test_liger_s_own_kernels_in_tritons_interpreter():
    if not (FOLDER / "triton").is_dir():
        pytest.skip("Triton is not in .venv/liger (`make .venv/liger`)")
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests", FOLDER)))
    environ = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/engine/interpreted.py", "-k", f"not whole or {WHOLE}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environ, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    counts = re.search(r"(\d+) passed", done.stdout)
    assert counts is not None and int(counts[1]) == 11


def test_on_a_cpu_nothing_of_it_is_asked_for(fresh, monkeypatch):
    monkeypatch.setattr(liger, "_decide", lambda: pytest.fail("asked"))
    x = torch.randn(1, 2, 3, 4)
    assert liger.norm(x, x[0, 0, 0], 1e-6, "llama") is None and liger.turn(x, x, x, x) is None
    assert liger.gated("silu", x, x) is None and liger.gated_backward_("silu", x, x, x) is None
    assert liger.refusal(CPU) == ""


def test_a_package_that_cannot_be_loaded_is_told(fresh, monkeypatch):
    monkeypatch.setattr(liger, "DEVICE", "cpu")
    monkeypatch.setattr(liger, "version", lambda name: "0.8.5")
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    assert re.search(r"liger-kernel 0\.8\.5 is installed and not used, .*\(ModuleNotFoundError: .*liger_kernel.*\)$", liger.refusal(CPU))
    x = torch.randn(2, 4)
    assert liger.norm(x, x[0], 1e-6, "llama") is None


def kernels(wrong=""):
    """Torch's arithmetic in the shape of Liger's functions, one of them wrong."""

    def norm(x, weight, eps, offset, casting, in_place):
        return torch.nn.functional.rms_norm(x, x.shape[-1:], weight + offset, eps) * (2 if wrong == "norm" else 1)

    def turn(q, k, cos, sin):
        return tuple(x * cos + torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), -1) * (cos if wrong == "turn" else sin) for x in (q, k))

    def product(function):
        return lambda gate, up: (gate, up, function(gate) * up)

    def backward(function, off):
        def gradients(gate, up, grad):
            leaves = [gate.clone().requires_grad_(), up.clone().requires_grad_()]
            return torch.autograd.grad(function(leaves[0]) * leaves[1], leaves, grad + off)

        return gradients

    acts = {"silu": torch.nn.functional.silu, "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh")}
    off = {"gelu_tanh": 0.1} if wrong == "gated" else {}
    gated_backward = {name: backward(act, off.get(name, 0)) for name, act in acts.items()}
    return liger.Kernels(norm, turn, {name: product(act) for name, act in acts.items()}, gated_backward)


@pytest.mark.parametrize(("wrong", "word"), [("", ""), ("norm", "RMSNorm"), ("turn", "rotary positions"), ("gated", "the product gated by gelu_tanh")])
def test_the_trial_finds_a_wrong_kernel(fresh, monkeypatch, wrong, word):
    monkeypatch.setattr(liger, "DEVICE", "cpu")
    monkeypatch.setattr(liger, "version", lambda name: "0.8.5")
    monkeypatch.setattr(liger, "_load", lambda: kernels(wrong))
    assert word in liger.refusal(CPU) and bool(liger.refusal(CPU)) == bool(wrong)
    assert (liger.norm(torch.randn(2, 4), torch.ones(4), 1e-6, "gemma") is None) == bool(wrong)


def test_a_refusal_is_said_once_a_model(fresh, monkeypatch):
    from transformers import LlamaConfig, LlamaForCausalLM

    from sparklab.engine import fast
    from sparklab.planner.recipe import Recipe

    monkeypatch.setattr(liger, "refusal", lambda device: "liger-kernel 0.8.5 is installed and not used")
    model = LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=10))
    said = fast.fit(model, Recipe(model="tiny", data="none", method="full"))
    assert said == ("liger-kernel 0.8.5 is installed and not used; sparklab's own PyTorch computes instead",)
