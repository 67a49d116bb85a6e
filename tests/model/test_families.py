"""Every family's parameters are those that transformers builds on the meta device: names, shapes and how many there are of each."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from family_configs import REAL, SMALL

from sparklab.errors import ModelError
from sparklab.model.anatomy import from_config
from sparklab.model.families import FAMILIES

# What may vary within a family, beside its own small config.
CHANGES: list[dict[str, Any]] = [
    {},
    {"tie_word_embeddings": True, "num_hidden_layers": 1},
    {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True, "vocab_size": 1001},
]
OWN: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"head_dim": 24}), ("llama", {"num_key_value_heads": 1, "num_hidden_layers": 7}), ("gpt_neox", {"use_parallel_residual": False}),
    ("gpt_neox", {"attention_bias": False}), ("qwen3_moe", {"decoder_sparse_step": 2, "num_hidden_layers": 5}), ("deepseek_v2", {"q_lora_rank": 40}),
    ("deepseek_v3", {"q_lora_rank": None, "first_k_dense_replace": 0}), ("mixtral", {"head_dim": 24}), ("gemma2", {"num_hidden_layers": 6}),
]  # fmt: skip
GRID = [(family, changes) for family in sorted(FAMILIES) for changes in CHANGES] + OWN
pytestmark = pytest.mark.filterwarnings("ignore")  # transformers has opinions on token numbers and rotary factors of configs this small


def built(values: dict[str, Any]) -> Counter[tuple[str, tuple[int, ...]]]:
    """Parameters by the last two words of their name and their shape."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {**values.get("text_config", values)}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values))
    return Counter((".".join(name.split(".")[-2:]), tuple(parameter.shape)) for name, parameter in model.named_parameters())


def test_every_family_is_here() -> None:
    assert set(SMALL) == set(FAMILIES)
    assert {from_config(values, name).family for name, values in REAL.items()} == set(FAMILIES)
    assert (len(FAMILIES), len(REAL)) == (18, 20)


@pytest.mark.parametrize(("family", "changes"), GRID)
def test_small(family: str, changes: dict[str, Any]) -> None:
    values = {**SMALL[family], **changes}
    anatomy, real = from_config(values, family), built(values)
    assert {(group.name, group.shape): group.count for group in anatomy.groups} == dict(real)
    assert anatomy.parameters == sum(count * _size(shape) for (_, shape), count in real.items())


@pytest.mark.parametrize("name", sorted(REAL))
def test_real_size(name: str) -> None:
    anatomy, real = from_config(REAL[name], name), built(REAL[name])
    assert {(group.name, group.shape): group.count for group in anatomy.groups} == dict(real)
    assert anatomy.parameters == sum(count * _size(shape) for (_, shape), count in real.items())


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for width in shape:
        size *= width
    return size


def test_active_parameters_by_hand() -> None:
    # Qwen3-30B-A3B: 8 of 128 experts, each three matrices of 2048 x 768, in 48 layers.
    anatomy = from_config(REAL["Qwen3-30B-A3B"], "moe")
    expert = 3 * 2048 * 768
    assert anatomy.expert_parameters == 48 * 128 * expert
    assert anatomy.parameters == 30_532_122_624
    assert anatomy.active_parameters == anatomy.parameters - 48 * 120 * expert
    assert "30.5B parameters (3.35B active)" in repr(anatomy)
    assert from_config(SMALL["llama"], "dense").active_parameters == from_config(SMALL["llama"], "dense").parameters


def test_windows_are_where_transformers_has_them() -> None:
    from transformers import AutoConfig

    for family in ("gemma2", "gemma3_text", "gpt_oss", "smollm3", "qwen3"):
        values = {**SMALL[family], "num_hidden_layers": 7, "use_sliding_window": True, "sliding_window": 32, "max_window_layers": 3}
        kinds = AutoConfig.for_model(**values).layer_types
        given = [window for block in from_config(values, family).blocks for window in [_window(block)] * block.count]
        assert given == [32 if kind == "sliding_attention" else 0 for kind in kinds], family
    assert [_window(block) for block in from_config({**SMALL["qwen3"], "sliding_window": 32}, "off").blocks] == [0]
    assert [_window(block) for block in from_config({**SMALL["mistral"], "sliding_window": None}, "off").blocks] == [0]


def _window(block: Any) -> int:
    return next(part.window for part in block.parts if hasattr(part, "window"))


def test_the_text_part_of_a_multimodal_config() -> None:
    anatomy = from_config(REAL["Gemma-3-4B text"], "four")
    assert (anatomy.parameters, anatomy.vocabulary, anatomy.heads) == (3_880_263_168, 262_208, 8)  # its config leaves out vocabulary and heads
    assert any("text part of a 'gemma3' model" in note for note in anatomy.notes)
    with pytest.raises(ModelError, match="already quantised"):
        from_config({**REAL["Gemma-3-4B text"], "quantization_config": {"quant_method": "gptq"}}, "four")


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("qwen3_moe", {"num_experts_per_tok": 7, "num_experts": -1}, ["num_experts is -1", "num_experts_per_tok 7 is more than the 1"]),
        ("deepseek_v3", {"kv_lora_rank": "wide", "n_group": 4}, ["kv_lora_rank is 'wide'", "n_routed_experts 6 is not a multiple of n_group 4"]),
        ("phi3", {"partial_rotary_factor": 3.0}, ["partial_rotary_factor is 3.0"]),
        ("gemma2", {"hidden_activation": "relu2", "attn_logit_softcapping": -1}, ["hidden_act is 'relu2'", "attn_logit_softcapping is -1"]),
        ("gemma3_text", {"layer_types": ["full_attention"]}, ["layer_types is ['full_attention']"]),
        ("gemma3_text", {"use_bidirectional_attention": True}, ["use_bidirectional_attention is true"]),
        ("olmoe", {"clip_qkv": 8.0}, ["clip_qkv is 8.0"]),
        ("llama", {"num_hidden_layers": 10**15, "hidden_size": 10**5000}, ["num_hidden_layers is 1000000000000000", "hidden_size is a number of thousands"]),
    ],
)
def test_faults_of_a_familys_own_fields(family: str, changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ModelError) as caught:
        from_config({**SMALL[family], **changes}, "bad")
    for word in words:
        assert word in str(caught.value)


def test_dropout_of_the_models_own_is_said_not_to_be_counted() -> None:
    assert from_config({**SMALL["gpt_neox"], "attention_dropout": 0.0}, "small").notes == ()
    (note,) = from_config({**SMALL["gpt_neox"], "hidden_dropout": 0.1}, "small").notes
    assert "hidden_dropout 0.1" in note and "not counted" in note


@pytest.mark.parametrize(("family", "told"), [("mixtral", True), ("qwen3_moe", True), ("llama", False)])
def test_a_loss_of_the_routers_is_said_to_be_left_out(family: str, told: bool) -> None:
    assert any("cross-entropy" in note for note in from_config({**SMALL[family], "output_router_logits": True}, "small").notes) == told
    assert not from_config(SMALL[family], "small").notes
