"""Experts without adapters, acted out as :mod:`sparklab.engine.frozen_experts` runs them: S = active x T rows sorted by expert.

Kept for the backward pass: gate_up [S, 2I] and the order of the rows; the shares are the router's. Both gradients of a known gate are written over it.
"""

from __future__ import annotations

from typing import Final

from sparklab.model.parts import Experts
from sparklab.planner.kernels import Backward, Engine
from sparklab.planner.tape import Tape

INDEX: Final = 8  # bytes of a place in a list


class FrozenExperts(Experts):
    """A layer's experts in our function."""


def sort_rows(part: Experts, tape: Tape, order: str) -> None:
    """The rows of each token among the sorted ones, and back; and, where there are biases, each row's expert."""
    s = part.active
    tape.hold("sorted", (INDEX + 1) * s)
    tape.hold(order, INDEX * s)
    tape.spike(INDEX * s)
    tape.hold(order, (INDEX + (4 if part.clamped else 0)) * s)
    tape.drop("sorted")


def sum_rows(part: Experts, tape: Tape, engine: Engine, weighed: bool) -> None:
    """What one sum of a token's rows needs beside them and its result; wide shares are two narrow ones."""
    s, b = part.active, engine.compute_bytes
    twice = weighed and part.wide_weights and b < 4
    tape.spike((2 * s * (INDEX + b) if twice else 0) + INDEX * (s * (2 if twice else 1) + 3))


def experts(part: FrozenExperts, tape: Tape, engine: Engine, saves: bool, grads: set[str]) -> Backward:
    """Forward now, backward as what is returned."""
    b, s, biased = engine.compute_bytes, part.active, part.clamped
    wide, inner, rows = s * 2 * part.inner * b, s * part.inner * b, s * part.width * b
    keeps, needs_grad = f"{part.writes}:kept", part.reads in grads
    kept = (f"{keeps}:order", f"{keeps}:order", f"{keeps}:gate_up", f"{keeps}:shares")
    sort_rows(part, tape, kept[0])
    tape.hold("rows", rows)
    tape.hold(f"{keeps}:gate_up", wide)
    tape.drop("rows")
    tape.spike(wide if biased else 0)
    tape.hold("inner", inner)
    tape.spike((4 if biased else 0) * inner)
    tape.hold("out", rows)
    tape.drop("inner")
    tape.spike(rows if biased else 0)
    tape.hold(part.writes, part.width * b)
    sum_rows(part, tape, engine, weighed=True)
    tape.drop("out")
    tape.share(f"{keeps}:shares", part.weights)
    tape.marked = tape.peak
    if needs_grad:
        grads.add(part.writes)
    if not (saves and needs_grad):
        tape.drop_any(*kept)

    def backward(tape: Tape) -> None:
        if not tape.has(f"d:{part.writes}"):
            return
        tape.hold("d:rows", rows)
        tape.hold("d:inner", inner)
        tape.spike(2 * rows if biased else 0)
        tape.drop("d:rows")
        _gate_backward(part, tape, inner, f"{keeps}:gate_up")
        tape.hold("d:sorted", rows)
        tape.hold("d:input", part.width * b)
        sum_rows(part, tape, engine, weighed=True)
        tape.drop("d:sorted")
        tape.accumulate(f"d:{part.weights}", s * (4 if part.wide_weights else b))
        tape.drop_any("d:gate_up", *kept, f"d:{part.writes}")
        tape.merge(f"d:{part.reads}", "d:input")

    return backward


def _gate_backward(part: Experts, tape: Tape, inner: int, gate_up: str) -> None:
    """From ``d:inner`` to the gradient of gate_up, in its place where the gate is known, else beside it."""
    if not part.clamped:
        tape.spike(2 * inner)
        tape.drop("d:inner")
        return
    tape.hold("gate", 5 * inner)
    tape.spike(2 * inner)  # the gradients of both factors
    tape.drop("gate")
    tape.hold("product", inner)
    tape.hold("d:gate_up", 2 * inner)
    tape.spike(3 * inner)  # the other half's, and the same in its place among both
    if tape.recomputing:
        tape.drop_any(gate_up)
    tape.drop_any("product", "d:inner")
