"""Mixtures of experts and latent attention, acted out as in :mod:`sparklab.planner.kernels`: transformers' ``grouped_mm`` path and DeepSeek's heads.

Experts sort the tokens' ``active`` choices by expert and run each projection as one grouped product, so S = active x T rows are held.
"""

from __future__ import annotations

from typing import Final

from sparklab.model.parts import Experts, Latent, Router
from sparklab.planner import expert_adapters
from sparklab.planner.kernels import Backward, Engine
from sparklab.planner.tape import Tape

INDEX: Final = 8  # bytes of a place in a list


def router(part: Router, tape: Tape, engine: Engine, saves: bool, grads: set[str]) -> Backward:
    """Scores, the best of them, their weights: keeps the probabilities and the places of the chosen."""
    b, many, few = engine.compute_bytes, part.experts, part.active
    needs_grad, trained, keeps = part.reads in grads, engine.train_base, f"{part.writes}:kept"
    whole = part.kind in ("greedy", "grouped", "sigmoid")  # router and input in fp32
    weights = 4 if whole or part.kind == "softmax_wide" else b
    scores = 4 * many if whole else b * many
    weight = 4.0 * many * part.inputs / engine.tokens if whole and b < 4 else 0.0  # kept where there are gradients, however few the tokens
    if whole and b < 4:
        tape.hold(f"{keeps}:input", 4 * part.inputs)
    tape.hold(f"{keeps}:weight", weight)
    tape.hold("scores", scores)
    probabilities = 0 if part.kind == "top" else 4 * many
    if part.kind not in ("softmax", "top", "sigmoid", "greedy", "grouped"):
        tape.hold("scores:wide", 4 * many)
    tape.hold(f"{keeps}:probabilities", probabilities)
    if part.kind in ("grouped", "sigmoid"):
        tape.hold("masked", 2 * 4 * many + many)
    tape.hold(f"{keeps}:places", INDEX * few)
    tape.hold(part.writes, weights * few)
    tape.drop_any("masked", "scores:wide", "scores")
    if part.kind == "top":
        tape.share(f"{keeps}:weights", part.writes)
    if trained or needs_grad:
        grads.add(part.writes)
    if not (saves and part.writes in grads):
        tape.drop_any(*(f"{keeps}:{what}" for what in ("input", "weight", "probabilities", "places", "weights")))
    elif trained and not (whole and b < 4):
        tape.share(f"{keeps}:input", part.reads)
    elif not trained:
        tape.drop_any(f"{keeps}:input")

    def backward(tape: Tape) -> None:
        if not tape.has(f"d:{part.writes}"):
            return
        tape.hold("d:probabilities", probabilities)
        tape.drop(f"d:{part.writes}")
        tape.hold("d:scores", max(scores, 4 * many))
        tape.drop_any("d:probabilities", *(f"{keeps}:{what}" for what in ("probabilities", "places", "weights")))
        if needs_grad:
            if whole and b < 4:
                tape.hold("d:wide", 4 * part.inputs)
            tape.accumulate(f"d:{part.reads}", b * part.inputs)
        tape.drop_any("d:scores", "d:wide", f"{keeps}:input", f"{keeps}:weight")

    return backward


def experts(part: Experts, tape: Tape, engine: Engine, saves: bool, grads: set[str]) -> Backward:
    """Gate and up in one grouped product, the gate, down in another, weighed, put back in order and summed."""
    if engine.expert_rank:
        return expert_adapters.experts(part, tape, engine, saves, grads)
    b, s = engine.compute_bytes, part.active
    x = max(b, 4 if part.wide_weights else b)  # bytes of what is weighed
    wide, inner, rows = s * 2 * part.inner * b, s * part.inner * b, s * part.width
    keeps, trained = f"{part.writes}:kept", engine.train_base
    needs_grad = part.reads in grads or trained
    saves = saves and needs_grad
    tape.hold(f"{keeps}:order", INDEX * s * 3)  # by expert, the tokens they belong to, and back
    tape.hold(f"{keeps}:shares", s * (4 if part.wide_weights else b))
    tape.hold(f"{keeps}:sorted", rows * b)
    if part.clamped:
        tape.hold("biases", wide)
    tape.hold(f"{keeps}:gate_up", wide)
    gates = _gate(part, tape, keeps, inner)
    tape.hold(f"{keeps}:inner", inner)
    if not saves:
        tape.drop_any(*gates, f"{keeps}:gate_up")
    if part.clamped:
        tape.drop("biases")
        tape.hold("biases", rows * b)
    tape.hold(f"{keeps}:down", rows * b)
    if not (saves and trained):
        tape.drop(f"{keeps}:inner")
    tape.hold("weighed", rows * x)
    tape.marked = tape.peak
    if not saves:
        tape.drop(f"{keeps}:down")
    tape.hold("ordered", rows * x)
    tape.drop("weighed")
    tape.hold("sum", part.width * x)
    tape.hold(part.writes, part.width * b)
    tape.drop_any("sum", "ordered", "biases")
    if not (saves and trained):
        tape.drop(f"{keeps}:sorted")
    if needs_grad:
        grads.add(part.writes)
    if not saves:
        tape.drop_any(f"{keeps}:order", f"{keeps}:shares")

    return _experts_backward(part, engine, gates)


