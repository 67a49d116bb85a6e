"""A packed row computes what its documents compute one by one in stock transformers and PEFT: losses and every adapter's gradient."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from family_configs import SMALL
from peft import LoraConfig, get_peft_model
from torch.nn.attention import varlen
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, masking_utils

from sparklab.data.dataset import make_row
from sparklab.data.template import Document
from sparklab.engine import attention, blockwise
from sparklab.engine.device import traced_for
from sparklab.engine.trainer import _filled, collate, mean_loss, row_loss
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


# ---------------------------------------------------------------- every attention path, alone

HEADS, NUMBERS = 4, 16  # query heads, numbers a head

PATHS = {
    "sdpa": {},
    "sdpa, keys shared": {"kv_heads": 2},
    "sdpa, one key for all": {"kv_heads": 1, "scaling": 0.3},
    "narrow values": {"value_width": 10},
    "window": {"sliding_window": 5},
    "window of one": {"sliding_window": 1},
    "window, keys shared": {"sliding_window": 5, "kv_heads": 2},
    "window, narrow values": {"sliding_window": 5, "value_width": 10},
    "window longer than any document": {"sliding_window": 1000},
    "softcap": {"softcap": 3.0},
    "softcap and window, keys shared": {"softcap": 3.0, "sliding_window": 5, "kv_heads": 2},
    "sinks": {"s_aux": True, "kv_heads": 2},
    "sinks and window": {"s_aux": True, "sliding_window": 5},
    "everything": {"s_aux": True, "sliding_window": 5, "softcap": 3.0, "kv_heads": 2, "value_width": 10, "scaling": 0.3},
}  # fmt: skip


def plain_attention(query, key, value, scaling, sliding_window, softcap, s_aux):
    """The formula, with all scores of one document held: [1, heads, S, D] queries on [1, kv_heads, S, D] keys."""
    key, value = (each.repeat_interleave(HEADS // key.shape[1], 1) for each in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    behind = torch.arange(scores.shape[-2])[:, None] - torch.arange(scores.shape[-1])
    scores = scores.masked_fill((behind < 0) | (behind >= (sliding_window or len(behind))), -torch.inf)
    if s_aux is not None:
        scores = torch.cat([scores, s_aux[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
    return (scores.softmax(-1)[..., : value.shape[2]] @ value).transpose(1, 2)


@pytest.mark.parametrize("path", PATHS)
def test_every_attention_path_keeps_documents_apart(path, monkeypatch):
    """Outputs and gradients of a row are those of its documents run one by one: in the same kernels, and in the plain formula."""
    monkeypatch.setattr(blockwise, "ATTENTION_ROWS", 4)  # so that a document of 17 tokens has five blocks
    options = {"kv_heads": HEADS, "value_width": NUMBERS, "scaling": None, "sliding_window": None, "softcap": None, "s_aux": None, **PATHS[path]}
    kv_heads, width, sinks = options.pop("kv_heads"), options.pop("value_width"), options.pop("s_aux")
    torch.manual_seed(3)
    total = sum(LENGTHS)
    made = [torch.randn(1, heads, total, numbers) for heads, numbers in ((HEADS, NUMBERS), (kv_heads, NUMBERS), (kv_heads, width))]
    if sinks:
        made.append(torch.randn(HEADS))
    weights = torch.randn(1, total, HEADS, width)  # what the gradients start from

    def run(attend):
        """The output [1, T, heads, width] and the gradients of everything that went in."""
        inputs = [each.clone().requires_grad_() for each in made]
        out = attend(*inputs[:3], inputs[3] if sinks else None)
        (out * weights).sum().backward()
        return [out.detach(), *(each.grad for each in inputs)]

    def packed(query, key, value, s_aux, lengths=LENGTHS):
        borders = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).int()
        module = torch.nn.Identity()
        out, _ = attention.packed_attention(module, query, key, value, None, cu_seq_lens_q=borders, s_aux=s_aux, **options)
        return out

    def one_by_one(attend):
        def documents_alone(query, key, value, s_aux):
            parts = zip(*(each.split(LENGTHS, 2) for each in (query, key, value)), strict=True)
            return torch.cat([attend(q, k, v, s_aux) for q, k, v in parts], 1)

        return documents_alone

    given = run(packed)
    for expected in (
        run(one_by_one(lambda q, k, v, s: packed(q, k, v, s, (q.shape[2],)))),
        run(one_by_one(lambda q, k, v, s: plain_attention(q, k, v, options["scaling"], options["sliding_window"], options["softcap"], s))),
    ):
        for mine, theirs in zip(given, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


# one family for each way of attending, with what sets it apart in the rest of the model
FAMILIES = {"llama": "sdpa", "mistral": "windows", "gemma2": "soft caps and windows", "gpt_oss": "sinks and windows", "deepseek_v2": "narrow values"}


@pytest.mark.filterwarnings("ignore")  # transformers has opinions on token numbers and rotary factors of configs this small
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_of_a_row_are_those_of_its_documents(family):
    """Whole models in fp32: one packed row against its documents through the same model one by one."""
    attention.register()
    values = dict(SMALL[family])
    torch.manual_seed(1)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME, dtype=torch.float32)
    for parameter in model.parameters():  # norms and sinks begin as ones and zeros, which would hide what they do
        parameter.data.add_(torch.randn_like(parameter) * 0.02)
    torch.manual_seed(2)
    texts = [torch.randint(3, 1000, (length,)).tolist() for length in (5, 50, 1, 37)]  # some longer than the windows of 32

    def logits(documents):
        row = collate([make_row([Document(ids, [-100] * len(ids)) for ids in documents])])
        borders = row["cu_seq_lens_q"]
        kept = {"input_ids": row["input_ids"], "position_ids": row["position_ids"], "use_cache": False}
        return model(**kept, cu_seq_lens_q=borders, cu_seq_lens_k=borders).logits[0]

    weights = torch.randn(93, 1000)
    found = []
    for run in (lambda: logits(texts), lambda: torch.cat([logits([text]) for text in texts])):
        model.zero_grad()
        out = run()
        (out * weights).sum().backward()
        found.append((out.detach(), gradients(model)))
    (packed, packed_gradients), (alone, alone_gradients) = found
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
    assert packed_gradients.keys() == alone_gradients.keys() and len(packed_gradients) > 20
    for name, gradient in alone_gradients.items():
        scale = float(gradient.abs().max()) + 1e-8  # sums of some thousand products: 1e-5 of the largest
        torch.testing.assert_close(packed_gradients[name] / scale, gradient / scale, rtol=0, atol=1e-5, msg=name)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
def test_no_mask_is_made_and_none_is_looked_for(family, monkeypatch):
    """Reading a row's documents off its positions would wait for the device, once a row."""
    called = []
    for name in ("find_packed_sequence_indices", "causal_mask_function", "sliding_window_causal_mask_function"):
        assert callable(getattr(masking_utils, name))
        monkeypatch.setattr(masking_utils, name, lambda *given, name=name, **named: called.append(name))
    attention.register()
    values = dict(SMALL[family])
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME, dtype=torch.float32).train()
    row_loss(model, collate([make_row(documents())]), 1, "chunked").backward()
    assert called == []


