"""Liger's own kernels behind our seams, run by Triton's interpreter on a CPU. Not collected by name: test_liger.py starts it in a process of its own.

The interpreter hands over a plain float where a GPU's launch hands over an fp32 scalar, and knows no function of CUDA's libdevice; both are supplied. It
multiplies bf16 numbers as if their bits were integers, so all is fp32 here.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton.language as tl
from family_configs import SMALL
from liger_kernel.ops import geglu as liger_geglu
from liger_kernel.ops import rms_norm as liger_rms_norm
from transformers.activations import ACT2FN
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from triton.runtime import interpreter
from whole_step import documents, recipe_of, rows_of, sparklab_update, stock_update, worst

from sparklab.engine import fast, liger, norm, rotary
from sparklab.model.load import ATTENTION_LINEARS

pytestmark = pytest.mark.filterwarnings("ignore")
plain_convert = interpreter._implicit_cvt


def convert(argument):
    if type(argument) is not float:
        return plain_convert(argument)
    return tl.tensor(interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32), tl.float32)


def rsqrt(x):
    return tl.rsqrt(x)  # looked up when it is called: then it is the interpreter's


def tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


@pytest.fixture(autouse=True, scope="module")
def on_a_cpu():
    interpreter._implicit_cvt = convert
    liger_rms_norm.rsqrt, liger_geglu.tanh = rsqrt, tanh
    liger.DEVICE = "cpu"
    assert liger.refusal(torch.device("cpu")) == "" and liger._decide()[0] is not None


@pytest.fixture
def counted(monkeypatch):
    """How often each of Liger's functions is called."""
    counts: dict[str, int] = {}
    found = liger._decide()[0]

    def counting(name, function):
        def counted(*args):
            counts[name] = counts.get(name, 0) + 1
            return function(*args)

        return counted

    told = liger.Kernels(
        counting("norm", found.norm),
        counting("turn", found.turn),
        {act: counting("gated", function) for act, function in found.gated.items()},
        {act: counting("gated_backward", function) for act, function in found.gated_backward.items()},
    )
    monkeypatch.setattr(liger, "_decide", lambda: (told, ""))
    return counts


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Olmo2RMSNorm, GemmaRMSNorm])
def test_norms(kind, counted):
    torch.manual_seed(0)
    stock, ours = kind(48, eps=1e-5), kind(48, eps=1e-5)
    stock.weight.data.normal_()
    ours.load_state_dict(stock.state_dict())
    fast._fit_block(ours)
    x = torch.randn(2, 9, 48)
    up = torch.linspace(-1, 1, x.numel()).view_as(x)
    untouched = up.clone()
    found = []
    for module in (stock, ours):
        given = x.clone().requires_grad_()
        out = module(given)
        out.backward(up)
        found.append((out.detach(), given.grad, module.weight.grad))
    for wanted, given in zip(*found, strict=True):
        assert float((given - wanted).norm() / wanted.norm()) < 1e-5
    assert counted == {"norm": 1} and isinstance(ours, norm.RMSNorm)
    assert torch.equal(up, untouched)  # a residual's gradient is others' too


def test_rotary(counted):
    torch.manual_seed(0)
    angles = torch.randn(1, 9, 8).repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin()
    q, k, up = (torch.randn(1, 9, heads, 16).transpose(1, 2) for heads in (4, 2, 4))
    found = []
    for turn in (apply_rotary_pos_emb, rotary.apply):
        a, b = q.clone().requires_grad_(), k.clone().requires_grad_()
        turned_q, turned_k = turn(a * 1, b * 1, cos, sin)
        ((turned_q * up).sum() + turned_k.sum()).backward()
        found.append((turned_q.detach(), turned_k.detach(), a.grad, b.grad))
    for wanted, given in zip(*found, strict=True):
        assert float((given - wanted).norm() / wanted.norm()) < 1e-5
    assert counted == {"turn": 1}


@pytest.mark.parametrize(("act", "name"), [("silu", "silu"), ("gelu_tanh", "gelu_pytorch_tanh")])
def test_gated_products(act, name, counted):
    gate, up, grad = torch.randn(3, 7, 40).unbind()
    leaves = [gate.clone().requires_grad_(), up.clone().requires_grad_()]
    wanted = ACT2FN[name](leaves[0]) * leaves[1]
    torch.testing.assert_close(liger.gated(act, gate, up), wanted, rtol=1e-5, atol=1e-6)
    found = liger.gated_backward_(act, grad, gate, up)
    for one, other in zip(found, torch.autograd.grad(wanted, leaves, grad), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert found[0].data_ptr() == gate.data_ptr() and found[1].data_ptr() == up.data_ptr()
    assert liger.gated("gelu", gate, up) is None


@pytest.mark.parametrize("family", sorted(SMALL))
@pytest.mark.parametrize("changes", [{}, {"method": "full"}, {"targets": "attention"}], ids=["lora", "full", "frozen"])
def test_whole_updates(family, changes, tmp_path, counted):
    """Nothing that any family computes looks at a tensor that was turned in place, or at a gradient that was written over."""
    recipe, told = recipe_of(tmp_path / family, SMALL[family], **changes), documents(lengths=(3, 1, 9))
    liger.DEVICE = "nowhere"
    stock = stock_update(recipe, told, **({"target_modules": list(ATTENTION_LINEARS)} if "targets" in changes else {}))
    liger.DEVICE = "cpu"
    ours = sparklab_update(recipe.replace(checkpoint_layers=1), rows_of(told, True, 1), tmp_path / "run")
    assert abs(ours.loss / stock.loss - 1) < 1e-6
    assert worst(stock.gradients, ours.gradients)[0] < 1e-5
    assert counted.get("norm", 0) + counted.get("turn", 0) > 0 or family == "gpt_neox"
    if family in ("llama", "gemma2", "qwen3"):
        assert ("gated" in counted and "gated_backward" in counted) == (changes.get("method") != "full")
