"""sparklab's own kernels (``engine="fast"``), acted out as in :mod:`sparklab.planner.kernels`: one function does what transformers and PEFT do in many.

:func:`fuse` puts them in the place of the parts that they take over, as :func:`sparklab.engine.fast.fit` puts the real ones into the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from sparklab.model.parts import Activation, Experts, Linear, Norm, Part, Product, Rotary, Tensors
from sparklab.planner import kernels
from sparklab.planner.frozen_experts import FrozenExperts
from sparklab.planner.kernels import Backward, Engine
from sparklab.planner.tape import Tape

NORM_BLOCK: Final = 2**19  # numbers that a norm on a CPU has in fp32 at once


@dataclass(frozen=True)
class Linears(Part):
    """Linear layers with adapters that read the same tensor: one function (:mod:`sparklab.engine.lora`), which runs where the first of them stands."""

    members: tuple[Linear, ...]

    @property
    def reads(self) -> str:
        return self.members[0].reads

    @property
    def tensors(self) -> Tensors:
        return tuple(tensor for member in self.members for tensor in member.tensors)


@dataclass(frozen=True)
class GatedMlp(Part):
    """``down(act(gate(x)) * up(x))`` with adapters on all three (:mod:`sparklab.engine.mlp`)."""

    gate: Linear
    up: Linear
    down: Linear

    @property
    def reads(self) -> str:
        return self.gate.reads

    @property
    def writes(self) -> str:
        return self.down.writes

    @property
    def members(self) -> tuple[Linear, ...]:
        return (self.gate, self.up, self.down)

    @property
    def tensors(self) -> Tensors:
        return tuple(tensor for member in self.members for tensor in member.tensors)


@dataclass(frozen=True)
class FrozenMlp(GatedMlp):
    """The same without adapters (:mod:`sparklab.engine.frozen_mlp`)."""


def linears_of(part: Part) -> tuple[Linear, ...]:
    """The linear layers in a part."""
    return (part,) if isinstance(part, Linear) else part.members if isinstance(part, (Linears, GatedMlp)) else ()


def fuse(parts: tuple[Part, ...], engine: Engine) -> tuple[Part, ...]:
    """The parts of a layer as the fast engine runs them; as they are where the libraries' own code runs."""
    if not engine.fast or engine.train_base:
        return parts
    parts = with_frozen_mlps(parts, engine.adapted)
    if not engine.expert_rank:
        parts = tuple(FrozenExperts(**vars(part)) if type(part) is Experts else part for part in parts)
    if engine.dropout_mask_bytes or engine.dora:
        return parts
    found: list[Part] = []
    taken: set[int] = set()
    for place, part in enumerate(parts):
        if place in taken:
            continue
        if not (isinstance(part, Linear) and part.name in engine.adapted):
            found.append(part)
            continue
        if (gated := _gated(parts[place : place + 5], engine)) is not None:
            found.append(gated)
            taken.update(range(place, place + 5))
            continue
        group = [other for other, one in enumerate(parts) if isinstance(one, Linear) and one.name in engine.adapted and one.reads == part.reads]
        taken.update(group)
        found.append(Linears(tuple(one for one in (parts[other] for other in group) if isinstance(one, Linear))))
    return tuple(found)


def with_frozen_mlps(parts: tuple[Part, ...], adapted: frozenset[str]) -> tuple[Part, ...]:
    """Gated MLPs without adapters as one part each."""
    for place in range(len(parts)):
        match parts[place : place + 5]:
            case (Linear() as gate, Activation(), Linear() as up, Product(), Linear() as down):
                if gate.name == "gate_proj" and not adapted & {gate.name, up.name, down.name}:
                    return (*parts[:place], FrozenMlp(gate, up, down), *with_frozen_mlps(parts[place + 5 :], adapted))
    return parts


