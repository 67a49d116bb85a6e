"""Kinds of parts, acted out on a :class:`Tape`: what each holds while it runs forward and backward, in bytes per token.

Every function runs one part forward and returns what its backward pass does, in the order in which transformers' modules and torch's autograd
make and drop their tensors. Gradients of tensor ``t`` are called ``d:t``; ``grads`` names the tensors that carry one and grows on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

from sparklab.model.parts import Activation, Attention, Block, Linear, Norm, Part, Product, Residual, Rotary, Router, Scale, Split
from sparklab.planner.cpu_attention import backward_bytes, forward_bytes, kept_bytes
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
    fast: bool = field(default=False, kw_only=True)
    """sparklab's own kernels (:mod:`sparklab.planner.fused`) and not the libraries' code."""
    dora: bool = field(default=False, kw_only=True)
    """Adapters with magnitudes of their own."""
    on_gpu: bool = field(default=False, kw_only=True)
    expert_rank: int = field(default=0, kw_only=True)
    """Rank of the adapters on experts; 0 without."""
    dropout_mask_bytes: int
    """Bytes a number of the mask that dropout on the adapters' input keeps: 1 on CUDA, the number's own size on a CPU; 0 without dropout."""
    joins_documents: bool = False
    """Attention's output is copied before its projection."""
    autocast: bool = False
    """Adapters in fp32 run in bf16: each keeps a bf16 copy of its input and no wider tensor, as stock PEFT under ``torch.autocast``."""
    repeats_heads: bool = False
    """Attention with a padding mask: keys and values are repeated for every query head."""
    unpacked_bytes: float = 0.0
    """Bytes of a number of a 4-bit weight while it is unpacked; 0: the base is not in 4 bits."""
    unpacks_into_buffer: bool = False
    """Our kernels unpack into a buffer that is always there."""
    constant_bytes: float = 0.0
    """Bytes a number of its constants, unpacked before it; 0 where they are fp32 already."""
    keeps_unpacked_inputs: bool = False
    """Products with 4-bit weights keep their input, which they never look at again: bitsandbytes did until 0.46."""
    tokens: int = 1
    """Tokens in a row: what is held however many there are is shared out among them."""
    longest: int = 1
    """Tokens in the longest document."""
    long_apart: bool = field(default=False, kw_only=True)
    """A GPU may take long documents apart."""
    masked: bool = field(default=False, kw_only=True)
    """A batch of prompts with a padding mask, by the library's attention, whose own memory is counted apart."""


def linear(part: Linear, tape: Tape, engine: Engine, saves: bool, grads: set[str]) -> Backward:
    """The matrix product, and PEFT's ``result + B(A(dropout(x))) * scaling`` beside it."""
    b, a = engine.compute_bytes, engine.adapter_bytes
    adapted, needs_grad = part.name in engine.adapted, part.reads in grads
    source, low, out = f"{part.name}:input", f"{part.name}:low", part.outputs
    numbers = part.inputs * part.outputs / engine.tokens  # of a weight, shared out among the tokens
    unpacked, constants = engine.unpacked_bytes * numbers, engine.constant_bytes * numbers
    tape.hold(part.writes, b * out)
    if unpacked:
        tape.unpack(unpacked, constants)
        tape.pack()
    if adapted:
        _adapter_forward(part, tape, engine, needs_grad)
        if not saves:
            tape.drop_any(source, source + ":dropped", low)
    idle = f"{part.name}:idle"
    if engine.train_base and saves:
        tape.share(source, part.reads)
    if engine.keeps_unpacked_inputs and unpacked and needs_grad and saves:
        tape.share(idle, part.reads)
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
            tape.drop_any("scaled", "cast", low)
            if needs_grad and a > b:
                tape.hold("wide", a * part.inputs)
                tape.accumulate(below, b * part.inputs)
                tape.drop("wide")
            elif needs_grad:
                tape.accumulate(below, b * part.inputs, viewed=not engine.dropout_mask_bytes)
            tape.drop_any("d:low", source, source + ":dropped")
        if needs_grad:
            if unpacked:
                tape.unpack(unpacked, constants)
            tape.hold("base's share", b * part.inputs, viewed=not unpacked)
            tape.pack()
        if engine.train_base:
            tape.drop(source)
        tape.drop_any(idle, gradient)  # the product is done before its share is added up
        if needs_grad:
            tape.merge(below, "base's share")

    return backward


