"""Experts without adapters in one function: the numbers of transformers' own path, what it keeps, and when it steps aside."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from family_configs import SMALL
from peft import LoraConfig
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
from whole_step import documents, recipe_of, rows_of, sparklab_update, stock_update, worst

from sparklab.engine import frozen_experts
from sparklab.engine.frozen_experts import FrozenExperts, take_over
from sparklab.model.experts import expert_modules
from sparklab.model.load import ATTENTION_LINEARS

MIXTURES = ["deepseek_v2", "deepseek_v3", "gpt_oss", "mixtral", "olmoe", "qwen3_moe"]
pytestmark = pytest.mark.filterwarnings("ignore")  # transformers has opinions on token numbers and rotary factors of configs this small


def layer(family: str, dtype: torch.dtype, ours: bool) -> Any:
    """The experts of one layer of a family's small config, with weights that bf16 holds exactly."""
    values = dict(SMALL[family])
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    module: Any = next(module for _, module in expert_modules(AutoModelForCausalLM.from_config(config)))
    draw = torch.Generator().manual_seed(5)
    for parameter in module.parameters():
        parameter.data = (torch.randn(parameter.shape, generator=draw) * 0.3).to(torch.bfloat16).to(dtype)
        parameter.requires_grad_(False)
    assert not ours or take_over(module)
    return module


def given(module: Any, dtype: torch.dtype, wide: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Input, choices and shares of 40 tokens; nobody goes to the last expert."""
    torch.manual_seed(6)
    hidden = module.gate_up_proj.shape[1 if module.is_transposed else 2]
    x = torch.randn(40, hidden).to(torch.bfloat16).to(dtype).requires_grad_()
    index = torch.stack([torch.randperm(module.num_experts - 1)[:2] for _ in range(40)])
    shares = torch.rand(40, 2) if wide else torch.rand(40, 2).to(torch.bfloat16)
    return x, index, shares.to(torch.float32 if wide else dtype).requires_grad_()


def results(family: str, dtype: torch.dtype, ours: bool, wide: bool = False) -> list[torch.Tensor]:
    """The output, and the gradients of the input and of the shares."""
    module = layer(family, dtype, ours)
    x, index, shares = given(module, dtype, wide)
    out = module(x, index, shares)
    torch.manual_seed(7)
    (out.float() * torch.randn(out.shape)).sum().backward()
    assert ours == (type(out.grad_fn).__name__ == "_FrozenExpertsBackward")
    assert x.grad is not None and shares.grad is not None and x.grad.dtype == dtype and shares.grad.dtype == shares.dtype
    return [out.detach(), x.grad, shares.grad]


@pytest.mark.parametrize("family", MIXTURES)
def test_fp32(family):
    for one, other in zip(results(family, torch.float32, ours=True), results(family, torch.float32, ours=False), strict=True):
        assert float((one - other).norm() / other.norm()) < 1e-6


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("family", MIXTURES)
def test_bf16_is_as_near_the_truth_as_transformers(family, wide):
    truth = results(family, torch.float32, ours=False, wide=wide)
    ours, theirs = (
        [float((value.float() - true).norm() / true.norm()) for value, true in zip(results(family, torch.bfloat16, own, wide), truth, strict=True)]
        for own in (True, False)
    )
    assert max(ours) < 0.02
    assert sum(ours) < 1.1 * sum(theirs)


@pytest.mark.parametrize("family", MIXTURES)
def test_the_whole_update_with_adapters_on_attention_alone(family, tmp_path, monkeypatch):
    """Packed, checkpointed, in two rows, against transformers and PEFT one document at a time: loss to 1e-6, each gradient to 1e-5."""
    seen = []
    run = frozen_experts._FrozenExperts.apply
    monkeypatch.setattr(frozen_experts._FrozenExperts, "apply", lambda *values: seen.append(values) or run(*values))
    recipe, told = recipe_of(tmp_path / "model", SMALL[family], targets="attention"), documents()
    stock = stock_update(recipe, told, target_modules=list(ATTENTION_LINEARS))
    for rows, layers in ((1, "none"), (2, "all")):
        ours = sparklab_update(recipe.replace(checkpoint_layers=layers), rows_of(told, True, rows), tmp_path / "run")
        assert ours.loss == pytest.approx(stock.loss, rel=1e-6)
        assert worst(stock.gradients, ours.gradients)[0] < 1e-5
    assert len(seen) == 5 * (2 if family in ("qwen3_moe", "deepseek_v2", "deepseek_v3") else 3)  # once, and forward and again in two rows


def test_which_gates_are_known():
    known = {family: (act := layer(family, torch.float32, ours=True).fast_act) and act.name for family in MIXTURES}
    assert known == {**dict.fromkeys(MIXTURES, "silu"), "gpt_oss": None}


def test_a_gate_that_clamps_far_out_is_another():
    module = layer("qwen3_moe", torch.float32, ours=False)

    class Clamped(type(module)):
        def _apply_gate(self, gate_up):
            gate, up = gate_up.chunk(2, -1)
            return nn.functional.silu(gate.clamp(max=1e4)) * up

    module.__class__ = Clamped
    assert take_over(module) and module.fast_act is None


@pytest.mark.parametrize("count", [256, 257, 300])
def test_many_experts(count):
    """More of them than a byte can number take wider keys."""
    config = SimpleNamespace(num_experts=count, hidden_size=32, moe_intermediate_size=16, hidden_act="silu", _experts_implementation="grouped_mm")
    found = []
    for ours in (True, False):
        module: Any = Qwen3MoeExperts(config)
        torch.manual_seed(1)
        for parameter in module.parameters():
            parameter.data = torch.randn(parameter.shape)
            parameter.requires_grad_(False)
        assert not ours or take_over(module)
        index = torch.stack([torch.randperm(count)[:4] for _ in range(200)])
        found.append(module(torch.randn(200, 32), index, torch.rand(200, 4)))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-4)


def steps_aside(change) -> bool:
    """Whether the module's own forward pass runs after a change."""
    module = layer("gpt_oss", torch.float32, ours=True)
    x, index, shares = given(module, torch.float32, wide=False)
    with change(module) or torch.no_grad():
        torch.set_grad_enabled(True)
        out = module(x.to(module.down_proj.dtype) if change is halve else x, index, shares)
    return type(out.grad_fn).__name__ != "_FrozenExpertsBackward"


def halve(module):
    module.to(torch.bfloat16)


def test_it_steps_aside():
    """Where a weight or a bias learns, types differ, autocast rules, experts are spread over processes or adapters were put around them."""
    assert not steps_aside(lambda module: None)
    assert steps_aside(lambda module: module.down_proj.requires_grad_() is None)
    assert steps_aside(lambda module: module.gate_up_proj_bias.requires_grad_() is None)
    assert steps_aside(lambda module: setattr(module, "_is_expert_parallel", True))
    assert steps_aside(lambda module: torch.autocast("cpu", torch.bfloat16))


def test_weights_that_are_trained_anew_get_their_gradients():
    module = layer("qwen3_moe", torch.float32, ours=True)
    module.requires_grad_(True)
    x, index, shares = given(module, torch.float32, wide=False)
    module(x, index, shares).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_adapters_put_around_later_are_computed():
    """PEFT's own wrapper adds to the weights, which then learn."""
    from peft import get_peft_model

    model = nn.ModuleDict({"experts": layer("qwen3_moe", torch.float32, ours=True)})
    x, index, shares = given(model["experts"], torch.float32, wide=False)
    before = model["experts"](x, index, shares)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=[], target_parameters=["experts.down_proj"], init_lora_weights=False))
    module = adapted.base_model.model["experts"]
    out = module(x, index, shares)
    out.sum().backward()
    assert (out - before).abs().max() > 1e-3
    assert all(parameter.grad is not None for parameter in adapted.parameters() if parameter.requires_grad)
    with adapted.disable_adapter():
        torch.testing.assert_close(module(x, index, shares), before)