def _gated(parts: tuple[Part, ...], engine: Engine) -> GatedMlp | None:
    match parts:
        case (Linear() as gate, Activation(), Linear() as up, Product(), Linear() as down):
            if engine.adapted >= {gate.name, up.name, down.name} and gate.name == "gate_proj":
                return GatedMlp(gate, up, down)
    return None


def _unpacked(part: Linear, engine: Engine) -> tuple[float, float]:
    """Bytes a token of a 4-bit weight while it is unpacked, and of its constants."""
    numbers = part.inputs * part.outputs / engine.tokens
    return (0.0 if engine.unpacks_into_buffer else engine.unpacked_bytes * numbers), engine.constant_bytes * numbers


def _base(part: Linear, tape: Tape, engine: Engine, name: str, size: float) -> None:
    """The base's product into a new tensor; a 4-bit weight is whole while it runs."""
    unpacked, constants = _unpacked(part, engine)
    if unpacked:
        tape.unpack(unpacked, constants)
    tape.hold(name, size)
    tape.pack()


def _into(part: Linear, tape: Tape, engine: Engine, size: float) -> None:
    """The base's product added into a tensor that is there."""
    unpacked, constants = _unpacked(part, engine)
    if unpacked:
        tape.unpack(unpacked, constants)
    tape.moved += 2 * size
    tape.pack()


def linears(part: Linears, tape: Tape, engine: Engine, saves: bool, grads: set[str]) -> Backward:
    """Forward now, backward as what is returned: it runs when the gradients of all outputs are there."""
    b, members = engine.compute_bytes, part.members
    needs_grad = part.reads in grads
    keeps = f"{members[0].name}:kept"
    tape.hold(f"{keeps}:low", b * engine.rank * len(members))
    for member in members:
        _base(member, tape, engine, member.writes, b * member.outputs)
        grads.add(member.writes)
    tape.marked = tape.peak
    if saves:
        tape.share(f"{keeps}:input", part.reads)
    else:
        tape.drop(f"{keeps}:low")

    def backward(tape: Tape) -> None:
        gradients = [f"d:{member.writes}" for member in members]
        tape.hold("d:low", b * engine.rank * len(members))
        if needs_grad:
            first, *others = members
            _base(first, tape, engine, "d:input", b * first.inputs)
            for member in others:
                _into(member, tape, engine, b * member.inputs)
        tape.drop_any("d:low", f"{keeps}:input", f"{keeps}:low", *gradients)
        if needs_grad:
            tape.view("d:input")
            tape.merge(f"d:{part.reads}", "d:input")

    return backward


def gated_mlp(part: GatedMlp, tape: Tape, engine: Engine, saves: bool, grads: set[str]) -> Backward:
    """Keeps x, gate and up, and the low-rank tensors; what the activation makes and its product with up are made again."""
    b, rank, inner = engine.compute_bytes, engine.rank, engine.compute_bytes * part.gate.outputs
    needs_grad, keeps = part.reads in grads, "mlp:kept"
    tape.hold(f"{keeps}:low", 2 * b * rank)
    _base(part.gate, tape, engine, f"{keeps}:gate", inner)
    _base(part.up, tape, engine, f"{keeps}:up", inner)
    tape.hold("inner", inner)
    tape.hold(f"{keeps}:low", b * rank)
    _base(part.down, tape, engine, part.writes, b * part.down.outputs)
    tape.drop("inner")
    tape.marked = tape.peak
    grads.add(part.writes)
    if saves:
        tape.share(f"{keeps}:input", part.reads)
    else:
        tape.drop_any(*(f"{keeps}:{what}" for what in ("low", "low", "gate", "up")))

    def backward(tape: Tape) -> None:
        tape.hold("d:low", b * rank)
        _base(part.down, tape, engine, "d:up", inner)  # of the product, first
        tape.hold("activated", inner)
        tape.hold("d:gate", inner)  # the product, first
        tape.drop_any("activated", "d:low")
        tape.hold("d:low", 2 * b * rank)
        if needs_grad:
            _base(part.gate, tape, engine, "d:input", b * part.gate.inputs)
            _into(part.up, tape, engine, b * part.up.inputs)
        tape.drop_any("d:low", "d:up", "d:gate", *(f"{keeps}:{what}" for what in ("low", "low", "gate", "up", "input")), f"d:{part.writes}")
        if needs_grad:
            tape.view("d:input")
            tape.merge(f"d:{part.reads}", "d:input")

    return backward


