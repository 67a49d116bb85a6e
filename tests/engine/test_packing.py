"""A packed row computes what its documents compute one by one in stock transformers and PEFT: losses and every adapter's gradient."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from sparklab.data.dataset import make_row
from sparklab.data.template import Document
from sparklab.engine import attention
from sparklab.engine.trainer import collate, mean_loss, row_loss
from sparklab.model.load import set_checkpointing

LENGTHS = (3, 17, 1, 9)


def little_llama(implementation, tied=False, lora=True):
    attention.register()
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, vocab_size=97, tie_word_embeddings=tied
    )
    torch.manual_seed(1)
    model = LlamaForCausalLM._from_config(config, attn_implementation=implementation, dtype=torch.float32)
    if not lora:
        return model
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False), autocast_adapter_dtype=False)
    return model.train()


def documents():
    torch.manual_seed(2)
    made = []
    for length in LENGTHS:
        ids = torch.randint(0, 97, (length,)).tolist()
        made.append(Document(ids, [-100 if place < length // 3 or place == 0 else token for place, token in enumerate(ids)]))
    return made


def stock_loss(model, count):
    """Sum over documents run one by one through stock transformers, all logits held."""
    total = 0
    for document in documents():
        if len(document.input_ids) < 2:
            continue
        logits = model(input_ids=torch.tensor([document.input_ids])).logits[0]
        total = total + F.cross_entropy(logits[:-1], torch.tensor(document.labels[1:]), ignore_index=-100, reduction="sum")
    return total / count


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("checkpointed", [0, 2, "all"])
@pytest.mark.parametrize("kind", ["chunked", "full"])
@pytest.mark.parametrize(("tied", "lora"), [(False, True), (True, True), (False, False), (True, False)])
def test_packed_equals_one_by_one(tied, lora, kind, checkpointed):
    count = sum(label != -100 for document in documents() for label in document.labels)
    stock = little_llama("sdpa", tied, lora)
    expected = stock_loss(stock, count)
    expected.backward()
    ours = little_llama(attention.NAME, tied, lora).train()
    assert set_checkpointing(ours, checkpointed) == (3 if checkpointed == "all" else checkpointed)
    loss = row_loss(ours, collate([make_row(documents())]), count, kind)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    wanted, given = gradients(stock), gradients(ours)
    assert wanted.keys() == given.keys()
    assert len(wanted) == (2 * 7 * 3 if lora else len(dict(ours.named_parameters())))
    for name, gradient in wanted.items():
        torch.testing.assert_close(given[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_a_document_cannot_see_its_neighbour():
    """Change one document: the loss of the row changes by that document's part alone."""
    model = little_llama(attention.NAME)
    first, second, other = (Document(ids, [-100, *ids[1:]]) for ids in ([5, 6, 7], [8, 9, 10, 11], [50, 51, 52]))
    with torch.no_grad():
        together = row_loss(model, collate([make_row([first, second])]), 1, "chunked")
        changed = row_loss(model, collate([make_row([other, second])]), 1, "chunked")
        alone = [row_loss(model, collate([make_row([document])]), 1, "chunked") for document in (first, other)]
    torch.testing.assert_close(together - alone[0], changed - alone[1])


def test_mean_loss_is_a_mean_over_tokens_and_leaves_the_mode():
    model = little_llama(attention.NAME)
    rows = [make_row(documents()), make_row(documents()[:2])]
    measured = mean_loss(model, rows, "chunked", torch.device("cpu"))
    count = sum(label != -100 for row in rows for label in row.labels)
    with torch.no_grad():
        expected = sum(row_loss(model, collate([row]), count, "full") for row in rows)
    assert measured["tokens"] == count
    assert measured["loss"] == pytest.approx(expected.item(), rel=1e-6)
    assert model.training