def test_a_row_is_filled_up_by_a_document_that_teaches_nothing() -> None:
    """On a CPU alone, where every shape costs memory: 70 tokens become 128, and nothing of the 70 is touched."""
    row = collate([make_row([Document([*range(3, 53)], [-100, *range(4, 53)]), Document([*range(60, 80)], [-100, *range(61, 80)])])])
    whole = _filled(row)
    lengths = {name: tensor.shape[-1] for name, tensor in whole.items()}
    assert lengths == {"input_ids": 128, "labels": 128, "position_ids": 128, "cu_seq_lens_q": 4}
    assert all(torch.equal(tensor[..., : row[name].shape[-1]], row[name]) for name, tensor in whole.items())
    assert whole["cu_seq_lens_q"].tolist() == [0, 50, 70, 128]
    assert whole["position_ids"][0, 70:].tolist() == list(range(58))
    assert whole["labels"][0, 70:].unique().tolist() == [-100]
    assert _filled(whole) is whole
    with traced_for(gpu=True):
        assert _filled(row) is row


@pytest.mark.parametrize("asks", [True, False])
@pytest.mark.parametrize(("kv_heads", "window"), [(4, None), (2, None), (2, 5)])
def test_cuda_s_kernel_is_called_in_its_own_words(asks, kv_heads, window, monkeypatch):
    """A stand-in with the signature of torch 2.13 (``asks``) or 2.11, which knows no enable_gqa: tokens first, borders twice, the window's two sides."""

    def alone(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)):
        assert query.shape == (30, 4, 8) and key.shape == value.shape == (30, kv_heads, 8) and max_q == max_k == 17
        assert cu_seq_q.dtype == torch.int32 and torch.equal(cu_seq_q, cu_seq_k) and window_size[1] == 0
        rows = [tensor.transpose(0, 1)[None] for tensor in (query, key, value)]
        pieces = zip(*(torch.split(tensor, cu_seq_q.diff().tolist(), 2) for tensor in rows), strict=True)
        seen = None if window_size[0] == -1 else window_size[0] + 1
        return torch.cat([blockwise.attend(q, k, v, scale, seen, None, None) for q, k, v in pieces], 2)[0].transpose(0, 1)

    def told(*given, enable_gqa=False, **named):
        assert enable_gqa == (kv_heads != 4)
        return alone(*given, **named)

    told.__signature__ = inspect.Signature([*inspect.signature(alone).parameters.values(), inspect.Parameter("enable_gqa", inspect.Parameter.KEYWORD_ONLY)])
    monkeypatch.setattr(varlen, "varlen_attn", told if asks else alone)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 30, heads, 8).transpose(1, 2) for heads in (4, kv_heads, kv_heads))
    borders = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)
    given = attention._varlen(q, k, v, borders, 17, 0.3, window)
    wanted = attention.packed_attention(torch.nn.Module(), q, k, v, scaling=0.3, cu_seq_lens_q=borders, sliding_window=window)[0]
    torch.testing.assert_close(given, wanted)
