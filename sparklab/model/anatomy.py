"""What a model is made of, read from its ``config.json`` alone: no weights, no torch, no remote code."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any, Final

from sparklab.errors import ModelError, UnknownFamily
from sparklab.model.families import ALIASES, FAMILIES, Family, sparse, turns
from sparklab.model.fields import MOST, MOST_LAYERS, Fields, Kind, Shape
from sparklab.model.hub import load_config
from sparklab.model.parts import Attention, Block, Latent, Norm
from sparklab.units import format_bytes, format_count

MOST_PARAMETERS: Final = 10**14  # ten times the largest model anybody has described; more is a typing error
DTYPE_BYTES: Final = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}
DROPOUTS: Final = ("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop")
ACTIVATIONS: Final = ("silu", "swish", "gelu", "gelu_pytorch_tanh")  # one kernel that keeps its input; others keep more


@dataclass(frozen=True)
class ParameterGroup:
    """All parameters of one name and shape: ``count`` of them, one a layer or one in all."""

    name: str
    """The last two words of their name in transformers, as ``q_proj.weight``."""
    shape: tuple[int, ...]
    count: int


@dataclass(frozen=True)
class LinearGroup:
    """All the linear layers of one name: ``count`` weights of shape [outputs, inputs]."""

    name: str
    inputs: int
    outputs: int
    count: int
    group: str

    @property
    def weights(self) -> int:
        """Numbers in all their weight matrices."""
        return self.inputs * self.outputs * self.count


@dataclass(frozen=True, kw_only=True, repr=False)
class Anatomy:
    """A language model's shape. Read one with :meth:`read`."""

    source: str
    """What was read: a path or a hub name."""
    family: str
    """``model_type`` of the config."""
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied_embeddings: bool
    """The head is the embedding's own weight."""
    attention_bias: bool
    mlp_bias: bool
    max_positions: int
    """Longest text the model was made for, in tokens; 0 where the config does not say."""
    dtype: str
    """Type of the stored weights, as the config names it."""
    blocks: tuple[Block, ...]
    """The layers, in order."""
    last_norm: Norm
    """The norm between layers and head."""
    embedding: str = "embed_tokens"
    """The embedding's name."""
    scaled_embedding: str = ""
    """Where what the embedding gives is multiplied by a constant: ``inside`` its module (Gemma), ``outside`` (Granite), nowhere."""
    capped_logits: bool = False
    """Logits are soft-capped."""
    tables: str = "halves"
    """Kind of the rotary tables, as in :class:`~sparklab.model.parts.Rotary`."""
    table_count: int = 1
    turned: int = 0
    """Numbers of a head that rotary positions turn."""
    notes: tuple[str, ...] = ()
    """What the reader must know beside the figures."""

    @classmethod
    def read(cls, source: str | Path) -> Anatomy:
        """The anatomy of a ``config.json``, of a directory with one, of a hub name (``owner/name``) or of ``"tiny"``, the bundled model.

        Of a hub name only config.json is fetched. Raises :class:`ModelNotFound` where there is no such model, :class:`ModelError` with
        every fault of the config where it cannot be.
        """
        return from_config(load_config(str(source)), str(source))

    @property
    def embedding_parameters(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def head_parameters(self) -> int:
        """Numbers in the head's weight, 0 where it is the embedding's."""
        return 0 if self.tied_embeddings else self.vocabulary * self.hidden

    @cached_property
    def parameters(self) -> int:
        """All parameters, a tied weight counted once: embedding, layers, last norm, head."""
        return self.embedding_parameters + sum(block.parameters for block in self.blocks) + self.last_norm.parameters + self.head_parameters

    @cached_property
    def expert_parameters(self) -> int:
        """Numbers in experts, which are no linear layers: 4-bit loading leaves them as they are, and LoRA on "all-linear" does not adapt them."""
        return sum(block.count * experts.parameters for block in self.blocks for experts in block.experts)

    @property
    def active_parameters(self) -> int:
        """Parameters that one token meets: all but the experts it is not sent to."""
        active = sum(block.count * experts.active_parameters for block in self.blocks for experts in block.experts)
        return self.parameters - self.expert_parameters + active

    @property
    def largest_stack(self) -> int:
        """Numbers in the largest 3-D parameter; 0 without experts."""
        return max((prod(experts.tensors[0][1]) for block in self.blocks for experts in block.experts), default=0)

    @property
    def groups(self) -> tuple[ParameterGroup, ...]:
        """Every parameter by name and shape; their sizes sum to :attr:`parameters`."""
        counts: dict[tuple[str, tuple[int, ...]], int] = {(f"{self.embedding}.weight", (self.vocabulary, self.hidden)): 1}
        for block in self.blocks:
            for part in block.parts:
                for tensor in part.tensors:
                    counts[tensor] = counts.get(tensor, 0) + block.count
        for tensor in self.last_norm.tensors:
            counts[tensor] = 1
        if not self.tied_embeddings:
            counts["lm_head.weight", (self.vocabulary, self.hidden)] = 1
        return tuple(ParameterGroup(name, shape, count) for (name, shape), count in counts.items())

    @cached_property
    def cached_numbers(self) -> int:
        """Numbers that a token leaves in the key-value cache, all layers together."""
        total = 0
        for block in self.blocks:
            latent = next((part.cached for part in block.parts if isinstance(part, Latent)), 0)
            heads = sum(part.kv_heads * (part.head_dim + (part.value_dim or part.head_dim)) for part in block.parts if isinstance(part, Attention))
            total += block.count * (latent or heads)
        return total

    def table_bytes(self, width: int) -> int:
        """Bytes a token of the rotary tables, which all layers share, where numbers are ``width`` bytes."""
        each = {"wide": 2 * 4, "chunks": width, "complex": 4}.get(self.tables, 2 * width)
        return self.table_count * self.turned * each

    @property
    def source_bytes(self) -> int:
        """Bytes of the weights as stored (what a download is)."""
        return self.parameters * DTYPE_BYTES.get(self.dtype, 2)

    @cached_property
    def linears(self) -> tuple[LinearGroup, ...]:
        """The linear layers inside the layers (the head is not one of them), by name, in order."""
        groups: dict[tuple[str, int, int, str], int] = {}
        for block in self.blocks:
            for part in block.linears:
                key = (part.name, part.inputs, part.outputs, part.group)
                groups[key] = groups.get(key, 0) + block.count
        return tuple(LinearGroup(name, inputs, outputs, count, group) for (name, inputs, outputs, group), count in groups.items())

    @property
    def largest_linear(self) -> LinearGroup:
        return max(self.linears, key=lambda linear: linear.inputs * linear.outputs)

    def targeted(self, targets: str | tuple[str, ...]) -> tuple[LinearGroup, ...]:
        """The linear layers that ``targets`` names: ``all-linear``, ``attention``, one name or several. Raises :class:`ModelError` for unknown names.

        Of a model with experts only those of the attention can be adapted: PEFT takes the names of the others for those of the experts.
        """
        attention = tuple(linear for linear in self.linears if linear.group == "attention")
        adaptable = attention if self.expert_parameters else self.linears
        if targets in ("all-linear", "attention"):
            return adaptable if targets == "all-linear" else attention
        names = (targets,) if isinstance(targets, str) else targets
        known = list(dict.fromkeys(linear.name for linear in adaptable))
        unknown = [name for name in names if name not in known]
        if unknown or not names:
            raise ModelError(f"targets names no linear layer of {self.source} to adapt: {', '.join(map(repr, unknown)) or 'empty'}",
                             f"use 'all-linear', 'attention' or some of: {', '.join(known)}")  # fmt: skip
        return tuple(linear for linear in adaptable if linear.name in names)

    def to_dict(self) -> dict[str, Any]:
        """The figures for JSON."""
        names = ("source", "family", "hidden", "intermediate", "layers", "heads", "kv_heads", "head_dim", "vocabulary", "tied_embeddings",
                 "attention_bias", "mlp_bias", "max_positions", "dtype", "parameters", "active_parameters", "source_bytes")  # fmt: skip
        return {name: getattr(self, name) for name in names}

    def __repr__(self) -> str:
        active = f" ({format_count(self.active_parameters)} active)" if self.expert_parameters else ""
        return (
            f"Anatomy({self.source}: {self.family}, {format_count(self.parameters)} parameters{active}, {self.layers} layers of {self.hidden}, "
            f"{self.heads}/{self.kv_heads} heads of {self.head_dim}, vocabulary {self.vocabulary:,}{', tied' if self.tied_embeddings else ''})"
        )

    def _repr_html_(self) -> str:
        rows = [
            ("parameters", f"{self.parameters:,} ({format_bytes(self.source_bytes)} as stored in {self.dtype})"),
            ("layers", f"{self.layers} of width {self.hidden:,}, inside {self.intermediate:,}"),
            ("heads", f"{self.heads} queries, {self.kv_heads} keys and values, each {self.head_dim}"),
            ("vocabulary", f"{self.vocabulary:,}{', head tied to the embedding' if self.tied_embeddings else ''}"),
            *(
                [("experts", f"{format_count(self.expert_parameters)} parameters in experts; a token meets {format_count(self.active_parameters)} in all")]
                if self.expert_parameters
                else []
            ),
            ("longest text", f"{self.max_positions:,} tokens" if self.max_positions else "N/A"),
        ]
        cell = 'style="text-align:left;padding:2px 12px 2px 0;border:0;background:none"'
        body = "".join(f'<tr style="background:none"><td {cell}>{html.escape(name)}</td><td {cell}>{html.escape(value)}</td></tr>' for name, value in rows)
        title = f"<b>{html.escape(self.source)}</b> ({html.escape(self.family)})"
        return f'<div>{title}<table style="border-collapse:collapse;border:0">{body}</table></div>'


# Reading the config ------------------------------------------------------------------------------------------------------------------------


def from_config(values: Any, source: str) -> Anatomy:
    """The anatomy that a parsed config.json describes; of a multimodal model its text part. Raises :class:`ModelError` naming every fault."""
    if not isinstance(values, dict):
        raise ModelError(f"{source}: config.json holds {type(values).__name__}, not an object", "point at the config.json of a transformers model")
    values, notes = _text_part(values)
    name, family = _family(values, source)
    fields = Fields(values, family.defaults)
    shape = _shape(fields, family)
    blocks, windows = _blocks(fields, family, shape)
    act = str(fields.values.get("hidden_activation") or fields.values.get("hidden_act") or "silu")
    if act not in ACTIVATIONS:
        fields.faults.append(f"hidden_act is {act!r}; known are {', '.join(ACTIVATIONS)}")
    if fields.values.get("use_bidirectional_attention"):
        fields.faults.append("use_bidirectional_attention is true; only models that write from left to right can be trained here")
    anatomy = Anatomy(
        source=source,
        family=name,
        hidden=shape.hidden,
        intermediate=shape.intermediate,
        layers=shape.layers,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocabulary=fields.count("vocab_size"),
        tied_embeddings=fields.flag("tie_word_embeddings", family.tied),
        attention_bias=shape.attention_bias,
        mlp_bias=shape.mlp_bias,
        max_positions=fields.count("max_position_embeddings", default=0, least=0),
        dtype=str(values.get("dtype") or values.get("torch_dtype") or "bfloat16"),
        blocks=blocks,
        last_norm=Norm(family.names[1], "x", "normed", shape.hidden, 1, family.norm),
        embedding=family.names[0],
        scaled_embedding=family.scaled_embedding,
        capped_logits=fields.number("final_logit_softcapping"),
        tables=family.tables,
        table_count=len(windows) if name == "gemma3_text" else 1,  # it turns at another pace where a window slides
        turned=shape.turned,
        notes=(*notes, *_dropout_note(fields.values), *_balance_note(fields.values, shape)),
    )
    if not fields.faults and anatomy.parameters > MOST_PARAMETERS:
        fields.faults.append(f"these shapes make {anatomy.parameters:.2g} parameters; no model has more than {MOST_PARAMETERS:.0e}")
    if fields.faults:
        listed = "\n".join(f"  - {fault}" for fault in dict.fromkeys(fields.faults))
        raise ModelError(f"The config of {source} cannot be:\n{listed}", "mend or re-download config.json")
    return anatomy


def width_of(source: str) -> int | None:
    """The width that a config names, whatever else is wrong with it; None where it names none."""
    return _named(source, "hidden_size")


def vocabulary_of(source: str) -> int | None:
    """How many tokens a config says that the model knows; None where it does not."""
    return _named(source, "vocab_size")


def _named(source: str, name: str) -> int | None:
    try:
        values = load_config(source)
    except ModelError:
        return None
    if not isinstance(values, dict):
        return None
    value = _text_part(values)[0].get(name)
    return value if isinstance(value, int) and 0 < value <= MOST else None


def _dropout_note(values: Mapping[str, Any]) -> tuple[str, ...]:
    """Where the config makes the model drop numbers by itself, which no ledger line counts."""
    given = [f"{name} {values[name]}" for name in DROPOUTS if isinstance(values.get(name), (int, float)) and values[name] > 0]
    return (f"the model's own dropout ({', '.join(given)}) keeps masks that are not counted here: trace it, or set it to 0 in config.json",) if given else ()


def _balance_note(values: Mapping[str, Any], shape: Shape) -> tuple[str, ...]:
    """Where the config asks transformers for a loss of the routers' beside that of the tokens."""
    if shape.mixture is None or not values.get("output_router_logits"):
        return ()
    return ("output_router_logits is true, and no loss that balances the experts is added here: what is learned is the cross-entropy of the tokens alone",)


def _text_part(values: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The language model's own config, and what to say about the rest."""
    inner = values.get("text_config")
    if not isinstance(inner, dict):
        return values, ()
    outer = {key: values[key] for key in ("tie_word_embeddings", "dtype", "torch_dtype", "quantization_config") if values.get(key) is not None}
    note = f"this is the text part of a {values.get('model_type')!r} model; what reads pictures or sound is not counted"
    return {**outer, **inner}, (note,)


def _family(values: Mapping[str, Any], source: str) -> tuple[str, Family]:
    """The family a config names, or an error that says which are known."""
    known = ", ".join(sorted(FAMILIES))
    name = values.get("model_type")
    if name is None:
        raise ModelError(f"{source}: config.json names no model_type", f"it is not the config of a transformers model; known families: {known}")
    name = ALIASES.get(str(name), str(name))
    if name not in FAMILIES:
        raise UnknownFamily(
            f"{source} is of the family {name!r}, whose anatomy is not known",
            f"trace its training step: sparklab trace {source}; or use a model of one of: {known}",
        )
    if values.get("quantization_config") is not None:
        raise ModelError(f"{source} is already quantised", "name the unquantised original; method='qlora' quantises it while loading")
    return name, FAMILIES[name]


def _shape(fields: Fields, family: Family) -> Shape:
    """The numbers that all families share, checked against each other."""
    hidden, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    whole = not hidden % heads
    if fields.values.get("head_dim") is None and family.head_dim is None and family.latent is None and not whole:
        fields.faults.append(f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}, and there is no head_dim")
    silent = "num_key_value_heads" not in fields.values
    kv_heads = fields.count("num_key_value_heads", default=(silent and family.kv_heads) or heads)
    if family.mixture is None or family.latent is not None or "mlp_only_layers" in fields.values:
        intermediate = fields.count("intermediate_size")
    else:
        intermediate = fields.count("intermediate_size", default=1)
    head_dim = fields.count("head_dim", default=family.head_dim or max(1, hidden // heads))
    latent = family.latent(fields) if family.latent else None
    turned = latent.turned if latent else int(head_dim * _turned_share(fields, family))
    if heads % kv_heads:
        fields.faults.append(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    if turned % 2 or not turned:
        fields.faults.append(f"rotary positions turn {turned} numbers of each head; it must be an even number")
    mixture = family.mixture(fields) if family.mixture else None
    if mixture and mixture.active > mixture.experts:
        fields.faults.append(f"num_experts_per_tok {mixture.active} is more than the {mixture.experts} experts there are")
    return Shape(
        hidden=hidden, intermediate=intermediate, layers=fields.count("num_hidden_layers", most=MOST_LAYERS), heads=heads, kv_heads=kv_heads,
        head_dim=head_dim, turned=turned,
        attention_bias=fields.flag("attention_bias", False) if family.attention_bias is None else family.attention_bias,
        mlp_bias=fields.flag("mlp_bias", False) if family.mlp_bias is None else family.mlp_bias,
        capped=fields.number("attn_logit_softcapping"), parallel=fields.flag("use_parallel_residual", True), mixture=mixture, latent=latent,
    )  # fmt: skip


def _turned_share(fields: Fields, family: Family) -> float:
    """Share of a head that rotary positions turn: 1, but for families that join the turned with the rest."""
    if family.tables != "joined":
        return 1.0
    nested = [fields.values.get(name) for name in ("rope_parameters", "rope_scaling")]
    places: list[Mapping[str, Any]] = [fields.values, *(place for place in nested if isinstance(place, dict))]
    found = [place[name] for place in places for name in ("partial_rotary_factor", "rotary_pct") if isinstance(place.get(name), (int, float))]
    share = float(found[0]) if found else 1.0
    if not 0 < share <= 1:
        fields.faults.append(f"partial_rotary_factor is {share}; it must be above 0 and at most 1")
        return 1.0
    return share


def _blocks(fields: Fields, family: Family, shape: Shape) -> tuple[tuple[Block, ...], set[int]]:
    """The layers, equal neighbours together, and the windows they look through (0: everything before)."""
    if fields.faults:  # with stand-ins for numbers there is no use in layers
        return (), set()
    window = 0
    if family.slides and (not family.switch or fields.flag(family.switch, False)) and fields.values.get("sliding_window") is not None:
        window = fields.count("sliding_window")
    types = fields.listed("layer_types", shape.layers) if family.listed and family.slides else None
    kinds = []
    for index in range(shape.layers):
        slides = window and (types[index] == "sliding_attention" if types else family.slides is not None and family.slides(fields, index))
        kinds.append(Kind(window if slides else 0, turns(fields, index), shape.mixture is not None and sparse(fields, index)))
    parts = {kind: tuple(family.parts(shape, kind)) for kind in set(kinds)}
    return tuple(Block(len(list(run)), parts[kind]) for kind, run in groupby(kinds)), {kind.window for kind in kinds}
