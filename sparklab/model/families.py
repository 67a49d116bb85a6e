"""The families: for each its defaults, as transformers has them, and the list of parts of one of its layers, in the order transformers runs them.

A new family is a new list here. Names are those of transformers' modules; what is read from a config beyond the shared numbers
(:mod:`sparklab.model.fields`) is named in the family's own entry of :data:`FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from sparklab.model.fields import Fields, Kind, LatentHeads, Mixture, Shape
from sparklab.model.parts import Activation, Attention, Experts, Latent, Linear, Norm, Part, Product, Residual, Rotary, Router, Scale, Split

# pieces of layers


def _attention(s: Shape, k: Kind, reads: str, *, norm: str = "", norm_kind: str = "rms", output_bias: bool = True, rotary: str = "halves",
               sinks: bool = False) -> Iterator[Part]:  # fmt: skip
    """Separate projections, rotary positions, attention. ``norm`` of queries and keys: none, ``head`` by head, of the ``whole``, or ``late``:
    head by head after all three projections."""
    q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim

    def projection(name: str, width: int, heads: int) -> Iterator[Part]:
        yield Linear(f"{name}_proj", reads, name, s.hidden, width, "attention", s.attention_bias)
        if norm == "head" and name != "v":
            yield Norm(f"{name}_norm", name, f"{name}_normed", s.head_dim, heads, norm_kind, inner=True)
        elif norm == "whole" and name != "v":
            yield Norm(f"{name}_norm", name, f"{name}_normed", width, 1, norm_kind, inner=True)

    for name, width, heads in (("q", q, s.heads), ("k", kv, s.kv_heads), ("v", kv, s.kv_heads)):
        yield from projection(name, width, heads)
    if norm == "late":
        yield Norm("q_norm", "q", "q_normed", s.head_dim, s.heads, norm_kind, inner=True)
        yield Norm("k_norm", "k", "k_normed", s.head_dim, s.kv_heads, norm_kind, inner=True)
    query, key = ("q_normed", "k_normed") if norm else ("q", "k")
    if k.turns:
        yield Rotary(query, "q_turned", s.heads, s.head_dim, s.turned, rotary)
        yield Rotary(key, "k_turned", s.kv_heads, s.head_dim, s.turned, rotary)
        query, key = "q_turned", "k_turned"
    yield Attention(query, key, "v", "mixed", s.heads, s.kv_heads, s.head_dim, 0, k.window, s.capped, sinks)
    yield Linear("o_proj", "mixed", "attended", q, s.hidden, "attention", s.attention_bias and output_bias)


def _fused_attention(s: Shape, k: Kind, reads: str, names: tuple[str, str], bias: bool, sliced: bool) -> Iterator[Part]:
    """One projection for queries, keys and values, split into views."""
    q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
    yield Linear(names[0], reads, "qkv", s.hidden, q + 2 * kv, "attention", bias)
    yield Split("qkv", ("q", "k", "v"), (q, kv, kv), sliced)
    yield Rotary("q", "q_turned", s.heads, s.head_dim, s.turned, "joined")
    yield Rotary("k", "k_turned", s.kv_heads, s.head_dim, s.turned, "joined")
    yield Attention("q_turned", "k_turned", "v", "mixed", s.heads, s.kv_heads, s.head_dim, 0, k.window)
    yield Linear(names[1], "mixed", "attended", q, s.hidden, "attention", bias)


def _latent_attention(s: Shape, reads: str) -> Iterator[Part]:
    """DeepSeek's: keys and values, and where the config says so queries, come out of a narrow latent."""
    assert s.latent is not None
    c = s.latent
    query = s.heads * (c.plain + c.turned)
    if c.query_rank:
        yield Linear("q_a_proj", reads, "q_latent", s.hidden, c.query_rank, "attention", s.attention_bias)
        yield Norm("q_a_layernorm", "q_latent", "q_latent_normed", c.query_rank, inner=True)
        yield Linear("q_b_proj", "q_latent_normed", "q", c.query_rank, query, "attention")
    else:
        yield Linear("q_proj", reads, "q", s.hidden, query, "attention")
    yield Linear("kv_a_proj_with_mqa", reads, "compressed", s.hidden, c.rank + c.turned, "attention", s.attention_bias)
    yield Split("compressed", ("latent", "k_turning"), (c.rank, c.turned))
    yield Norm("kv_a_layernorm", "latent", "latent_normed", c.rank, inner=True)
    yield Linear("kv_b_proj", "latent_normed", "expanded", c.rank, s.heads * (c.plain + c.value), "attention")
    yield Latent("q", "expanded", "k_turning", "q_turned", "k_turned", "v", s.heads, c.plain, c.turned, c.value, c.rank + c.turned, c.kind)
    yield Attention("q_turned", "k_turned", "v", "mixed", s.heads, s.heads, c.plain + c.turned, c.value)
    yield Linear("o_proj", "mixed", "attended", s.heads * c.value, s.hidden, "attention", s.attention_bias)


