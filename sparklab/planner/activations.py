"""What each part of a layer holds and moves, forward and backward, in bytes per token: autograd acted out on a :class:`Tape`.

Every function below runs one kind of part forward and returns what its backward pass does. They follow the kernels that really run: stock
transformers blocks in ``compute_bytes`` per number, norms in fp32, PEFT adapters without autocast, per-document scaled dot-product attention
that keeps q, k, v, its output and one fp32 log-sum-exp per head. Gradients of tensor ``t`` are called ``d:t``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from sparklab.errors import ModelError
from sparklab.model.parts import Activation, Attention, Linear, Norm, Part, Product, Residual, Rotary
from sparklab.planner.tape import Tape

Backward = Callable[[Tape], None]
ATTENTION_ROWS: Final = 256  # rows of queries that attention block by block (windows, soft-capped scores, sinks) takes at once


@dataclass(frozen=True)
class Engine:
    """How the layers are run."""

    compute_bytes: int
    """Bytes of a number in the base: 2 (bf16) or 4 (fp32)."""
    adapter_bytes: int
    rank: int
    adapted: frozenset[str]
    """Names of the linear layers with an adapter."""
    train_base: bool
    """Full fine-tuning."""
    dropout_mask_bytes: int
    """Bytes a number of the mask that dropout on the adapters' input keeps: 1 on CUDA, the number's own size on a CPU; 0 without dropout."""
    joins_documents: bool = True
    """Attention runs document by document and copies the outputs into one tensor."""


@dataclass(frozen=True)
class LayerBytes:
    """One layer, bytes per token."""

    stream: float
    """The tensor between two layers."""
    kept: float
    """Held from the forward pass for the backward pass."""
    forward: float
    """Most held while running forward in training, input and what is kept included."""
    plain: float
    """Most held while running forward without gradients."""
    backward: tuple[float, ...]
    """Most held in each part's backward pass, last part first, what the layer kept included."""
    recompute: tuple[float, ...]
    """The same where the layer is checkpointed; the first figure is that of running forward again."""
    moved_forward: float
    """Memory traffic of the forward pass."""
    moved_backward: float
    """Memory traffic of the backward pass."""


@lru_cache(maxsize=512)
def layer_bytes(parts: tuple[Part, ...], engine: Engine, input_needs_grad: bool = True) -> LayerBytes:
    """Acts out one layer: forward with and without saving, backward from kept tensors, backward after recomputation."""
    stream = float(_width(parts) * engine.compute_bytes)
    carries = {"x"} if input_needs_grad else set()
    plain = Tape()
    plain.hold("x", stream)
    _forward(parts, plain, engine, False, set())

    train = Tape()
    train.hold("x", stream)
    start = train.moved
    undo = _forward(parts, train, engine, True, set(carries))
    train.drop("x")
    train.drop("y")
    kept, forward, moved_forward = train.now, train.peak, train.moved - start
    train.hold("d:y", stream)
    start = train.moved
    backward = _backward(undo, train)
    moved_backward = train.moved - start

    again = Tape()  # starts with the checkpoint and the gradient from above
    again.hold("x", stream)
    again.hold("d:y", stream)
    last = parts[-2]
    if isinstance(last, Linear) and last.name in engine.adapted:  # scaling needs no saved tensor, so it is done before the first one is asked for
        again.hold("scaled gradient", engine.adapter_bytes * last.outputs)
    undo = _forward(parts, again, engine, True, set(carries))
    recompute = again.peak
    _drop_all(again, "y", "scaled gradient")
    return LayerBytes(stream, kept, forward, plain.peak, backward, (recompute, *_backward(undo, again)), moved_forward, moved_backward)


def _width(parts: tuple[Part, ...]) -> int:
    last = parts[-1]
    assert isinstance(last, Residual), "a layer ends in its residual sum"
    return last.width


def _reads(part: Part) -> tuple[str, ...]:
    match part:
        case Attention():
            return (part.query, part.key, part.value)
        case Product():
            return (part.left, part.right)
        case Residual():
            return (part.stream, part.branch)
        case Linear() | Norm() | Rotary() | Activation():
            return (part.reads,)
        case _:
            return ()


def _forward(parts: tuple[Part, ...], tape: Tape, engine: Engine, saves: bool, grads: set[str]) -> list[Backward]:
    """Runs the parts; returns their backward passes. ``grads`` names the tensors that carry gradients and grows on the way."""
    last = {name: index for index, part in enumerate(parts) for name in _reads(part)}
    normed: list[str] = []
    undo: list[Backward] = []
    for index, part in enumerate(parts):
        undo.append(_run(part, tape, engine, saves, grads))
        if isinstance(part, Norm) and part.groups == 1:
            normed.append(part.writes)
        for name in _reads(part):
            # A norm's output stays in the layer's variable until the residual sum replaces it; the layer's input stays with the caller.
            if last[name] == index and name != "x" and name not in normed:
                tape.drop(name)
        if isinstance(part, Residual):
            for name in normed:
                tape.drop(name)
            normed.clear()
    return undo