def _adapter_forward(part: Linear, tape: Tape, engine: Engine, needs_grad: bool) -> None:
    """``result + B(A(dropout(x))) * scaling``; the adapter's input and the low-rank tensor between A and B stay held."""
    b, a = engine.compute_bytes, engine.adapter_bytes
    source, low, out = f"{part.name}:input", f"{part.name}:low", part.outputs
    if a == b and not engine.autocast:
        tape.share(source, part.reads)
    else:  # PEFT casts the input for every target anew
        tape.hold(source, a * part.inputs)
    if engine.dropout_mask_bytes:  # the dropped input is a tensor of its own
        tape.hold(source + ":dropped", a * part.inputs)
        tape.share("undropped", source)  # PEFT's own variable, until it returns
        tape.drop(source)
        tape.hold(source, engine.dropout_mask_bytes * part.inputs if needs_grad else 0)
    tape.hold(low, a * engine.rank)
    tape.marked = tape.peak
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
    tape.drop_any("undropped")


def norm(part: Norm, tape: Tape, engine: Engine, saves: bool, grads: set[str]) -> Backward:
    """RMSNorm as transformers writes it: cast to fp32, square, mean, scale; then cast back and times the weight, or the other way round."""
    if part.kind == "layer":
        return _layer_norm(part, tape, engine, saves, grads)
    b, width = engine.compute_bytes, part.width * part.groups
    low, needs_grad, trained, late = b < 4, part.reads in grads, engine.train_base, part.kind != "rms"
    wide, root, scaled = (f"{part.name}:{what}" for what in ("wide", "root", "scaled"))
    if low:
        tape.hold(wide, 4 * width)
    else:
        tape.share(wide, part.reads)
    tape.spike(4 * width)
    tape.hold(root, 4 * part.groups)
    tape.hold("fp32", 4 * width)
    if low and not late:
        tape.hold(scaled, b * width)
    else:
        tape.share(scaled, "fp32")
    if late:  # the product with the weight is fp32 too, and cast back last
        if not (saves and trained):
            tape.drop(scaled)
        tape.hold("weighted", 4 * width)
        tape.drop("fp32")
        tape.hold(part.writes, b * width) if low else tape.share(part.writes, "weighted")
        tape.drop("weighted")
    else:
        tape.hold(part.writes, b * width)
        tape.drop("fp32")
        if not (saves and trained):
            tape.drop(scaled)
    if not (saves and needs_grad):
        tape.drop_any(wide, root)
    if needs_grad or trained:
        grads.add(part.writes)

    return _norm_backward(part, engine, needs_grad)


def _norm_backward(part: Norm, engine: Engine, needs_grad: bool) -> Backward:
    b, width, late = engine.compute_bytes, part.width * part.groups, part.kind != "rms"
    low, trained = b < 4, engine.train_base
    wide, root, scaled = (f"{part.name}:{what}" for what in ("wide", "root", "scaled"))

    def backward(tape: Tape) -> None:
        gradient = f"d:{part.writes}"
        if not tape.has(gradient):
            return
        if late and low:
            tape.replace(gradient, 4 * width)
        tape.hold("weighted", (4 if late else b) * width)
        if trained:
            tape.spike((4 if late else b) * width)
            tape.drop(scaled)
        tape.drop(gradient)
        if needs_grad:
            if low and not late:
                tape.replace("weighted", 4 * width)
            tape.hold("d:wide", 4 * width)
            tape.spike(4 * width)
            tape.drop("weighted")
            tape.hold("d:mean", 4 * width)
            tape.spike(3 * 4 * width)  # the square's derivative: a power, twice it, the product
            tape.drop_any("d:mean", wide, root)
            tape.accumulate(f"d:{part.reads}", b * width)
            tape.drop("d:wide")
        else:
            tape.drop("weighted")

    return backward


def keep_input(part: Norm, moments: str, tape: Tape, engine: Engine, saves: bool, grads: set[str]) -> str:
    """A norm in one function keeps its input and its ``moments``, which are held already, where a gradient comes back; the name of the input kept."""
    if part.reads in grads or engine.train_base:
        grads.add(part.writes)
    if saves and part.writes in grads:
        tape.share(f"{part.name}:input", part.reads)
    else:
        tape.drop(moments)
    return f"{part.name}:input"


def _layer_norm(part: Norm, tape: Tape, engine: Engine, saves: bool, grads: set[str]) -> Backward:
    """LayerNorm, one kernel: keeps its input, a mean and a deviation."""
    b, width = engine.compute_bytes, part.width
    needs_grad = part.reads in grads
    moments = f"{part.name}:moments"
    tape.hold(part.writes, b * width)
    tape.hold(moments, 2 * b)
    kept = keep_input(part, moments, tape, engine, saves, grads)

    def backward(tape: Tape) -> None:
        if not tape.has(f"d:{part.writes}"):
            return
        if needs_grad:
            tape.accumulate(f"d:{part.reads}", b * width)
        tape.drop_any(f"d:{part.writes}", kept, moments)

    return backward