def _gated(s: Shape, reads: str, writes: str = "branch", width: int = 0, prefix: str = "") -> Iterator[Part]:
    """``down(act(gate(x)) * up(x))``."""
    h, f = s.hidden, width or s.intermediate
    gate, active, up, gated = (prefix + name for name in ("gate", "activated", "up", "gated"))
    yield Linear("gate_proj", reads, gate, h, f, "mlp", s.mlp_bias)
    yield Activation(gate, active, f)
    yield Linear("up_proj", reads, up, h, f, "mlp", s.mlp_bias)
    yield Product(active, up, gated, f)
    yield Linear("down_proj", gated, writes, f, h, "mlp", s.mlp_bias)


def _mixture(s: Shape, reads: str, name: str = "gate") -> Iterator[Part]:
    """Router, experts, and where there are any the experts that all tokens share."""
    assert s.mixture is not None
    m = s.mixture
    wide = m.router in ("softmax_wide", "greedy", "grouped", "sigmoid")
    yield Router(name, reads, "routed", s.hidden, m.experts, m.active, m.router, m.normed)
    yield Experts(reads, "routed", "chosen" if m.shared else "branch", s.hidden, m.inner, m.experts, m.active, wide, m.router == "top")
    if m.shared:
        yield from _gated(s, reads, "shared", m.shared, "shared_")
        yield Residual("chosen", "shared", "branch", s.hidden)


# layers


def _llama(s: Shape, k: Kind, **attention: Any) -> Iterator[Part]:
    """Pre-norm: attention and a gated MLP (or experts) each add to the stream."""
    norm = attention.get("norm_kind", "rms")
    yield Norm("input_layernorm", "x", "normed_1", s.hidden, 1, norm)
    yield from _latent_attention(s, "normed_1") if s.latent else _attention(s, k, "normed_1", **attention)
    yield Residual("x", "attended", "middle", s.hidden)
    yield Norm("post_attention_layernorm", "middle", "normed_2", s.hidden, 1, norm)
    yield from _mixture(s, "normed_2") if k.sparse else _gated(s, "normed_2")
    yield Residual("middle", "branch", "y", s.hidden)


def _qwen2(s: Shape, k: Kind) -> Iterator[Part]:
    return _llama(s, k, output_bias=False)


def _qwen3(s: Shape, k: Kind) -> Iterator[Part]:
    return _llama(s, k, norm="head")


def _olmoe(s: Shape, k: Kind) -> Iterator[Part]:
    return _llama(s, k, norm="whole")


def _gemma(s: Shape, k: Kind) -> Iterator[Part]:
    return _llama(s, k, norm_kind="zero_centred")


def _gpt_oss(s: Shape, k: Kind) -> Iterator[Part]:
    yield Norm("input_layernorm", "x", "normed_1", s.hidden, 1, "rms_wide")
    yield from _attention(s, k, "normed_1", rotary="chunks", sinks=True)
    yield Residual("x", "attended", "middle", s.hidden)
    yield Norm("post_attention_layernorm", "middle", "normed_2", s.hidden, 1, "rms_wide")
    yield from _mixture(s, "normed_2", "router")
    yield Residual("middle", "branch", "y", s.hidden)


def _sandwich(s: Shape, k: Kind, norm: str = "") -> Iterator[Part]:
    """Gemma 2 and 3: a norm before and one after each module."""
    yield Norm("input_layernorm", "x", "normed_1", s.hidden, 1, "zero_centred")
    yield from _attention(s, k, "normed_1", norm=norm, norm_kind="zero_centred")
    yield Norm("post_attention_layernorm", "attended", "renormed_1", s.hidden, 1, "zero_centred")
    yield Residual("x", "renormed_1", "middle", s.hidden)
    yield Norm("pre_feedforward_layernorm", "middle", "normed_2", s.hidden, 1, "zero_centred")
    yield from _gated(s, "normed_2")
    yield Norm("post_feedforward_layernorm", "branch", "renormed_2", s.hidden, 1, "zero_centred")
    yield Residual("middle", "renormed_2", "y", s.hidden)


