"""Adapters on experts: the numbers of PEFT's target_parameters, its files, and never the changed weights of a layer."""

import json
from types import SimpleNamespace

import pytest
import torch
from family_configs import SMALL
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import ParamWrapper as StockWrapper
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
from whole_step import BOX, base, documents, recipe_of, rows_of, set_adapters, sparklab_update, stock_update, worst

import sparklab as sl
from sparklab.box import Box
from sparklab.engine import checkpoint
from sparklab.engine.fast import left_to_stock, ready_model
from sparklab.errors import ModelError, RecipeError
from sparklab.model import experts
from sparklab.model.load import add_adapters
from sparklab.planner.recipe import Recipe

MIXTURES = ["deepseek_v2", "deepseek_v3", "gpt_oss", "mixtral", "olmoe", "qwen3_moe"]
TARGETS = ["experts.gate_up_proj", "experts.down_proj"]
pytestmark = pytest.mark.filterwarnings("ignore")  # transformers has opinions on token numbers and rotary factors of configs this small


def test_every_mixture_is_here():
    assert set(MIXTURES) == {family for family, values in SMALL.items() if "num_experts_per_tok" in values}


@pytest.mark.parametrize("family", MIXTURES)
def test_the_whole_update_is_that_of_peft(family, tmp_path):
    """Loss to 1e-6, each gradient to 1e-5 of its norm: packed, checkpointed, in two rows, against stock PEFT one document at a time."""
    recipe, told = recipe_of(tmp_path / "model", SMALL[family], expert_adapters=True), documents()
    stock = stock_update(recipe, told, target_parameters=TARGETS)
    assert sum("experts" in name for name in stock.gradients) == 4 * (2 if family in ("qwen3_moe", "deepseek_v2", "deepseek_v3") else 3)
    for rows, layers in ((1, "none"), (2, "all")):
        ours = sparklab_update(recipe.replace(checkpoint_layers=layers), rows_of(told, True, rows), tmp_path / "run")
        assert ours.loss == pytest.approx(stock.loss, rel=1e-6)
        assert worst(stock.gradients, ours.gradients)[0] < 1e-5
    plain = sparklab_update(recipe.replace(engine="stock"), rows_of(told, True, 1), tmp_path / "run")
    assert worst(stock.gradients, plain.gradients)[0] < 1e-5


def layer(dtype, rank, stock=False, tokens=64, hidden=64, inner=32, count=8, active=2):
    """One layer of experts, its input and route, and the adapted module."""
    config = SimpleNamespace(num_experts=count, hidden_size=hidden, moe_intermediate_size=inner, hidden_act="silu", _experts_implementation="grouped_mm")
    torch.manual_seed(5)
    module = torch.nn.ModuleDict({"experts": Qwen3MoeExperts(config)})
    for parameter in module.parameters():
        parameter.data = (torch.randn(parameter.shape) * 0.2).to(torch.bfloat16).to(dtype)
        parameter.requires_grad_(False)
    chosen = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=[])
    experts.target_experts(chosen, module, fast=not stock)
    adapted = get_peft_model(module, chosen, autocast_adapter_dtype=False)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = (torch.randn(parameter.shape) * 0.1).to(torch.bfloat16).to(dtype)
    x = torch.randn(tokens, hidden).to(torch.bfloat16).to(dtype).requires_grad_()
    index = torch.stack([torch.randperm(count - 1)[:active] for _ in range(tokens)])  # nobody goes to the last expert
    shares = torch.rand(tokens, active).to(torch.bfloat16).to(dtype).requires_grad_()
    return adapted, adapted.base_model.model["experts"], x, index, shares


def gradients(dtype, rank, stock):
    adapted, module, x, index, shares = layer(dtype, rank, stock)
    assert (type(module) is StockWrapper) == stock
    out = module(x, index, shares)
    torch.manual_seed(6)
    (out.float() * torch.randn(out.shape)).sum().backward()
    return [out.detach(), x.grad, shares.grad, *(parameter.grad for parameter in adapted.parameters() if parameter.requires_grad)]


