"""What a model is made of, read from its ``config.json`` alone: no weights, no torch, no remote code.

A layer is a list of *parts* in the order they run. Each part names the tensors it reads and the one it writes, so whatever walks the list (the
parameter count here, the memory ledger and the cost in :mod:`sparklab.planner`) needs no knowledge of families: a new family is a new list.
Shapes below leave the batch out: B is 1 everywhere, since rows are packed.
"""

from __future__ import annotations

import difflib
import html
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sparklab.errors import ModelError, ModelNotFound
from sparklab.units import format_bytes, format_count

TINY_PATH: Final = Path(__file__).resolve().parent / "tiny"
MOST_PARAMETERS: Final = 10**14  # ten times the largest model anybody has described; more is a typing error
SECONDS_TO_WAIT: Final = 10.0  # a plan is asked for interactively; a network that takes longer for 1 KB counts as none
DTYPE_BYTES: Final = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}


@dataclass(frozen=True)
class Linear:
    """``writes[T, outputs] = reads[T, inputs] @ weight[outputs, inputs].T (+ bias[outputs])``."""

    name: str
    reads: str
    writes: str
    inputs: int
    outputs: int
    group: str
    """``attention`` or ``mlp``."""
    bias: bool = False

    @property
    def parameters(self) -> int:
        return self.inputs * self.outputs + (self.outputs if self.bias else 0)


@dataclass(frozen=True)
class Norm:
    """RMSNorm, computed in fp32: over ``width`` numbers, in each of ``groups`` slices of a token (heads, for a norm of queries or keys)."""

    name: str
    reads: str
    writes: str
    width: int
    groups: int = 1

    @property
    def parameters(self) -> int:
        return self.width


@dataclass(frozen=True)
class Rotary:
    """Rotary positions on one of queries and keys, ``width`` numbers a token."""

    reads: str
    writes: str
    width: int
    parameters: int = 0


@dataclass(frozen=True)
class Attention:
    """Causal attention of ``heads`` queries on ``kv_heads`` keys and values, each ``head_dim`` wide."""

    query: str
    key: str
    value: str
    writes: str
    heads: int
    kv_heads: int
    head_dim: int
    parameters: int = 0


@dataclass(frozen=True)
class Activation:
    """A pointwise function (SiLU) that keeps its input for the backward pass."""

    reads: str
    writes: str
    width: int
    parameters: int = 0


@dataclass(frozen=True)
class Product:
    """``left * right``, both kept for the backward pass."""

    left: str
    right: str
    writes: str
    width: int
    parameters: int = 0


@dataclass(frozen=True)
class Residual:
    """``stream + branch``; keeps nothing."""

    stream: str
    branch: str
    writes: str
    width: int
    parameters: int = 0


Part = Linear | Norm | Rotary | Attention | Activation | Product | Residual