def _experts_backward(part: Experts, engine: Engine, gates: list[str]) -> Backward:
    b, s, keeps = engine.compute_bytes, part.active, f"{part.writes}:kept"
    x = max(b, 4 if part.wide_weights else b)
    wide, inner, rows = s * 2 * part.inner * b, s * part.inner * b, s * part.width

    def backward(tape: Tape) -> None:
        if not tape.has(f"d:{part.writes}"):
            tape.cut()
            tape.cut()
            return
        tape.hold("spread", rows * x)
        tape.drop(f"d:{part.writes}")
        tape.hold("d:weighed", rows * x)
        tape.spike(rows * x)  # zeros first, then a copy with the rows put in
        tape.drop("spread")
        tape.hold("shares", rows * x)  # what of the weights' gradient is still to be summed
        if x > b:  # the engine casts the first gradient before it sums the second
            tape.hold("wide", rows * x)
            if tape.recomputing:
                tape.drop_any(f"{keeps}:down")
        tape.hold("d:down", rows * b)
        tape.drop_any("wide", "shares")
        tape.accumulate(f"d:{part.weights}", s * (4 if part.wide_weights else b))
        tape.drop_any("d:weighed", f"{keeps}:down", f"{keeps}:shares")
        tape.cut()  # the gradient of down's weights
        tape.hold("d:inner", inner)
        tape.drop_any("d:down", f"{keeps}:inner")
        _gate_backward(part, tape, gates, inner)
        tape.hold("d:gate_up", wide)
        tape.drop_any("d:gate", "d:up", f"{keeps}:gate_up")
        tape.cut()  # that of gate's and up's
        tape.hold("d:sorted", rows * b)
        tape.drop_any("d:gate_up", f"{keeps}:sorted")
        tape.spike(2 * part.width * b)
        tape.accumulate(f"d:{part.reads}", part.width * b)
        tape.drop_any("d:sorted", f"{keeps}:order")

    return backward


def _gate(part: Experts, tape: Tape, keeps: str, inner: int) -> list[str]:
    """``act(gate) * up`` from the two halves of one tensor; the names of what stays for the backward pass."""
    if not part.clamped:
        tape.hold(f"{keeps}:activated", inner)
        return [f"{keeps}:activated"]
    names = [f"{keeps}:{what}" for what in ("gate", "sigmoid", "glu", "up")]
    tape.hold(names[0], inner)
    tape.hold("clamped", inner)
    tape.hold("scaled", inner)
    tape.hold(names[1], inner)
    tape.drop("scaled")
    tape.hold(names[2], inner)
    tape.hold(names[3], inner)
    tape.drop("clamped")
    return names


def _gate_backward(part: Experts, tape: Tape, gates: list[str], inner: int) -> None:
    """From ``d:inner`` to ``d:gate`` and ``d:up``."""
    tape.hold("d:up", inner)
    tape.hold("d:activated", inner)
    tape.drop("d:inner")
    tape.hold("d:gate", inner)
    if part.clamped:
        tape.spike(2 * inner)
    tape.drop_any("d:activated", *gates)


def latent(part: Latent, tape: Tape, engine: Engine, saves: bool, grads: set[str]) -> Backward:
    """Turns the parts of queries and key that turn, and joins them with those that do not; values stay a view of what was expanded."""
    b, heads = engine.compute_bytes, part.heads
    query = heads * (part.plain + part.turned) * b
    turned = (heads + 1) * part.turned
    work = 2 * 4.0 * turned if part.kind == "complex" else 2.0 * turned * b
    tape.hold("work", work)
    tape.hold("turned", turned * b)
    tape.drop("work")
    tape.hold(part.query, query)
    tape.hold(part.key, query)
    tape.drop("turned")
    tape.share(part.value, part.expanded)
    for source, target in ((part.query_from, part.query), (part.expanded, part.key), (part.expanded, part.value)):
        if source in grads:
            grads.add(target)

    def backward(tape: Tape) -> None:
        if not tape.has(f"d:{part.key}"):
            return
        tape.hold("copy", query)  # each copy into the key's tensor hands on a copy of its gradient
        tape.spike(query)
        tape.drop(f"d:{part.key}")
        tape.hold("d:turned", turned * b)
        tape.accumulate(f"d:{part.expanded}", heads * (part.plain + part.value_dim) * b)
        tape.drop_any("copy", f"d:{part.value}")
        if tape.has(f"d:{part.query}"):
            tape.hold("work", work)
            tape.accumulate(f"d:{part.query_from}", query)
            tape.drop_any("work", f"d:{part.query}")
        if part.turning in grads:
            tape.accumulate(f"d:{part.turning}", part.turned * b)
        tape.drop("d:turned")

    return backward
