"""The parts that layers are made of. A layer is a list of parts in the order they run, and a model is a list of layers.

Each part names the tensors it reads and those it writes, and its parameters with their shapes, so whatever walks the list (the parameter count,
the memory ledger and the cost in :mod:`sparklab.planner`) needs no knowledge of families: a new family is a new list, in
:mod:`sparklab.model.families`. Shapes leave the batch out: B is 1 everywhere, since rows are packed. T is tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

Tensors = tuple[tuple[str, tuple[int, ...]], ...]
"""Parameters as (the last two words of their name in transformers, shape)."""


@dataclass(frozen=True)
class Part:
    """What all parts have in common."""

    @property
    def tensors(self) -> Tensors:
        """Its parameters."""
        return ()

    @property
    def parameters(self) -> int:
        return sum(prod(shape) for _, shape in self.tensors)


@dataclass(frozen=True)
class Linear(Part):
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
    def tensors(self) -> Tensors:
        weight = ((f"{self.name}.weight", (self.outputs, self.inputs)),)
        return (*weight, (f"{self.name}.bias", (self.outputs,))) if self.bias else weight


@dataclass(frozen=True)
class Norm(Part):
    """RMSNorm computed in fp32, or LayerNorm: over ``width`` numbers, in each of ``groups`` slices of a token (heads, for a norm of queries or keys)."""

    name: str
    reads: str
    writes: str
    width: int
    groups: int = 1
    kind: str = "rms"
    """``rms`` casts back before it multiplies with the weight; ``rms_wide`` after; ``zero_centred`` too, with 1 + weight; ``layer`` is LayerNorm, with bias."""
    inner: bool = False
    """It stands inside the attention; else a layer's own, whose output the layer holds until the module it goes into returns."""

    @property
    def tensors(self) -> Tensors:
        weight = ((f"{self.name}.weight", (self.width,)),)
        return (*weight, (f"{self.name}.bias", (self.width,))) if self.kind == "layer" else weight


@dataclass(frozen=True)
class Split(Part):
    """Views of one tensor, side by side: ``writes[i][T, widths[i]]`` share the memory of ``reads``."""

    reads: str
    writes: tuple[str, ...]
    widths: tuple[int, ...]
    sliced: bool = False
    """Cut out slice by slice, each of which has a backward pass of its own."""


@dataclass(frozen=True)
class Rotary(Part):
    """Rotary positions on one of queries and keys: ``heads`` of ``head_dim`` numbers, of which the first ``turned`` are turned and the rest copied."""

    reads: str
    writes: str
    heads: int
    head_dim: int
    turned: int
    kind: str = "halves"
    """``halves`` pairs number i with i + turned/2, by two products on the whole; ``wide`` the same with fp32 tables; ``joined`` joins what is turned with
    what is not; ``chunks`` makes four products on halves."""

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


@dataclass(frozen=True)
class Latent(Part):
    """What DeepSeek's latent attention puts together from compressed keys and values, each head [plain | turned] wide.

    Reads the query projection [T, heads * (plain + turned)], keys and values expanded from their latent [T, heads * (plain + value)] and the
    one key that is turned [T, turned], shared by all heads; writes ``query`` and ``key`` [T, heads * (plain + turned)]; ``value`` is a view.
    """

    query_from: str
    expanded: str
    turning: str
    query: str
    key: str
    value: str
    heads: int
    plain: int
    turned: int
    value_dim: int
    cached: int
    """Numbers a token leaves in the key-value cache: its latent and its turned key."""
    kind: str
    """``complex`` turns as complex numbers in fp32 (V2), ``pairs`` by four products on even and odd numbers (V3), ``halves`` as everybody else."""


@dataclass(frozen=True)
class Attention(Part):
    """Causal attention of ``heads`` queries on ``kv_heads`` keys ``head_dim`` wide and values ``value_dim`` wide (0: as wide)."""

    query: str
    key: str
    value: str
    writes: str
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int = 0
    window: int = 0
    """A token sees itself and the ``window - 1`` before it; 0: all before it."""
    capped: bool = False
    """Scores go through a tanh (soft-capping)."""
    sinks: bool = False
    """One trained number a head takes its share of the attention."""

    @property
    def tensors(self) -> Tensors:
        return (("self_attn.sinks", (self.heads,)),) if self.sinks else ()


@dataclass(frozen=True)
class Activation(Part):
    """A pointwise function (SiLU, GELU) that keeps its input for the backward pass."""

    reads: str
    writes: str
    width: int


@dataclass(frozen=True)
class Product(Part):
    """``left * right``, both kept for the backward pass."""

    left: str
    right: str
    writes: str
    width: int


@dataclass(frozen=True)
class Scale(Part):
    """``reads`` times a constant; keeps nothing."""

    reads: str
    writes: str
    width: int


@dataclass(frozen=True)
class Residual(Part):
    """``stream + branch``; keeps nothing."""

    stream: str
    branch: str
    writes: str
    width: int


@dataclass(frozen=True)
class Router(Part):
    """Chooses ``active`` of ``experts`` for every token and weighs them: reads [T, inputs], writes weights [T, active]."""

    name: str
    reads: str
    writes: str
    inputs: int
    experts: int
    active: int
    kind: str
    """``softmax`` (Qwen3, OLMoE), ``softmax_wide`` (Mixtral: weights stay fp32), ``top`` (gpt-oss: softmax over the chosen); wholly in fp32 ``greedy``
    and ``grouped`` (DeepSeek-V2) and ``sigmoid`` (DeepSeek-V3)."""
    normed: bool = False
    """The weights of the chosen are made to sum to one."""

    @property
    def tensors(self) -> Tensors:
        weight = ((f"{self.name}.weight", (self.experts, self.inputs)),)
        return (*weight, (f"{self.name}.bias", (self.experts,))) if self.kind == "top" else weight


@dataclass(frozen=True)
class Experts(Part):
    """Gated MLPs ``inner`` wide, kept as two 3-D parameters; each token goes through ``active`` of the ``experts``: [T, width] to [T, width].

    They are no linear layers: 4-bit loading leaves them as they are and LoRA on "all-linear" does not adapt them.
    """

    reads: str
    weights: str
    """The router's output."""
    writes: str
    width: int
    inner: int
    experts: int
    active: int
    wide_weights: bool
    """The router's weights are fp32."""
    clamped: bool = False
    """gpt-oss: weights the other way round, biases, gate and up interleaved and clamped, a sigmoid gate."""

    @property
    def tensors(self) -> Tensors:
        up, down = (2 * self.inner, self.width), (self.width, self.inner)
        if not self.clamped:
            return (("experts.gate_up_proj", (self.experts, *up)), ("experts.down_proj", (self.experts, *down)))
        return (("experts.gate_up_proj", (self.experts, *reversed(up))), ("experts.gate_up_proj_bias", (self.experts, up[0])),
                ("experts.down_proj", (self.experts, *reversed(down))), ("experts.down_proj_bias", (self.experts, self.width)))  # fmt: skip

    @property
    def active_parameters(self) -> int:
        """Numbers that one token meets."""
        return self.parameters * self.active // self.experts


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

    @property
    def experts(self) -> tuple[Experts, ...]:
        """The experts of one of these layers: one group or none."""
        return tuple(part for part in self.parts if isinstance(part, Experts))
