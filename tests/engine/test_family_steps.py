"""Every family trains on packed rows as its documents would one by one in stock transformers: loss and every gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from family_configs import SMALL
from transformers import AutoConfig, AutoModelForCausalLM

from sparklab.data.dataset import make_row
from sparklab.data.template import Document
from sparklab.engine import attention, blockwise
from sparklab.engine.trainer import collate, row_loss
from sparklab.model.load import add_adapters, set_checkpointing
from sparklab.planner.recipe import Recipe

LENGTHS = (5, 50, 1, 37)  # some longer than the small configs' windows of 32 tokens
pytestmark = pytest.mark.filterwarnings("ignore")  # transformers has opinions on token numbers and rotary factors of configs this small


def little(family, implementation, lora):
    attention.register()
    values = dict(SMALL[family])
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values), attn_implementation=implementation, dtype=torch.float32)
    for parameter in model.parameters():  # norms and sinks begin as ones and zeros, which would hide what they do
        parameter.data.add_(torch.randn_like(parameter) * 0.02)
    if not lora:
        return model.train()
    model = add_adapters(model.requires_grad_(False), Recipe(model=family, data="none", rank=4), torch.float32)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    return model.train()


def documents():
    torch.manual_seed(2)
    made = [torch.randint(3, 1000, (length,)).tolist() for length in LENGTHS]
    return [Document(ids, [-100, *ids[1:]]) for ids in made]


def one_by_one(model, count):
    total = 0.0
    for document in documents():
        if len(document.input_ids) > 1:
            logits = model(input_ids=torch.tensor([document.input_ids])).logits[0]
            total = total + F.cross_entropy(logits[:-1].float(), torch.tensor(document.input_ids[1:]), reduction="sum")
    return total / count


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("family", sorted(SMALL))
def test_packed_equals_one_by_one(family, lora, monkeypatch):
    monkeypatch.setattr(blockwise, "ATTENTION_ROWS", 16)  # so that a document has several blocks
    count = sum(LENGTHS) - len(LENGTHS)
    stock = little(family, "eager", lora)
    expected = one_by_one(stock, count)
    expected.backward()
    ours = little(family, attention.NAME, lora)
    set_checkpointing(ours, 1)
    loss = row_loss(ours, collate([make_row(documents())]), count, "chunked" if lora else "full")
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    wanted = {name: parameter.grad for name, parameter in stock.named_parameters() if parameter.grad is not None}
    given = {name: parameter.grad for name, parameter in ours.named_parameters() if parameter.grad is not None}
    assert wanted.keys() == given.keys()
    assert len(wanted) > 20
    for name, gradient in wanted.items():
        scale = float(gradient.abs().max()) + 1e-8
        torch.testing.assert_close(given[name] / scale, gradient / scale, rtol=0, atol=2e-3, msg=name)


@pytest.mark.parametrize("family", ["gemma2", "granite"])
def test_the_chunked_loss_is_the_full_one(family):
    row = collate([make_row(documents())])
    grads = {}
    for kind in ("chunked", "full"):
        model = little(family, attention.NAME, lora=False)
        loss = row_loss(model, row, 10.0, kind)
        loss.backward()
        grads[kind] = (loss.detach(), model.get_input_embeddings().weight.grad, model.get_decoder().norm.weight.grad)
    for chunked, full in zip(grads["chunked"], grads["full"], strict=True):
        torch.testing.assert_close(chunked, full, rtol=1e-4, atol=1e-6)