@dataclass(frozen=True)
class Block:
    """``count`` consecutive layers of the same parts. A layer reads the tensor ``x`` and writes ``y``."""

    count: int
    parts: tuple[Part, ...]

    @property
    def parameters(self) -> int:
        return self.count * sum(part.parameters for part in self.parts)

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The linear layers of one of these layers."""
        return tuple(part for part in self.parts if isinstance(part, Linear))


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

    @classmethod
    def read(cls, source: str | Path) -> Anatomy:
        """The anatomy of a ``config.json``, of a directory with one, of a hub name (``owner/name``) or of ``"tiny"``, the bundled model.

        Of a hub name only config.json is fetched. Raises :class:`ModelNotFound` where there is no such model, :class:`ModelError` with
        every fault of the config where it cannot be.
        """
        return from_config(_load(str(source)), str(source))

    @property
    def embedding_parameters(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def head_parameters(self) -> int:
        """Numbers in the head's weight, 0 where it is the embedding's."""
        return 0 if self.tied_embeddings else self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """All parameters, a tied weight counted once: embedding, layers, last norm, head."""
        return self.embedding_parameters + sum(block.parameters for block in self.blocks) + self.hidden + self.head_parameters

    @property
    def source_bytes(self) -> int:
        """Bytes of the weights as stored (what a download is)."""
        return self.parameters * DTYPE_BYTES.get(self.dtype, 2)

    @property
    def linears(self) -> tuple[LinearGroup, ...]:
        """The linear layers inside the layers (the head is not one of them), by name, in order."""
        groups: dict[tuple[str, int, int, str], int] = {}
        for block in self.blocks:
            for part in block.linears:
                key = (part.name, part.inputs, part.outputs, part.group)
                groups[key] = groups.get(key, 0) + block.count
        return tuple(LinearGroup(name, inputs, outputs, count, group) for (name, inputs, outputs, group), count in groups.items())

    def targeted(self, targets: str | tuple[str, ...]) -> tuple[LinearGroup, ...]:
        """The linear layers that ``targets`` names: ``all-linear``, ``attention``, one name or several. Raises :class:`ModelError` for unknown names."""
        if targets == "all-linear":
            return self.linears
        if targets == "attention":
            return tuple(linear for linear in self.linears if linear.group == "attention")
        names = (targets,) if isinstance(targets, str) else targets
        known = list(dict.fromkeys(linear.name for linear in self.linears))
        unknown = [name for name in names if name not in known]
        if unknown or not names:
            raise ModelError(f"targets names no linear layer of {self.source}: {', '.join(map(repr, unknown)) or 'empty'}",
                             f"use 'all-linear', 'attention' or some of: {', '.join(known)}")  # fmt: skip
        return tuple(linear for linear in self.linears if linear.name in names)

    def to_dict(self) -> dict[str, Any]:
        """The figures for JSON."""
        names = ("source", "family", "hidden", "intermediate", "layers", "heads", "kv_heads", "head_dim", "vocabulary", "tied_embeddings",
                 "attention_bias", "mlp_bias", "max_positions", "dtype", "parameters", "source_bytes")  # fmt: skip
        return {name: getattr(self, name) for name in names}

    def __repr__(self) -> str:
        return (
            f"Anatomy({self.source}: {self.family}, {format_count(self.parameters)} parameters, {self.layers} layers of {self.hidden}, "
            f"{self.heads}/{self.kv_heads} heads of {self.head_dim}, vocabulary {self.vocabulary:,}{', tied' if self.tied_embeddings else ''})"
        )

    def _repr_html_(self) -> str:
        rows = [
            ("parameters", f"{self.parameters:,} ({format_bytes(self.source_bytes)} as stored in {self.dtype})"),
            ("layers", f"{self.layers} of width {self.hidden:,}, inside {self.intermediate:,}"),
            ("heads", f"{self.heads} queries, {self.kv_heads} keys and values, each {self.head_dim}"),
            ("vocabulary", f"{self.vocabulary:,}{', head tied to the embedding' if self.tied_embeddings else ''}"),
            ("longest text", f"{self.max_positions:,} tokens" if self.max_positions else "N/A"),
        ]
        cell = 'style="text-align:left;padding:2px 12px 2px 0;border:0;background:none"'
        body = "".join(f'<tr style="background:none"><td {cell}>{html.escape(name)}</td><td {cell}>{html.escape(value)}</td></tr>' for name, value in rows)
        title = f"<b>{html.escape(self.source)}</b> ({html.escape(self.family)})"
        return f'<div>{title}<table style="border-collapse:collapse;border:0">{body}</table></div>'


# Reading the config ------------------------------------------------------------------------------------------------------------------------


class _Fields:
    """Reads a config's fields and collects every fault instead of stopping at the first."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values
        self.faults: list[str] = []

    def count(self, name: str, default: int | None = None, least: int = 1) -> int:
        """A whole number of at least ``least``; 0 stands in for a faulty one, so that later checks can go on."""
        value = self.values.get(name)
        if value is None:
            value = default
        if value is None:
            self.faults.append(f"{name} is missing")
            return 0
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            self.faults.append(f"{name} is {value!r}; it must be a whole number of at least {least}")
            return 0
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self.values.get(name, default)
        if not isinstance(value, bool):
            self.faults.append(f"{name} is {value!r}; it must be true or false")
            return default
        return value


@dataclass(frozen=True)
class _Shape:
    """The numbers that all decoder families share."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class _Family:
    """What sets a family apart: its defaults, as transformers has them, and its list of parts."""

    parts: Callable[[_Shape, bool, bool], Iterator[Part]]
    kv_heads: int | None = None
    """Key-value heads where the config names none; None: as many as heads."""
    head_dim: int | None = None
    """Head width where the config names none; None: hidden / heads."""
    attention_bias: bool | None = None
    """None: as the config says, else always so."""
    mlp_bias: bool | None = False
    output_bias: bool = True
    """The attention's output projection has a bias where queries have one."""
    norm_heads: bool = False
    """Queries and keys are normed, head by head."""