def frozen_mlp(part: FrozenMlp, tape: Tape, engine: Engine, saves: bool, grads: set[str]) -> Backward:
    """Keeps gate and up; the activation is made again, and both gradients take the memory of what they are made of."""
    b, inner = engine.compute_bytes, engine.compute_bytes * part.gate.outputs
    needs_grad, keeps = part.reads in grads, "mlp:kept"
    _base(part.gate, tape, engine, f"{keeps}:gate", inner)
    _base(part.up, tape, engine, f"{keeps}:up", inner)
    tape.hold("inner", inner)
    _base(part.down, tape, engine, part.writes, b * part.down.outputs)
    tape.drop("inner")
    tape.marked = tape.peak
    if needs_grad:
        grads.add(part.writes)
    if not (needs_grad and saves):
        tape.drop_any(f"{keeps}:gate", f"{keeps}:up")

    def backward(tape: Tape) -> None:
        if not needs_grad:
            return
        _base(part.down, tape, engine, "d:gate", inner)
        tape.hold("d:up", inner)
        _base(part.gate, tape, engine, "d:input", b * part.gate.inputs)
        _into(part.up, tape, engine, b * part.up.inputs)
        tape.drop_any("d:up", "d:gate", f"{keeps}:gate", f"{keeps}:up", f"d:{part.writes}")
        tape.view("d:input")
        tape.merge(f"d:{part.reads}", "d:input")

    return backward


def norm(part: Norm, tape: Tape, engine: Engine, saves: bool, grads: set[str]) -> Backward:
    """RMSNorm (:mod:`sparklab.engine.norm`): keeps its input, shared, and one fp32 number a row; works in blocks of rows on a CPU."""
    if part.kind == "layer":
        return kernels.norm(part, tape, engine, saves, grads)
    b, width = engine.compute_bytes, part.width * part.groups
    block = float(width) if engine.on_gpu else min(width, NORM_BLOCK / engine.tokens)
    needs_grad, root = part.reads in grads, f"{part.name}:root"
    tape.hold(part.writes, b * width)
    tape.hold(root, 4 * part.groups)
    tape.spike(4 * block)
    kept = kernels.keep_input(part, root, tape, engine, saves, grads)

    def backward(tape: Tape) -> None:
        if not tape.has(f"d:{part.writes}"):
            return
        if needs_grad:
            tape.hold("d:input", b * width, viewed=True)
        tape.spike((8 + (4 if b < 4 else 0)) * block)  # of an fp32 input, wide is the input itself
        tape.drop_any(kept, root, f"d:{part.writes}")
        if needs_grad:
            tape.merge(f"d:{part.reads}", "d:input")

    return backward


def rotary(part: Rotary, tape: Tape, engine: Engine, saves: bool, grads: set[str]) -> Backward:
    """Rotary positions (:mod:`sparklab.engine.rotary`): one new tensor forward, one backward; the tables are kept outside."""
    if part.kind != "halves" or part.turned != part.head_dim:
        return kernels.rotary(part, tape, engine, saves, grads)
    size = part.width * engine.compute_bytes
    tape.hold(part.writes, size)
    if part.reads in grads:
        grads.add(part.writes)

    def backward(tape: Tape) -> None:
        if tape.has(f"d:{part.writes}"):
            tape.hold("d:turned", size, viewed=True)
            tape.drop(f"d:{part.writes}")
            tape.merge(f"d:{part.reads}", "d:turned")

    return backward