def rotary(part: Rotary, tape: Tape, engine: Engine, saves: bool, grads: set[str]) -> Backward:
    """``x * cos + rotate_half(x) * sin`` on the turned part; cos and sin are shared by all layers and kept outside."""
    size = part.width * engine.compute_bytes
    turned = size * part.turned / part.head_dim
    work = part.width * 4.0 if part.kind == "wide" else turned  # fp32 tables make fp32 products
    tape.hold("cosine", work)
    tape.hold("sine", work)
    if part.kind in ("wide", "joined"):
        tape.hold("sum", work)
        tape.drop_any("cosine", "sine")
        tape.hold(part.writes, size)
        tape.drop("sum")
    else:
        tape.hold(part.writes, size)
        tape.drop_any("cosine", "sine")
    if part.reads in grads:
        grads.add(part.writes)

    def backward(tape: Tape) -> None:
        if not tape.has(f"d:{part.writes}"):
            return
        if part.kind == "wide":
            tape.replace(f"d:{part.writes}", work)
            tape.spike(work + size)
        tape.hold("halves", 2 * turned)
        tape.accumulate(f"d:{part.reads}", size)
        if part.kind == "joined":  # the turned and the other part each come back as long as the whole
            tape.spike(size)
        tape.drop("halves")
        tape.drop(f"d:{part.writes}")

    return backward


def split(part: Split, tape: Tape, engine: Engine, saves: bool, grads: set[str]) -> Backward:
    """Views: nothing new forward; backward the pieces are joined at once, or one slice after the other is added to a tensor as long as the whole."""
    whole = sum(part.widths) * engine.compute_bytes
    for name in part.writes:
        tape.share(name, part.reads)
        if part.reads in grads:
            grads.add(name)

    def backward(tape: Tape) -> None:
        pieces = [f"d:{name}" for name in reversed(part.writes) if tape.has(f"d:{name}")]
        if not pieces:
            return
        if part.sliced:
            for piece in pieces:
                tape.accumulate(f"d:{part.reads}", whole)
                tape.drop(piece)
        else:
            tape.accumulate(f"d:{part.reads}", whole)
            tape.drop_any(*pieces)

    return backward


def scale(part: Scale, tape: Tape, engine: Engine, saves: bool, grads: set[str]) -> Backward:
    """A product with a constant keeps nothing."""
    size = part.width * engine.compute_bytes
    tape.hold(part.writes, size)
    if part.reads in grads:
        grads.add(part.writes)

    def backward(tape: Tape) -> None:
        if tape.has(f"d:{part.writes}"):
            tape.accumulate(f"d:{part.reads}", size)
            tape.drop(f"d:{part.writes}")

    return backward