def _decoder(shape: _Shape, attention_bias: bool, mlp_bias: bool, output_bias: bool = True, norm_heads: bool = False) -> Iterator[Part]:
    """A pre-norm layer with rotary grouped-query attention and a gated MLP, in the order transformers runs it."""
    h, f = shape.hidden, shape.intermediate
    q, k = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    yield Norm("input_layernorm", "x", "normed_1", h)
    yield Linear("q_proj", "normed_1", "q", h, q, "attention", attention_bias)
    if norm_heads:
        yield Norm("q_norm", "q", "q_normed", shape.head_dim, shape.heads)
    yield Linear("k_proj", "normed_1", "k", h, k, "attention", attention_bias)
    if norm_heads:
        yield Norm("k_norm", "k", "k_normed", shape.head_dim, shape.kv_heads)
    yield Linear("v_proj", "normed_1", "v", h, k, "attention", attention_bias)
    yield Rotary("q_normed" if norm_heads else "q", "q_turned", q)
    yield Rotary("k_normed" if norm_heads else "k", "k_turned", k)
    yield Attention("q_turned", "k_turned", "v", "mixed", shape.heads, shape.kv_heads, shape.head_dim)
    yield Linear("o_proj", "mixed", "attended", q, h, "attention", attention_bias and output_bias)
    yield Residual("x", "attended", "middle", h)
    yield Norm("post_attention_layernorm", "middle", "normed_2", h)
    yield Linear("gate_proj", "normed_2", "gate", h, f, "mlp", mlp_bias)
    yield Activation("gate", "activated", f)
    yield Linear("up_proj", "normed_2", "up", h, f, "mlp", mlp_bias)
    yield Product("activated", "up", "gated", f)
    yield Linear("down_proj", "gated", "down", f, h, "mlp", mlp_bias)
    yield Residual("middle", "down", "y", h)


def _qwen2(shape: _Shape, attention_bias: bool, mlp_bias: bool) -> Iterator[Part]:
    return _decoder(shape, attention_bias, mlp_bias, output_bias=False)


def _qwen3(shape: _Shape, attention_bias: bool, mlp_bias: bool) -> Iterator[Part]:
    return _decoder(shape, attention_bias, mlp_bias, norm_heads=True)


FAMILIES: Final[dict[str, _Family]] = {
    "llama": _Family(_decoder, mlp_bias=None),
    "mistral": _Family(_decoder, kv_heads=8, attention_bias=False),
    "qwen2": _Family(_qwen2, kv_heads=32, attention_bias=True),
    "qwen3": _Family(_qwen3, kv_heads=32, head_dim=128),
}