def _backward(undo: list[Backward], tape: Tape) -> tuple[float, ...]:
    """Runs the backward passes, last part first; the most held in each."""
    peaks = []
    for step in reversed(undo):
        tape.peak = tape.now
        step(tape)
        peaks.append(tape.peak)
    return tuple(peaks)


def _run(part: Part, tape: Tape, engine: Engine, saves: bool, grads: set[str]) -> Backward:
    match part:
        case Linear():
            return _linear(part, tape, engine, saves, grads)
        case Norm():
            return _norm(part, tape, engine, saves, grads)
        case Rotary():
            return _rotary(part, tape, engine, grads)
        case Attention():
            return _attention(part, tape, engine, saves, grads)
        case Activation() | Product():
            return _pointwise(part, tape, engine, saves, grads)
        case Residual():
            return _residual(part, tape, engine, grads)
        case _:
            raise ModelError(f"what a {type(part).__name__} keeps for its backward pass is not known", "use a dense model of another family")


def _linear(part: Linear, tape: Tape, engine: Engine, saves: bool, grads: set[str]) -> Backward:
    """The matrix product, and PEFT's ``result + B(A(dropout(x))) * scaling`` beside it."""
    b, a = engine.compute_bytes, engine.adapter_bytes
    adapted, needs_grad = part.name in engine.adapted, part.reads in grads
    source, low, out = f"{part.name}:input", f"{part.name}:low", part.outputs
    tape.hold(part.writes, b * out)
    if adapted:
        _adapter_forward(part, tape, engine, needs_grad)
        if not saves:
            _drop_all(tape, source, source + ":dropped", low)
    if engine.train_base and saves:
        tape.share(source, part.reads)
    if adapted or engine.train_base or needs_grad:
        grads.add(part.writes)

    def backward(tape: Tape) -> None:
        gradient, below = f"d:{part.writes}", f"d:{part.reads}"
        if not tape.has(gradient):
            return
        if adapted:
            if a > b:
                tape.hold("cast", a * out)
            tape.hold("scaled", a * out)
            tape.hold("d:low", a * engine.rank)
            _drop_all(tape, "scaled", "cast", low)
            if needs_grad and a > b:
                tape.hold("wide", a * part.inputs)
                tape.accumulate(below, b * part.inputs)
                tape.drop("wide")
            elif needs_grad:
                tape.accumulate(below, b * part.inputs)
            _drop_all(tape, "d:low", source, source + ":dropped")
        if needs_grad:
            tape.accumulate(below, b * part.inputs)
        if engine.train_base:
            tape.drop(source)
        tape.drop(gradient)

    return backward


def _adapter_forward(part: Linear, tape: Tape, engine: Engine, needs_grad: bool) -> None:
    """``result + B(A(dropout(x))) * scaling``; the adapter's input and the low-rank tensor between A and B stay held."""
    b, a = engine.compute_bytes, engine.adapter_bytes
    source, low, out = f"{part.name}:input", f"{part.name}:low", part.outputs
    if a == b:
        tape.share(source, part.reads)
    else:  # PEFT casts the input for every target anew
        tape.hold(source, a * part.inputs)
    if engine.dropout_mask_bytes:  # the dropped input is a tensor of its own
        tape.hold(source + ":dropped", a * part.inputs)
        tape.drop(source)
        tape.hold(source, engine.dropout_mask_bytes * part.inputs if needs_grad else 0)
    tape.hold(low, a * engine.rank)
    tape.hold("delta", a * out)
    tape.hold("scaled", a * out)
    tape.drop("delta")
    tape.hold("sum", max(a, b) * out)
    tape.drop("scaled")
    tape.drop(part.writes)
    if a > b:
        tape.hold(part.writes, b * out)
    else:
        tape.share(part.writes, "sum")
    tape.drop("sum")