def attention(part: Attention, tape: Tape, engine: Engine, saves: bool, grads: set[str]) -> Backward:
    """Attention one document after the other; nothing quadratic is ever kept. Values narrower than keys are padded to their width.

    What a GPU does by flex_attention (:mod:`sparklab.engine.flex`), where that runs, is counted as block by block, which it falls back to.
    The result is written where the next layer reads it; it is copied there where a kernel of blocks gives one tensor a document, or a wider one.
    """
    b = engine.compute_bytes
    queries, keys = part.heads * part.head_dim * b, part.kv_heads * part.head_dim * b
    narrow = part.value_dim or part.head_dim
    sizes = {part.query: queries, part.key: keys, part.value: part.kv_heads * narrow * b}
    out, kept, padded = f"{part.writes}:out", f"{part.writes}:kept", narrow < part.head_dim
    needs_grad, blockwise = any(name in grads for name in sizes), _is_blockwise(part, engine)
    document = 0.0 if blockwise or engine.on_gpu else engine.longest / engine.tokens  # of the row, worked on apart
    if padded:
        tape.hold("padded", keys)
    row = (engine.tokens, engine.longest, part.heads, part.kv_heads, part.head_dim) if _is_by_products(part, engine) else None
    if row:  # latent heads do not lie as linears write them
        tape.spike(forward_bytes(*row) / engine.tokens + (queries + 2 * keys if padded else 0))
    tape.hold(out, queries)
    tape.hold(f"{part.writes}:lse", 4 * part.heads)
    tape.spike(queries + 4 * part.heads if row else _block_bytes(part, engine, b + 4) + document * queries, some=2 * _apart_bytes(part, engine))
    if engine.joins_documents or blockwise or padded:
        tape.hold(part.writes, part.heads * narrow * b)
    else:
        tape.share(part.writes, out)
    repeated = queries if engine.repeats_heads and part.heads > part.kv_heads else 0
    tape.spike(2 * repeated)
    if needs_grad and saves:
        for name in sizes:
            if repeated and name != part.query:
                tape.hold(f"{kept}:{name}", repeated)
            else:
                tape.share(f"{kept}:{name}", "padded" if padded and name == part.value else name)
        grads.add(part.writes)
    else:
        tape.drop_any(out, f"{part.writes}:lse")
    tape.drop_any("padded")

    def backward(tape: Tape) -> None:
        gradient = f"d:{part.writes}"
        if not tape.has(gradient):
            return
        if padded:
            tape.hold("padded gradient", queries)
            tape.drop(gradient)
        if blockwise:  # the documents' gradients, before they are joined
            tape.hold("pieces", queries + 2 * (repeated or keys))
            tape.spike(_block_bytes(part, engine, 3 * 4 + b) + 2 * (4 - b) * keys / b * engine.longest / engine.tokens)  # sums for keys and values are fp32
        if row:  # the gradients are laid out when all are made
            tape.spike(backward_bytes(*row) / engine.tokens)
        for name, size in sizes.items():
            if padded and name == part.value:
                tape.spike(keys)
            if name in grads:
                tape.accumulate(f"d:{name}", size)
        wider = keys - sizes[part.value] if padded and not blockwise else 0  # the values' gradient, until it is cut to their width
        tape.spike((queries + 2 * keys) * (1 if row else document) + wider, some=4 * _apart_bytes(part, engine))
        tape.drop_any("pieces", out, f"{part.writes}:lse", "padded gradient", gradient, *(f"{kept}:{name}" for name in sizes))

    return backward


def _is_blockwise(part: Attention, engine: Engine) -> bool:
    """Whether scores are made block by block: soft-capped ones, those with sinks, and on a CPU those of a window shorter than a document."""
    return bool(part.capped or part.sinks or (0 < part.window < engine.longest and not engine.on_gpu))


def _apart_bytes(part: Attention, engine: Engine) -> float:
    """Of a long document done apart, as if it were the row: queries and keys once. Its output and its gradients are there twice until they are in the
    row's, and it is filled up."""
    plain = engine.long_apart and not (engine.masked or part.window or _is_blockwise(part, engine))
    return float(engine.compute_bytes * part.head_dim * (part.heads + part.kv_heads)) if plain else 0.0


def _is_by_products(part: Attention, engine: Engine) -> bool:
    return engine.compute_bytes == 2 and not engine.on_gpu and not engine.masked and not _is_blockwise(part, engine)


def kept_with_row(blocks: Iterable[Block], engine: Engine) -> int:
    """Bytes that attention by products keeps with a row, for every number of heads once."""
    parts = (part for block in blocks for part in block.parts if isinstance(part, Attention) and _is_by_products(part, engine))
    return sum(kept_bytes(engine.tokens, engine.longest, *heads) for heads in {(part.heads, part.kv_heads) for part in parts})


def has_fixed_bytes(parts: tuple[Part, ...]) -> bool:
    """Whether some bytes of these parts do not grow with the row: blocks of scores, a router's weight in fp32. (Unpacked weights are others.)"""
    return any(isinstance(part, Router) or (isinstance(part, Attention) and (part.window or part.capped or part.sinks)) for part in parts)


def _block_bytes(part: Attention, engine: Engine, each: int) -> float:
    """Scores of one block, ``each`` bytes, shared out among the row's tokens; 0 where one kernel does all."""
    if not _is_blockwise(part, engine):
        return 0.0
    window = part.window if part.window < engine.longest else 0
    rows = min(ATTENTION_ROWS, engine.longest)
    seen = min(engine.longest, window + rows - 1) if window else engine.longest
    return each * part.heads * rows * seen / engine.tokens


def pointwise(part: Activation | Product, tape: Tape, engine: Engine, saves: bool, grads: set[str]) -> Backward:
    """An activation or a product, which keeps all it reads."""
    reads = (part.reads,) if isinstance(part, Activation) else (part.left, part.right)
    writes, size = part.writes, part.width * engine.compute_bytes
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
        tape.drop_any(*(f"{writes}:kept:{name}" for name in reads))
        tape.drop(f"d:{writes}")

    return backward


def residual(part: Residual, tape: Tape, engine: Engine, saves: bool, grads: set[str]) -> Backward:
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