def from_config(values: Any, source: str) -> Anatomy:
    """The anatomy that a parsed config.json describes. Raises :class:`ModelError` naming every fault."""
    if not isinstance(values, dict):
        raise ModelError(f"{source}: config.json holds {type(values).__name__}, not an object", "point at the config.json of a transformers model")
    family = _family(values, source)
    fields = _Fields(values)
    heads = fields.count("num_attention_heads")
    hidden = fields.count("hidden_size")
    if values.get("head_dim") is None and family.head_dim is None and heads and hidden % heads:
        fields.faults.append(f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}, and there is no head_dim")
    shape = _Shape(
        hidden=hidden,
        intermediate=fields.count("intermediate_size"),
        layers=fields.count("num_hidden_layers"),
        heads=heads,
        kv_heads=fields.count("num_key_value_heads", default=(family.kv_heads or heads or 1)),
        head_dim=fields.count("head_dim", default=family.head_dim or (hidden // heads if heads else 1) or 1),
    )
    if shape.heads and shape.kv_heads and shape.heads % shape.kv_heads:
        fields.faults.append(f"num_attention_heads {shape.heads} is not a multiple of num_key_value_heads {shape.kv_heads}")
    if shape.head_dim % 2:
        fields.faults.append(f"heads are {shape.head_dim} wide; rotary positions need an even width")
    attention_bias = fields.flag("attention_bias", False) if family.attention_bias is None else family.attention_bias
    mlp_bias = fields.flag("mlp_bias", False) if family.mlp_bias is None else family.mlp_bias
    anatomy = Anatomy(
        source=source,
        family=str(values["model_type"]),
        hidden=shape.hidden,
        intermediate=shape.intermediate,
        layers=shape.layers,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocabulary=fields.count("vocab_size"),
        tied_embeddings=fields.flag("tie_word_embeddings", False),
        attention_bias=attention_bias,
        mlp_bias=mlp_bias,
        max_positions=fields.count("max_position_embeddings", default=0, least=0),
        dtype=str(values.get("dtype") or values.get("torch_dtype") or "bfloat16"),
        blocks=(Block(shape.layers, tuple(family.parts(shape, attention_bias, mlp_bias))),),
    )
    if not fields.faults and anatomy.parameters > MOST_PARAMETERS:
        fields.faults.append(f"these shapes make {anatomy.parameters:.2g} parameters; no model has more than {MOST_PARAMETERS:.0e}")
    if fields.faults:
        raise ModelError(f"The config of {source} cannot be:\n" + "\n".join(f"  - {fault}" for fault in fields.faults), "mend or re-download config.json")
    return anatomy


def _family(values: dict[str, Any], source: str) -> _Family:
    """The family a config names, or an error that says which are known."""
    known = ", ".join(sorted(FAMILIES))
    name = values.get("model_type")
    if name is None:
        raise ModelError(f"{source}: config.json names no model_type", f"it is not the config of a transformers model; known families: {known}")
    if name not in FAMILIES:
        raise ModelError(f"{source} is of the family {name!r}, whose anatomy is not known", f"use a model of one of: {known}")
    if values.get("quantization_config") is not None:
        raise ModelError(f"{source} is already quantised", "name the unquantised original; method='qlora' quantises it while loading")
    return FAMILIES[name]


def _load(source: str) -> Any:
    """The parsed config.json that ``source`` means; asked of the hub only where no such path exists and the name has the hub's form."""
    path = TINY_PATH if source == "tiny" else Path(source).expanduser()
    if path.is_dir():
        path = path / "config.json"
        if not path.is_file():
            raise ModelNotFound(f"The directory {path.parent} has no config.json", _nearest(path))
    elif not path.is_file():
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", source) or source.endswith(".json"):
            raise ModelNotFound(f"No model at {source!r}", _nearest(path))
        return _parse(_fetch_config(source), source)
    try:
        return _parse(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise ModelError(f"{path} is not JSON: {error}", "point at the model's config.json") from None
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}", "check the file's permissions") from None


def _parse(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ModelError(f"{name} is not JSON: {error}", "point at the model's config.json, or download it again") from None


def _nearest(path: Path) -> str:
    """The likeliest thing that was meant: a sibling of nearly that name, the bundled model, or the forms a name can have."""
    forms = "give a directory with config.json, a config.json, a hub name (owner/name) or 'tiny', the bundled model"
    try:
        siblings = sorted(item.name for item in path.parent.iterdir() if item.is_dir() or item.suffix == ".json")
    except OSError:
        return f"the directory {path.parent} does not exist or cannot be read; {forms}"
    close = difflib.get_close_matches(path.name, [*siblings, "tiny"], n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0] if close[0] == 'tiny' and 'tiny' not in siblings else str(path.parent / close[0])!r}? Else {forms}"
    return forms


def _fetch_config(name: str) -> str:
    """The text of ``config.json`` of hub model ``owner/name``: from the local cache, else asked for once.

    Raises :class:`ModelNotFound`, within ten seconds, whatever went wrong.
    """
    from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415 - only a hub name needs it

    cached = try_to_load_from_cache(name, "config.json")
    if isinstance(cached, str):
        return Path(cached).read_text(encoding="utf-8")
    answers: list[tuple[str, str]] = []
    # A thread, because name resolution on a half-dead network ignores every timeout; a plain request, because hf_hub_download retries for minutes.
    thread = threading.Thread(target=lambda: answers.append(_ask_hub(name)), daemon=True)
    thread.start()
    thread.join(SECONDS_TO_WAIT)
    text, reason = answers[0] if answers else ("", f"the hub did not answer in {SECONDS_TO_WAIT:.0f} seconds")
    if text:
        return text
    raise ModelNotFound(f"No model {name!r}: no such path here, not in the local hub cache, and {reason}",
                        "check the spelling and the network; a gated model needs `hf auth login`; 'tiny' works offline")  # fmt: skip


def _ask_hub(name: str) -> tuple[str, str]:
    """(config.json's text, "") or ("", why there is none)."""
    from huggingface_hub import get_session, hf_hub_url  # noqa: PLC0415 - only a hub name needs it
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # noqa: PLC0415 - exported without saying so

    try:
        answer = get_session().get(hf_hub_url(name, "config.json"), headers=build_hf_headers(), timeout=SECONDS_TO_WAIT / 2)
    except Exception as error:  # noqa: BLE001 - the transport's dozens of unrelated types all mean the same here
        return "", f"the hub cannot be reached ({type(error).__name__})"
    reasons = {401: "the hub has none of this name (or it is private)", 403: "the hub says it is gated", 404: "the hub has no such config.json"}
    if answer.status_code != 200:
        return "", reasons.get(answer.status_code, f"the hub answered {answer.status_code}")
    return answer.text, ""