def _gemma3(s: Shape, k: Kind) -> Iterator[Part]:
    return _sandwich(s, k, "late")


def _olmo2(s: Shape, k: Kind) -> Iterator[Part]:
    """Norms after the modules only, and queries and keys normed over their whole width."""
    yield from _attention(s, k, "x", norm="whole", norm_kind="rms_wide", rotary="wide")
    yield Norm("post_attention_layernorm", "attended", "normed_1", s.hidden, 1, "rms_wide")
    yield Residual("x", "normed_1", "middle", s.hidden)
    yield from _gated(s, "middle")
    yield Norm("post_feedforward_layernorm", "branch", "normed_2", s.hidden, 1, "rms_wide")
    yield Residual("middle", "normed_2", "y", s.hidden)


def _granite(s: Shape, k: Kind) -> Iterator[Part]:
    """As Llama, what each module adds times a constant."""
    yield Norm("input_layernorm", "x", "normed_1", s.hidden)
    yield from _attention(s, k, "normed_1")
    yield Scale("attended", "scaled_1", s.hidden)
    yield Residual("x", "scaled_1", "middle", s.hidden)
    yield Norm("post_attention_layernorm", "middle", "normed_2", s.hidden)
    yield from _gated(s, "normed_2")
    yield Scale("branch", "scaled_2", s.hidden)
    yield Residual("middle", "scaled_2", "y", s.hidden)


def _phi3(s: Shape, k: Kind) -> Iterator[Part]:
    """As Llama, with one projection for queries, keys and values and one for gate and up."""
    h, f = s.hidden, s.intermediate
    yield Norm("input_layernorm", "x", "normed_1", h)
    yield from _fused_attention(s, k, "normed_1", ("qkv_proj", "o_proj"), bias=False, sliced=True)
    yield Residual("x", "attended", "middle", h)
    yield Norm("post_attention_layernorm", "middle", "normed_2", h)
    yield Linear("gate_up_proj", "normed_2", "gate_up", h, 2 * f, "mlp")
    yield Split("gate_up", ("gate", "up"), (f, f))
    yield Activation("gate", "activated", f)
    yield Product("up", "activated", "gated", f)
    yield Linear("down_proj", "gated", "branch", f, h, "mlp")
    yield Residual("middle", "branch", "y", h)


def _gpt_neox(s: Shape, k: Kind) -> Iterator[Part]:
    """LayerNorm, biases, a plain GELU MLP, beside the attention and not after it unless the config says so."""
    h, f = s.hidden, s.intermediate
    yield Norm("input_layernorm", "x", "normed_1", h, 1, "layer")
    yield from _fused_attention(s, k, "normed_1", ("query_key_value", "dense"), s.attention_bias, sliced=False)
    if not s.parallel:
        yield Residual("attended", "x", "middle", h)
    yield Norm("post_attention_layernorm", "x" if s.parallel else "middle", "normed_2", h, 1, "layer")
    yield Linear("dense_h_to_4h", "normed_2", "wide", h, f, "mlp", bias=True)
    yield Activation("wide", "activated", f)
    yield Linear("dense_4h_to_h", "activated", "branch", f, h, "mlp", bias=True)
    if s.parallel:
        yield Residual("branch", "attended", "both", h)
        yield Residual("both", "x", "y", h)
    else:
        yield Residual("branch", "middle", "y", h)


# what a config says beyond the shared numbers


def _few_experts(fields: Fields) -> Mixture:
    """Mixtral's names, and OLMoE's and gpt-oss's."""
    experts = "num_local_experts" if "num_local_experts" in fields.values else "num_experts"
    return Mixture(fields.count(experts), fields.count("num_experts_per_tok"), fields.count("intermediate_size"))


def _mixtral_experts(fields: Fields) -> Mixture:
    few = _few_experts(fields)
    return Mixture(few.experts, few.active, few.inner, router="softmax_wide", normed=True)


def _gpt_oss_experts(fields: Fields) -> Mixture:
    few = _few_experts(fields)
    return Mixture(few.experts, few.active, few.inner, router="top")


