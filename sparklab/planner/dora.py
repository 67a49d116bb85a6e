"""A linear layer with DoRA, acted out as PEFT runs it: ``(m / |W + sBA|) * (W x + s B A x)``, the norm taken anew in every pass.

For the norm PEFT multiplies the identity [in, in] by A and by B, and holds that product [out, in] with its graph until the layer is done; beside it
stand the scaled product and its sum with the weight. Kept for the backward pass are, beside LoRA's, the base's output and the adapter's, from
which the magnitudes' gradients come.
"""

from __future__ import annotations

from sparklab.model.parts import Linear
from sparklab.planner.kernels import Backward, Engine
from sparklab.planner.tape import Tape


def linear(part: Linear, tape: Tape, engine: Engine, saves: bool, grads: set[str]) -> Backward:
    """Forward now, backward as what is returned."""
    b, a = engine.compute_bytes, engine.adapter_bytes
    out, needs_grad = part.outputs, part.reads in grads
    source, low, base, adapter = (f"{part.name}:{what}" for what in ("input", "low", "base", "adapter"))
    tape.hold(base, b * out)
    _unpack(part, tape, engine)
    if a == b:
        tape.share(source, part.reads)
    else:
        tape.hold(source, a * part.inputs)
    if engine.dropout_mask_bytes:
        tape.hold(source + ":dropped", a * part.inputs)
        tape.drop(source)
        tape.hold(source, engine.dropout_mask_bytes * part.inputs if needs_grad else 0)
    numbers = part.inputs * out / engine.tokens
    tape.hold("graph", a * (part.inputs * part.inputs / engine.tokens + numbers))
    wide = max(a, b) * numbers + (a * numbers if a != b else 0)
    if engine.unpacked_bytes:
        tape.hold("unpacked weight", engine.unpacked_bytes * numbers)
    tape.spike(wide + 2 * max(a, b) * numbers)
    tape.hold(low, a * engine.rank)
    tape.marked = tape.peak
    tape.hold(adapter, a * out)
    tape.hold("kept base", a * out) if engine.dropout_mask_bytes or part.bias or a != b else tape.share("kept base", base)
    tape.hold("first", a * out)
    tape.hold("second", a * out)
    tape.spike(a * out)
    tape.hold("sum", a * out)
    tape.drop_any("first", "second", "graph", "unpacked weight")
    tape.hold("whole", max(a, b) * out)
    tape.drop_any("sum", base)
    if a > b:
        tape.hold(part.writes, b * out)
    else:
        tape.share(part.writes, "whole")
    tape.drop("whole")
    tape.hold(f"{part.name}:norms", 3 * a * out / engine.tokens)  # |W + sBA|, m over it, and that less one
    kept = (source, source + ":dropped", low, adapter, f"{part.name}:norms")
    if saves:
        tape.share(f"{part.name}:kept base", "kept base")
    else:
        tape.drop_any(*kept)
    tape.drop("kept base")
    grads.add(part.writes)

    return _backward(part, engine, needs_grad)


def _backward(part: Linear, engine: Engine, needs_grad: bool) -> Backward:
    b, a, out = engine.compute_bytes, engine.adapter_bytes, part.outputs
    source, low, adapter = (f"{part.name}:{what}" for what in ("input", "low", "adapter"))

    def backward(tape: Tape) -> None:
        gradient, below = f"d:{part.writes}", f"d:{part.reads}"
        if not tape.has(gradient):
            return
        if a > b:
            tape.hold("cast", a * out)
        tape.hold("scaled", a * out)
        tape.spike(2 * a * out)
        tape.hold("d:adapter", a * out)
        tape.drop_any("scaled", adapter)
        tape.hold("d:base", b * out)
        tape.spike(2 * a * out)
        tape.drop_any("cast", f"{part.name}:kept base", f"{part.name}:norms")
        tape.hold("d:low", a * engine.rank)
        tape.drop_any("d:adapter", low)
        if needs_grad:
            tape.hold("wide", a * part.inputs)
            tape.accumulate(below, b * part.inputs)
            tape.drop("wide")
        tape.drop_any("d:low", source, source + ":dropped")
        if needs_grad:
            _unpack(part, tape, engine)
            tape.accumulate(below, b * part.inputs)
        tape.drop_any("d:base", gradient)

    return backward


def _unpack(part: Linear, tape: Tape, engine: Engine) -> None:
    """A 4-bit weight in the type that computes, and gone again."""
    numbers = part.inputs * part.outputs / engine.tokens
    if engine.unpacked_bytes:
        tape.unpack(engine.unpacked_bytes * numbers, engine.constant_bytes * numbers)
        tape.pack()
