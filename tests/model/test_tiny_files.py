"""The bundled tiny model, judged by its files: size, formats, parameters, special tokens, template."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest

import sparklab.model

TINY = Path(sparklab.model.__file__).parent / "tiny"
FILES = {
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}
SPECIAL = ["<|pad|>", "<|bos|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]


def read_json(name: str) -> dict[str, Any]:
    return json.loads((TINY / name).read_text(encoding="utf-8"))


def safetensors_header() -> dict[str, Any]:
    """The names, dtypes and shapes at the head of the weights file."""
    with (TINY / "model.safetensors").open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(length))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(TINY)


def test_the_files_are_these_and_small() -> None:
    assert {path.name for path in TINY.iterdir()} == FILES
    assert sum(path.stat().st_size for path in TINY.iterdir()) <= 8_000_000


def test_two_to_five_million_parameters_in_bf16() -> None:
    header = safetensors_header()
    assert header.pop("__metadata__") == {"format": "pt"}
    config = read_json("config.json")
    # Per layer: four attention matrices, three feed-forward ones, two norms. Embeddings are
    # tied, so the head is not stored.
    assert len(header) == config["num_hidden_layers"] * 9 + 2
    assert {tensor["dtype"] for tensor in header.values()} == {"BF16"}
    parameters = sum(math.prod(tensor["shape"]) for tensor in header.values())
    hidden, feed_forward = config["hidden_size"], config["intermediate_size"]
    layer = 4 * hidden**2 + 3 * hidden * feed_forward + 2 * hidden
    assert config["tie_word_embeddings"] is True
    assert config["num_key_value_heads"] == config["num_attention_heads"]
    assert parameters == config["vocab_size"] * hidden + config["num_hidden_layers"] * layer + hidden
    assert 2_000_000 <= parameters <= 5_000_000


def test_special_tokens_are_distinct_and_the_configs_agree() -> None:
    added = {token["content"]: token["id"] for token in read_json("tokenizer.json")["added_tokens"]}
    assert list(added) == SPECIAL
    assert len(set(added.values())) == 6
    ids = {"pad_token_id": added["<|pad|>"], "bos_token_id": added["<|bos|>"], "eos_token_id": added["<|end|>"]}
    for name in ("config.json", "generation_config.json"):
        config = read_json(name)
        assert {key: config[key] for key in ids} == ids


def test_the_card_says_what_it_is() -> None:
    card = (TINY / "README.md").read_text(encoding="utf-8")
    assert "license: apache-2.0" in card
    assert "python examples/make_tiny.py" in card


def test_chat_template(tokenizer: Any) -> None:
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi."},
        {"role": "assistant", "content": "Hi there."},
    ]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False)
    assert rendered == "<|bos|><|system|>Be brief.<|end|><|user|>Hi.<|end|><|assistant|>Hi there.<|end|>"
    prompt = tokenizer.apply_chat_template(chat[:2], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|bos|><|system|>Be brief.<|end|><|user|>Hi.<|end|><|assistant|>"
    with pytest.raises(Exception, match="role is tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_the_template_marks_the_answers_and_their_ends(tokenizer: Any) -> None:
    turn = [{"role": "user", "content": "Copy: a{1}"}, {"role": "assistant", "content": "a{1}"}]
    encoded = tokenizer.apply_chat_template(turn + turn, return_dict=True, return_assistant_tokens_mask=True)
    marked = [i for i, mark in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mark]
    assert tokenizer.decode(marked) == "a{1}<|end|>a{1}<|end|>"
    assert encoded["input_ids"].count(tokenizer.bos_token_id) == 1


def test_the_tokenizer_keeps_words_apart_from_what_surrounds_them(tokenizer: Any) -> None:
    text = '{"to": "Layla", "qty": 345} Layla\nليلى،'
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    (layla,) = tokenizer("Layla", add_special_tokens=False)["input_ids"]
    assert ids.count(layla) == 2
    assert [tokenizer.decode([i]) for i in tokenizer("345", add_special_tokens=False)["input_ids"]] == ["3", "4", "5"]
    assert len(tokenizer) == read_json("config.json")["vocab_size"]