def _olmoe_experts(fields: Fields) -> Mixture:
    few = _few_experts(fields)
    if fields.number("clip_qkv"):
        fields.faults.append(f"clip_qkv is {fields.values['clip_qkv']}; clipped queries and keys are not known here")
    return Mixture(few.experts, few.active, few.inner, normed=fields.flag("norm_topk_prob", False))


def _qwen3_experts(fields: Fields) -> Mixture:
    return Mixture(fields.count("num_experts"), fields.count("num_experts_per_tok"), fields.count("moe_intermediate_size"),
                   normed=fields.flag("norm_topk_prob", False))  # fmt: skip


def _deepseek_v2_experts(fields: Fields) -> Mixture:
    return _deepseek_experts(fields, "grouped" if fields.values.get("topk_method") == "group_limited_greedy" else "greedy", normed=False)


def _deepseek_v3_experts(fields: Fields) -> Mixture:
    return _deepseek_experts(fields, "sigmoid", fields.flag("norm_topk_prob", True))


def _deepseek_experts(fields: Fields, router: str, normed: bool) -> Mixture:
    inner = fields.count("moe_intermediate_size")
    experts = fields.count("n_routed_experts")
    if router in ("grouped", "sigmoid") and experts % fields.count("n_group"):
        fields.faults.append(f"n_routed_experts {experts} is not a multiple of n_group {fields.values['n_group']}")
    return Mixture(experts, fields.count("num_experts_per_tok"), inner, inner * fields.count("n_shared_experts"), router, normed)


def _latent_v2(fields: Fields) -> LatentHeads:
    return _latent(fields, "complex")


def _latent_v3(fields: Fields) -> LatentHeads:
    return _latent(fields, "pairs" if fields.flag("rope_interleave", True) else "halves")


def _latent(fields: Fields, kind: str) -> LatentHeads:
    rank = 0 if fields.values.get("q_lora_rank") is None else fields.count("q_lora_rank")
    return LatentHeads(rank, fields.count("kv_lora_rank"), fields.count("qk_nope_head_dim"), fields.count("qk_rope_head_dim"), fields.count("v_head_dim"), kind)


def _from_window_layers(fields: Fields, index: int) -> bool:
    return index >= fields.count("max_window_layers", least=0)


def _every_other(fields: Fields, index: int) -> bool:
    return index % 2 == 0


def _five_in_six(fields: Fields, index: int) -> bool:
    return (index + 1) % fields.count("sliding_window_pattern") != 0


def _all(fields: Fields, index: int) -> bool:
    return True


def _unturned(fields: Fields, index: int) -> bool:
    return not turns(fields, index)


def turns(fields: Fields, index: int) -> bool:
    """Whether a layer has rotary positions: all have, but some of SmolLM3's."""
    listed = fields.values.get("no_rope_layers")
    if isinstance(listed, list) and index < len(listed):
        return bool(listed[index])
    return "no_rope_layer_interval" not in fields.values or (index + 1) % fields.count("no_rope_layer_interval") != 0


def sparse(fields: Fields, index: int) -> bool:
    """Whether a layer of a model with experts has them: all have, but DeepSeek's first and those that Qwen's configs name."""
    dense = fields.values.get("mlp_only_layers") or []
    step = fields.count("decoder_sparse_step", default=1)
    return index >= fields.count("first_k_dense_replace", default=0, least=0) and index not in dense and (index + 1) % step == 0