@pytest.mark.parametrize("rank", [8, 3])  # 3 is filled up
def test_bf16_is_as_near_the_truth_as_peft(rank):
    """Same route, so no choice can flip: how far all results are from those in fp32, beside PEFT's own path."""
    truth = gradients(torch.float32, rank, stock=True)
    distances = []
    for stock in (False, True):
        given = gradients(torch.bfloat16, rank, stock)
        assert len(given) == 7
        distances.append([float((value.float() - true).norm() / true.norm()) for value, true in zip(given, truth, strict=True)])
    ours, theirs = distances
    assert max(ours) < 0.01
    assert sum(ours) < 1.2 * sum(theirs)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = {tensor.untyped_storage().data_ptr() for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.numbers = max(self.numbers, tensor.numel())
        return out


def test_the_changed_weights_of_a_layer_are_never_made():
    """Four tokens and wide experts: what PEFT makes is the stack, what we make is no larger than an adapter."""
    largest = []
    for stock in (False, True):
        _, module, x, index, shares = layer(torch.bfloat16, 8, stock, tokens=4, hidden=256, inner=128, count=16)
        with Largest() as seen:
            module(x, index, shares).sum().backward()
        largest.append(seen.numbers)
    assert largest[1] == 16 * 256 * 256  # gate and up of 16 experts
    assert largest[0] == 16 * 8 * 256  # A or B of gate and up


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe"])
def test_what_is_saved_is_pefts(family, tmp_path):
    """Plain PEFT loads it, gives the same logits, and merges to the same weights; switched off, the base is the base."""
    recipe = recipe_of(tmp_path / "model", SMALL[family], expert_adapters=True)
    model = ready_model(recipe.replace(engine="fast"), BOX, base).eval()
    assert left_to_stock(model) == ()
    set_adapters(model)
    checkpoint.save_weights(model, tmp_path / "adapter")
    assert set(json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["target_parameters"]) == set(TARGETS)
    ids = torch.arange(3, 40)[None]
    plain = base(recipe, torch.float32, torch.device("cpu"), "eager").eval()
    loaded = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    model.get_base_model().set_attn_implementation("eager")
    with torch.no_grad():
        ours, theirs = model(input_ids=ids).logits, loaded(input_ids=ids).logits
        with model.disable_adapter(), loaded.disable_adapter():
            without = [each(input_ids=ids).logits for each in (model, loaded)]
        weights, own_weights = loaded.merge_and_unload(), model.merge_and_unload()
        merged, own = weights(input_ids=ids).logits, own_weights(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*without, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(own_weights.state_dict(), weights.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(own, merged, rtol=1e-5, atol=1e-5)  # the same weights, norms and rotary positions in our kernels
    torch.testing.assert_close(ours, merged, rtol=1e-4, atol=1e-4)
    assert (without[0] - ours).abs().max() > 1e-2
    again = ready_model(recipe, BOX, base).eval()
    checkpoint.load_weights(again, tmp_path / "adapter")
    again.get_base_model().set_attn_implementation("eager")
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, ours)


def test_trained_numbers_by_hand(tmp_path):
    """Qwen3-MoE's small config: two of three layers have 6 experts of 3 matrices; attention has q, k, v, o in all three."""
    (tmp_path / "config.json").write_text(json.dumps(SMALL["qwen3_moe"]))
    plan = sl.plan(Recipe(model=str(tmp_path), data="none", rank=4, expert_adapters=True), box=Box.profile("dgx-spark"))
    attention = 3 * 4 * ((128 + 256) + 2 * (128 + 128) + (256 + 128))
    assert plan.trainable_parameters == attention + 2 * 6 * 4 * ((128 + 2 * 64) + (64 + 128))
    assert not any("not adapted" in note for note in plan.notes)


@pytest.mark.parametrize(("changes", "words"), [({"dora": True}, "dora is True"), ({"dropout": 0.1}, "dropout is 0.1")])
def test_what_peft_cannot_is_said(changes, words):
    with pytest.raises(RecipeError, match=f"{words} beside expert_adapters"):
        Recipe(model="m", data="d", expert_adapters=True, **changes)


def test_a_model_without_experts_is_told_so(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SMALL["llama"]))
    recipe = Recipe(model=str(tmp_path), data="none", expert_adapters=True)
    with pytest.raises(RecipeError, match="has no experts"):
        sl.plan(recipe, box=Box.profile("dgx-spark"))
    with pytest.raises(ModelError, match="has no experts"):
        add_adapters(torch.nn.Linear(2, 2), recipe, torch.float32)


def test_experts_we_do_not_know_take_pefts_path_and_say_so(monkeypatch, tmp_path):
    monkeypatch.setattr(experts, "why_stock", lambda module: "their gate is elsewhere" if hasattr(module, "gate_up_proj") else "")
    model = ready_model(recipe_of(tmp_path / "model", SMALL["mixtral"], expert_adapters=True), BOX, base)
    assert any(type(module) is StockWrapper for module in model.modules())
    assert left_to_stock(model)[0].endswith("their gate is elsewhere")