def _norm(part: Norm, tape: Tape, engine: Engine, saves: bool, grads: set[str]) -> Backward:
    """RMSNorm as transformers writes it: cast to fp32, square, mean, scale, cast back, times the weight."""
    b, width = engine.compute_bytes, part.width * part.groups
    low, needs_grad, trained = b < 4, part.reads in grads, engine.train_base
    wide, root, scaled = (f"{part.name}:{what}" for what in ("wide", "root", "scaled"))
    if low:
        tape.hold(wide, 4 * width)
    else:
        tape.share(wide, part.reads)
    tape.spike(4 * width)
    tape.hold(root, 4 * part.groups)
    tape.hold("fp32", 4 * width)
    if low:
        tape.hold(scaled, b * width)
    else:
        tape.share(scaled, "fp32")
    tape.hold(part.writes, b * width)
    tape.drop("fp32")
    if not (saves and trained):
        tape.drop(scaled)
    if not (saves and needs_grad):
        _drop_all(tape, wide, root)
    if needs_grad or trained:
        grads.add(part.writes)

    def backward(tape: Tape) -> None:
        gradient = f"d:{part.writes}"
        if not tape.has(gradient):
            return
        tape.hold("weighted", b * width)
        if trained:
            tape.spike(b * width)
            tape.drop(scaled)
        tape.drop(gradient)
        if needs_grad:
            if low:
                tape.hold("weighted:wide", 4 * width)
                tape.drop("weighted")
                tape.share("weighted", "weighted:wide")
                tape.drop("weighted:wide")
            tape.hold("d:wide", 4 * width)
            tape.spike(4 * width)
            tape.drop("weighted")
            tape.hold("d:square", 4 * width)
            tape.spike(4 * width)
            _drop_all(tape, "d:square", wide, root)
            tape.accumulate(f"d:{part.reads}", b * width)
            tape.drop("d:wide")
        else:
            tape.drop("weighted")

    return backward


def _rotary(part: Rotary, tape: Tape, engine: Engine, grads: set[str]) -> Backward:
    """``x * cos + rotate_half(x) * sin``; cos and sin are shared by all layers and kept outside."""
    size = part.width * engine.compute_bytes
    tape.hold("cosine", size)
    tape.hold("sine", size)
    tape.hold(part.writes, size)
    tape.drop("cosine")
    tape.drop("sine")
    if part.reads in grads:
        grads.add(part.writes)

    def backward(tape: Tape) -> None:
        if tape.has(f"d:{part.writes}"):
            tape.hold("halves", 2 * size)
            tape.accumulate(f"d:{part.reads}", size)
            tape.drop("halves")
            tape.drop(f"d:{part.writes}")

    return backward


def _attention(part: Attention, tape: Tape, engine: Engine, saves: bool, grads: set[str]) -> Backward:
    """Flash-style attention, one document after the other; nothing quadratic is ever held."""
    queries, keys = (heads * part.head_dim * engine.compute_bytes for heads in (part.heads, part.kv_heads))
    reads = (part.query, part.key, part.value)
    sizes = dict(zip(reads, (queries, keys, keys), strict=True))
    out, kept = f"{part.writes}:out", f"{part.writes}:kept"
    needs_grad = any(name in grads for name in reads)
    tape.hold(out, queries)
    tape.hold(f"{part.writes}:lse", 4 * part.heads)
    if engine.joins_documents:
        tape.hold(part.writes, queries)
    else:
        tape.share(part.writes, out)
    if needs_grad and saves:
        for name in reads:
            tape.share(f"{kept}:{name}", name)
        grads.add(part.writes)
    else:
        _drop_all(tape, out, f"{part.writes}:lse")

    def backward(tape: Tape) -> None:
        gradient = f"d:{part.writes}"
        if not tape.has(gradient):
            return
        if engine.joins_documents:  # the documents' gradients, before they are joined
            tape.hold("pieces", sum(sizes.values()))
        for name, size in sizes.items():
            if name in grads:
                tape.accumulate(f"d:{name}", size)
        _drop_all(tape, "pieces", out, f"{part.writes}:lse", *(f"{kept}:{name}" for name in reads))
        tape.drop(gradient)

    return backward


def _pointwise(part: Activation | Product, tape: Tape, engine: Engine, saves: bool, grads: set[str]) -> Backward:
    """An activation or a product, which keeps all it reads."""
    reads, writes, size = _reads(part), part.writes, part.width * engine.compute_bytes
    needs_grad = any(name in grads for name in reads)
    tape.hold(writes, size)
    if needs_grad:
        grads.add(writes)
        if saves:
            for name in reads:
                tape.share(f"{writes}:kept:{name}", name)

    def backward(tape: Tape) -> None:
        if not tape.has(f"d:{writes}"):
            return
        for name in reads:
            tape.accumulate(f"d:{name}", size)
        _drop_all(tape, *(f"{writes}:kept:{name}" for name in reads))
        tape.drop(f"d:{writes}")

    return backward


def _residual(part: Residual, tape: Tape, engine: Engine, grads: set[str]) -> Backward:
    """The sum keeps nothing; its gradient goes both ways without a copy."""
    tape.hold(part.writes, part.width * engine.compute_bytes)
    ways = [name for name in (part.stream, part.branch) if name in grads]
    if ways:
        grads.add(part.writes)

    def backward(tape: Tape) -> None:
        if not tape.has(f"d:{part.writes}"):
            return
        for name in ways:
            tape.share(f"d:{name}", f"d:{part.writes}")
        tape.drop(f"d:{part.writes}")

    return backward


def _drop_all(tape: Tape, *names: str) -> None:
    """Drops those of ``names`` that are held."""
    for name in names:
        if tape.has(name):
            tape.drop(name)