def test_what_is_kept():
    """gate_up in bf16, two places of 8 bytes a row, the shares: nothing of [S, H], and no input."""
    module = layer("qwen3_moe", torch.bfloat16, ours=True)
    x, index, shares = given(module, torch.bfloat16, wide=False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        module(x, index, shares)
    inner, rows = module.down_proj.shape[2], index.numel()
    assert sum(tensor.nbytes for tensor in kept) == rows * (2 * inner * 2 + 2 * 8 + 2) + 4 * module.num_experts


def test_nothing_waits_for_the_device():
    """No call reads a number back, and none makes a shape of numbers: what a CUDA graph can hold. The products' own loop on a CPU is not among them."""
    module = layer("gpt_oss", torch.bfloat16, ours=True)
    x, index, shares = given(module, torch.bfloat16, wide=False)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        module(x, index, shares).sum().backward()
    names = [event.name for event in seen.events()]
    assert names.count("aten::_grouped_mm") == 4
    assert not {"aten::nonzero", "aten::masked_select", "aten::masked_fill_"} & set(names)
    for event in (event for event in seen.events() if event.name == "aten::_local_scalar_dense"):
        above = event.cpu_parent
        while above is not None and above.name != "aten::_grouped_mm":
            above = above.cpu_parent
        assert above is not None, "a number is read"


def test_a_base_with_our_experts_is_still_that_class():
    module = layer("mixtral", torch.float32, ours=True)
    assert isinstance(module, FrozenExperts) and type(module).__name__ == "MixtralExperts"