@dataclass(frozen=True, kw_only=True)
class Family:
    """What sets a family apart."""

    parts: Callable[[Shape, Kind], Iterator[Part]]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Values of fields that a config may leave out, beside those below."""
    kv_heads: int | None = None
    """Key-value heads where the config names none; None: as many as heads."""
    head_dim: int | None = None
    """Head width where the config names none; None: hidden / heads."""
    tied: bool = False
    """Head tied to the embedding where the config does not say."""
    attention_bias: bool | None = None
    """None: as the config says, else always so."""
    mlp_bias: bool | None = False
    norm: str = "rms"
    """Kind of the last norm."""
    names: tuple[str, str] = ("embed_tokens", "norm")
    """Of the embedding and of the last norm."""
    scaled_embedding: str = ""
    """As in :class:`~sparklab.model.anatomy.Anatomy`."""
    slides: Callable[[Fields, int], bool] | None = None
    """Layers with a sliding window, where the config has one and lists no ``layer_types``; None: no layer ever."""
    listed: bool = True
    """``layer_types`` is heeded."""
    switch: str = ""
    """Field that switches sliding windows on."""
    tables: str = "halves"
    """Kind of the rotary tables."""
    mixture: Callable[[Fields], Mixture] | None = None
    latent: Callable[[Fields], LatentHeads] | None = None


_ON = "use_sliding_window"
_GEMMA: Final[dict[str, Any]] = {
    "head_dim": 256, "tied": True, "norm": "zero_centred", "scaled_embedding": "inside",
}  # fmt: skip
_DEEPSEEK: Final[dict[str, Any]] = {"kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}

FAMILIES: Final[dict[str, Family]] = {
    "llama": Family(parts=_llama, mlp_bias=None),
    "mistral": Family(parts=_llama, kv_heads=8, attention_bias=False, slides=_all, listed=False, defaults={"sliding_window": 4096}),
    "qwen2": Family(parts=_qwen2, kv_heads=32, attention_bias=True, slides=_from_window_layers, switch=_ON,
                    defaults={"sliding_window": 4096, "max_window_layers": 28}),
    "qwen3": Family(parts=_qwen3, kv_heads=32, head_dim=128, slides=_from_window_layers, switch=_ON,
                    defaults={"sliding_window": 4096, "max_window_layers": 28}),
    "gemma": Family(parts=_gemma, kv_heads=16, defaults={"hidden_act": "gelu_pytorch_tanh"}, **_GEMMA),
    "gemma2": Family(parts=_sandwich, kv_heads=4, slides=_every_other, **_GEMMA, defaults={
        "sliding_window": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "hidden_activation": "gelu_pytorch_tanh"}),
    "gemma3_text": Family(parts=_gemma3, kv_heads=4, slides=_five_in_six, **_GEMMA, defaults={
        "sliding_window": 4096, "sliding_window_pattern": 6, "num_attention_heads": 8, "vocab_size": 262_208, "hidden_activation": "gelu_pytorch_tanh"}),
    "phi3": Family(parts=_phi3, attention_bias=False, slides=_all, listed=False, tables="joined"),
    "smollm3": Family(parts=_llama, kv_heads=4, tied=True, mlp_bias=None, slides=_unturned, switch=_ON, defaults={"no_rope_layer_interval": 4}),
    "olmo2": Family(parts=_olmo2, norm="rms_wide", tables="wide"),
    "granite": Family(parts=_granite, mlp_bias=None, scaled_embedding="outside"),
    "gpt_neox": Family(parts=_gpt_neox, norm="layer", names=("embed_in", "final_layer_norm"), mlp_bias=True, tables="joined",
                       defaults={"attention_bias": True, "hidden_act": "gelu", "rotary_pct": 0.25}),
    "mixtral": Family(parts=_llama, kv_heads=8, attention_bias=False, slides=_all, listed=False, mixture=_mixtral_experts,
                      defaults={"num_experts_per_tok": 2, "num_local_experts": 8}),
    "qwen3_moe": Family(parts=_qwen3, kv_heads=4, slides=_all, listed=False, switch=_ON, mixture=_qwen3_experts,
                        defaults={"sliding_window": 4096, "num_experts_per_tok": 8, "num_experts": 128, "moe_intermediate_size": 768}),
    "gpt_oss": Family(parts=_gpt_oss, kv_heads=8, head_dim=64, norm="rms_wide", slides=_every_other, tables="chunks", mixture=_gpt_oss_experts,
                      defaults={"sliding_window": 128, "attention_bias": True, "num_experts_per_tok": 4, "num_local_experts": 128}),
    "olmoe": Family(parts=_olmoe, mixture=_olmoe_experts, defaults={"num_experts_per_tok": 8, "num_experts": 64}),
    "deepseek_v2": Family(parts=_llama, mlp_bias=None, tables="complex", mixture=_deepseek_v2_experts, latent=_latent_v2, defaults={
        "n_routed_experts": 64, "n_shared_experts": 2, "moe_intermediate_size": 1407, "topk_method": "greedy", **_DEEPSEEK}),
    "deepseek_v3": Family(parts=_llama, mixture=_deepseek_v3_experts, latent=_latent_v3, defaults={
        "n_routed_experts": 256, "n_shared_experts": 1, "moe_intermediate_size": 2048, "num_experts_per_tok": 8, "first_k_dense_replace": 3, "n_group": 8,
        **_DEEPSEEK}),
}  # fmt: skip
ALIASES: Final = {"gemma3": "gemma3_text", "qwen2_5_vl_text": "qwen2", "qwen2_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
"""Text parts of multimodal configs whose layers are another family's."""
