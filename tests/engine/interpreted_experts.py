"""Our Triton kernels for experts, run by Triton's interpreter on a CPU. Not collected by name: test_expert_kernels.py starts it in a process of its own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from family_configs import SMALL
from whole_step import documents, recipe_of, rows_of, sparklab_update, stock_update, worst

from sparklab.engine.mlp import gate_of
from sparklab.model import expert_kernels
from sparklab.model.experts import Route
from sparklab.model.load import ATTENTION_LINEARS

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    monkeypatch.setattr(expert_kernels, "DEVICE", "cpu")
    assert expert_kernels.refusal(torch.device("cpu")) == "" and expert_kernels._decide()[0] is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inner", [16, 24, 1032])
def test_the_gate(inner, dtype):
    torch.manual_seed(0)
    near = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    gate_up, grad = torch.randn(5, 2 * inner).to(dtype), torch.randn(5, inner).to(dtype)
    leaf = gate_up.float().requires_grad_()
    gate, up = leaf.chunk(2, -1)
    wanted = F.silu(gate) * up
    (d_leaf,) = torch.autograd.grad(wanted, leaf, grad.float())
    act = gate_of(torch.nn.SiLU())
    torch.testing.assert_close(act.halves_product(gate_up).float(), wanted.detach(), **near)
    along = act.halves_gradients_(grad, gate_up)
    torch.testing.assert_close(gate_up.float(), d_leaf, **near)
    torch.testing.assert_close(along, (wanted.detach() * grad.float()).sum(-1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "choices"), [(16, 1), (1500, 3)])
def test_the_sum(width, choices, dtype):
    torch.manual_seed(0)
    route = Route.of(torch.stack([torch.randperm(5)[:choices] for _ in range(7)]), 5, False)
    rows, shares = torch.randn(7 * choices, width).to(dtype), torch.rand(7, choices)
    near = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for given in (None, shares, shares.to(dtype)):
        wanted = (rows[route.place_TK].float() * (1 if given is None else given.float()[..., None])).sum(1)
        found = route.gather_sum(rows, given)
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), wanted, **near)


@pytest.mark.parametrize(("family", "adapted"), [("qwen3_moe", False), ("mixtral", False), ("gpt_oss", False), ("deepseek_v3", False), ("qwen3_moe", True)])
def test_whole_updates(family, adapted, tmp_path, monkeypatch):
    """Nothing looks again at what was written over."""
    called = []
    for name in ("product", "gradients_", "gather_sum"):
        real = getattr(expert_kernels._decide()[0], name)
        monkeypatch.setattr(expert_kernels._decide()[0], name, lambda *values, name=name, real=real: called.append(name) or real(*values))
    changes = {"expert_adapters": True} if adapted else {"targets": "attention"}
    options = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]} if adapted else {}
    recipe, told = recipe_of(tmp_path / family, SMALL[family], **changes), documents(lengths=(3, 1, 9))
    stock = stock_update(recipe, told, target_modules=list(ATTENTION_LINEARS), **options)
    ours = sparklab_update(recipe.replace(checkpoint_layers=1), rows_of(told, True, 1), tmp_path / "run")
    assert abs(ours.loss / stock.loss - 1) < 1e-6
    assert worst(stock.gradients, ours.gradients)[0] < 1e-5
    assert set(called) == {"gather_sum"} | ({"product", "gradients_"} if family != "gpt_oss" and not adapted else set())
