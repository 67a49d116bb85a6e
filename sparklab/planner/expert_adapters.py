"""Experts with adapters, acted out as :mod:`sparklab.model.experts` runs them: S = active x T rows sorted by expert, R the rank as it is padded.

Kept for the backward pass: gate_up [S, 2I] and the low-rank rows 2 x [S, R], the order of the rows, the weights of the chosen, and the input, which
is the norm's output. The workspace is highest where the rows [S, H] and their gradients are beside gate_up's.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from sparklab.errors import RecipeError
from sparklab.model.anatomy import Anatomy
from sparklab.model.parts import Experts
from sparklab.planner.frozen_experts import sort_rows, sum_rows
from sparklab.planner.kernels import Backward, Engine
from sparklab.planner.recipe import Recipe
from sparklab.planner.tape import Tape

KEPT: Final = ("order", "order", "gate_up", "low", "input", "shares")


def matrices(part: Experts, rank: int) -> tuple[int, ...]:
    """Numbers in each of the four matrices of one layer's experts: an A and a B for gate and up, and for down, for each; PEFT keeps them as four."""
    return tuple(part.experts * rank * width for width in (part.width, 2 * part.inner, part.inner, part.width))


def rank_of(anatomy: Anatomy, recipe: Recipe) -> int:
    """The rank of the experts' adapters, 0 without. Raises :class:`RecipeError` where the model has no experts."""
    if recipe.method == "full" or not recipe.expert_adapters:
        return 0
    if not anatomy.expert_parameters:
        raise RecipeError(f"expert_adapters is true, and {anatomy.source} ({anatomy.family}) has no experts", "leave expert_adapters out")
    return recipe.rank


def all_matrices(anatomy: Anatomy, rank: int) -> list[tuple[int, int]]:
    """(numbers, how many of them) of every matrix of the experts' adapters of a model; none at rank 0."""
    return [(numbers, block.count) for block in anatomy.blocks for part in block.experts for numbers in matrices(part, rank)] if rank else []


def _padded(engine: Engine) -> int:
    """The rank, filled up to rows of 16 bytes."""
    numbers = 16 // engine.compute_bytes
    return -(-engine.expert_rank // numbers) * numbers


class _Factors(NamedTuple):
    """Copies of one projection's A and B, bytes a token."""

    held: float
    """While they are at work: B always, A where its type or width is not right."""
    cast: float
    """B in the type that computes, before it is laid out anew."""

    def make(self, tape: Tape) -> None:
        tape.hold("factors", self.held)
        tape.spike(self.cast)


def _factors(part: Experts, engine: Engine) -> tuple[_Factors, _Factors]:
    """Of gate and up, and of down."""
    rank, b = _padded(engine), engine.compute_bytes
    a_too = engine.adapter_bytes != b or rank != engine.expert_rank
    cast = engine.adapter_bytes != b
    each = b * part.experts * rank / engine.tokens
    up, down = (2 * part.inner, part.width), (part.width, part.inner)
    sizes = [_Factors(each * (outputs + (inputs if a_too else 0)), each * outputs if cast else 0.0) for outputs, inputs in (up, down)]
    return sizes[0], sizes[1]


def experts(part: Experts, tape: Tape, engine: Engine, saves: bool, grads: set[str]) -> Backward:
    """Forward now, backward as what is returned."""
    b, s, biased = engine.compute_bytes, part.active, part.clamped
    wide, inner, rows, low = s * 2 * part.inner * b, s * part.inner * b, s * part.width * b, s * _padded(engine) * b
    keeps, (up, down) = f"{part.writes}:kept", _factors(part, engine)
    sort_rows(part, tape, f"{keeps}:order")
    up.make(tape)
    tape.hold("rows", rows)
    tape.hold(f"{keeps}:gate_up", wide)
    tape.hold(f"{keeps}:low", 2 * low)
    tape.drop("rows")
    tape.spike(wide)
    tape.drop("factors")
    tape.hold("inner", inner)
    tape.spike((4 if biased else 1) * inner)
    down.make(tape)
    tape.hold("out", rows)
    tape.drop("inner")
    tape.spike(rows)
    tape.drop("factors")
    tape.hold(part.writes, part.width * b)
    sum_rows(part, tape, engine, weighed=True)
    tape.drop("out")
    tape.share(f"{keeps}:input", part.reads)
    tape.share(f"{keeps}:shares", part.weights)
    grads.add(part.writes)
    if not saves:
        tape.drop_any(*(f"{keeps}:{what}" for what in KEPT))
    return _backward(part, engine, part.reads in grads)


def _backward(part: Experts, engine: Engine, needs_grad: bool) -> Backward:
    b, s, biased = engine.compute_bytes, part.active, part.clamped
    wide, inner, rows, low = s * 2 * part.inner * b, s * part.inner * b, s * part.width * b, s * _padded(engine) * b
    keeps, (up, down) = f"{part.writes}:kept", _factors(part, engine)
    gradients = [
        engine.compute_bytes * part.experts * _padded(engine) * width / engine.tokens for width in (part.width + part.inner, 2 * part.inner + part.width)
    ]

    def backward(tape: Tape) -> None:
        if not tape.has(f"d:{part.writes}"):
            return
        tape.hold("gate", (5 if biased else 2) * inner)
        down.make(tape)
        tape.hold("d:rows", rows)
        tape.hold("d:inner", inner)
        tape.spike(inner)
        tape.spike(2 * rows if biased else 0)
        tape.accumulate(f"d:{part.weights}", s * (4 if part.wide_weights else b))
        tape.hold("d:factors", gradients[0])
        tape.spike(2 * low + gradients[0])
        tape.drop_any("d:rows", "factors")
        tape.hold("d:gate_up", wide)
        tape.spike(low + inner + (wide if biased else 0))  # both halves' gradients before they are one; the activation's value is gone by then
        tape.drop_any("gate", "d:inner")
        up.make(tape)
        tape.hold("all:factors", gradients[1])
        tape.spike(rows + gradients[1])
        if needs_grad:
            tape.hold("d:sorted", rows)
            tape.spike(rows)
            tape.drop("d:gate_up")
            tape.accumulate(f"d:{part.reads}", part.width * b)
            sum_rows(part, tape, engine, weighed=False)
        tape.drop_any("d:sorted", "d:gate_up", "factors", "d:factors", "all:factors")
        tape.drop_any(*(f"{keeps}:{what}" for what in KEPT))
        tape.drop_any(f"d:{part.writes}")

    return backward
