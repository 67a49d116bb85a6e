"""Rank-stabilised scaling, DoRA and dropout: through PEFT's own path, with its numbers, saved, merged and said."""

import pytest
import torch
from family_configs import SMALL
from peft import LoraConfig, PeftModel, get_peft_model
from whole_step import BOX, CPU, base, documents, gradients_of, recipe_of, rows_of, set_adapters, sparklab_update, stock_update, worst

import sparklab as sl
from sparklab.engine import checkpoint
from sparklab.engine.fast import left_to_stock, ready_model
from sparklab.engine.merge import adapters_of
from sparklab.engine.trainer import collate, row_loss

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers has opinions on token numbers and rotary factors of configs this small

KINDS = [
    ("llama", {"rank_stabilized": True}, {"use_rslora": True}),
    ("llama", {"dora": True}, {"use_dora": True}),
    ("gemma2", {"dora": True, "rank_stabilized": True, "method": "qlora"}, {"use_dora": True, "use_rslora": True}),
    ("qwen3_moe", {"expert_adapters": True, "rank_stabilized": True}, {"use_rslora": True, "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
]


@pytest.mark.parametrize(("family", "changes", "options"), KINDS)
def test_the_whole_update_is_that_of_peft(family, changes, options, tmp_path):
    recipe, told = recipe_of(tmp_path / "model", SMALL[family], **changes), documents()
    stock = stock_update(recipe, told, **options)
    plain = stock_update(recipe, told, **{name: value for name, value in options.items() if name == "target_parameters"})
    assert abs(stock.loss / plain.loss - 1) > 1e-5  # the setting does something
    ours = sparklab_update(recipe.replace(checkpoint_layers=1), rows_of(told, True, 2), tmp_path / "run")
    assert ours.loss == pytest.approx(stock.loss, rel=1e-6)
    assert worst(stock.gradients, ours.gradients)[0] < 1e-5
    assert any("magnitude" in name for name in ours.gradients) == bool(changes.get("dora"))


def test_dropout_is_pefts(tmp_path):
    """One document from the same seed, as long as a row that need not be filled: the same numbers are dropped, in the same order."""
    (document,) = documents(lengths=(64,))
    recipe = recipe_of(tmp_path / "model", SMALL["llama"], dropout=0.3)
    stock = get_peft_model(base(recipe, torch.float32, CPU, "eager"), LoraConfig(r=4, lora_alpha=6, lora_dropout=0.3, target_modules="all-linear"))
    set_adapters(stock)
    ours = ready_model(recipe, BOX, base).train()
    set_adapters(ours)
    stock.train()
    torch.manual_seed(9)
    expected = stock(input_ids=torch.tensor([document.input_ids]), labels=torch.tensor([document.labels]), num_items_in_batch=document.supervised).loss
    expected.backward()
    torch.manual_seed(9)
    loss = row_loss(ours, collate(rows_of([document], True, 1)), document.supervised, "chunked")
    loss.backward()
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    assert worst(gradients_of(stock), gradients_of(ours))[0] < 1e-5
    torch.manual_seed(10)
    assert float(row_loss(ours, collate(rows_of([document], True, 1)), document.supervised, "chunked")) != pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize(("name", "changes"), [("dora", {"dora": True}), ("dropout", {"dropout": 0.1})])
def test_what_stays_on_pefts_code_is_said_in_run_and_plan(name, changes, tmp_path):
    recipe = recipe_of(tmp_path / "model", SMALL["llama"], **changes)
    (sentence,) = left_to_stock(ready_model(recipe, BOX, base))
    assert "PEFT" in sentence and sentence.startswith("21 linear layers")
    assert any(note.startswith(name) and "PEFT" in note for note in sl.plan(recipe, box=BOX).notes)
    stock = recipe.replace(engine="stock")
    assert left_to_stock(ready_model(stock, BOX, base)) == ()
    assert not any(note.startswith(name) for note in sl.plan(stock, box=BOX).notes)


@pytest.mark.parametrize(
    ("family", "changes"),
    [("llama", {"dora": True, "rank_stabilized": True}), ("qwen3_moe", {"expert_adapters": True}), ("gpt_oss", {"expert_adapters": True})],
)
def test_merging_one_weight_at_a_time_is_pefts_merge(family, changes, tmp_path):
    """What was saved, loaded by plain PEFT and merged by it, against our merge into the base's weights by their names."""
    recipe = recipe_of(tmp_path / "model", SMALL[family], **changes)
    model = ready_model(recipe, BOX, base)
    set_adapters(model)
    checkpoint.save_weights(model, tmp_path / "adapter")
    weights = {name: parameter.detach().clone() for name, parameter in base(recipe, torch.float32, CPU, "eager").named_parameters()}
    merged = PeftModel.from_pretrained(base(recipe, torch.float32, CPU, "eager"), tmp_path / "adapter").merge_and_unload()
    expected = dict(merged.named_parameters())
    adapters = adapters_of(model)
    assert len(adapters) == (21 if family == "llama" else 12 + 2 * (2 if family == "qwen3_moe" else 3))
    for name, adapter in adapters.items():
        full = name if name in weights else f"{name}.weight"
        assert adapter.shape == weights[full].shape
        before = weights[full].clone()
        torch.testing.assert_close(adapter.merge_into(weights[full]), expected[full], rtol=1e-5, atol=1e-6)
        assert not torch.equal(before, weights[full])
