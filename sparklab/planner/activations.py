"""What a layer holds and moves, forward and backward, in bytes per token: its parts acted out one after the other on a :class:`Tape`.

The kinds of parts are in :mod:`sparklab.planner.kernels` and :mod:`sparklab.planner.mixtures`. They follow the kernels that really run: stock
transformers blocks, norms in fp32, PEFT adapters without autocast, attention document by document that keeps q, k, v, its output and one fp32
log-sum-exp a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Final

from sparklab.model.parts import Activation, Attention, Experts, Latent, Linear, Norm, Part, Product, Residual, Rotary, Router, Scale, Split
from sparklab.planner import dora, frozen_experts, fused, kernels, mixtures
from sparklab.planner.kernels import Backward, Engine
from sparklab.planner.tape import Peak, Tape

Run = Callable[[Any, Tape, Engine, bool, set[str]], Backward]
RUN: Final[dict[type[Part], Run]] = {
    Linear: lambda part, tape, engine, saves, grads: (dora.linear if engine.dora and part.name in engine.adapted else kernels.linear)(
        part, tape, engine, saves, grads
    ),
    Norm: kernels.norm, Rotary: kernels.rotary, Attention: kernels.attention, Activation: kernels.pointwise,
    Product: kernels.pointwise, Scale: kernels.scale, Split: kernels.split, Residual: kernels.residual, Router: mixtures.router,
    Experts: mixtures.experts, Latent: mixtures.latent, fused.Linears: fused.linears, fused.GatedMlp: fused.gated_mlp,
    fused.FrozenMlp: fused.frozen_mlp, frozen_experts.FrozenExperts: frozen_experts.experts,
}  # fmt: skip
"""For each kind of part: its forward pass now, its backward pass as what is returned."""
FAST: Final[dict[type[Part], Run]] = {**RUN, Norm: fused.norm, Rotary: fused.rotary}
"""The same for ``engine="fast"``."""


class LayerBytes:
    """One layer, bytes per token. Each pass is acted out when it is first asked for."""

    def __init__(self, parts: tuple[Part, ...], engine: Engine, input_needs_grad: bool) -> None:
        self.parts, self._engine = fused.fuse(parts, engine), engine
        self._grads = {"x"} if input_needs_grad else set()
        self.stream = float(_width(parts) * engine.compute_bytes)
        """The tensor between two layers."""

    @cached_property
    def plain(self) -> Peak:
        """Most held while running forward without gradients."""
        tape = Tape()
        tape.hold("x", self.stream)
        _forward(self.parts, tape, self._engine, False, set())
        return tape.peak

    @cached_property
    def training(self) -> Training:
        """Forward, and backward from what was kept."""
        tape = Tape()
        tape.hold("x", self.stream)
        start = tape.moved
        undo = _forward(self.parts, tape, self._engine, True, set(self._grads))
        keeps_input = tape.is_shared("x")
        tape.drop("x")
        tape.drop("y")
        kept, forward, moved_forward = tape.now, tape.peak, tape.moved - start
        tape.hold("d:y", self.stream)
        start = tape.moved
        return Training(kept, keeps_input, forward, _backward(undo, tape), moved_forward, tape.moved - start)

    @cached_property
    def recompute(self) -> tuple[Peak, ...]:
        """As :attr:`Training.backward` where the layer is checkpointed; the first figure is that of running forward again."""
        parts, engine = self.parts, self._engine
        tape = Tape()  # starts with the checkpoint and the gradient from above
        tape.recomputing = True
        tape.hold("x", self.stream)
        tape.hold("d:y", self.stream)
        _before_recomputing(parts, tape, engine)
        undo = _forward(parts, tape, engine, True, set(self._grads))
        last = _last_kernel(parts)
        ends_early = isinstance(last, (fused.GatedMlp, Experts)) or (isinstance(last, Linear) and last.name in engine.adapted)
        again = tape.marked if ends_early else tape.peak
        tape.drop_any("y", "d:first", "d:second")
        return (again, *_backward(undo, tape))


@dataclass(frozen=True)
class Training:
    """One layer in training, bytes per token."""

    kept: float
    """Held from the forward pass for the backward pass."""
    keeps_input: bool
    """The tensor that came in is among that."""
    forward: Peak
    """Most held while running forward, input and what is kept included."""
    backward: tuple[Peak, ...]
    """Most held in each part's backward pass, last part first, what the layer kept included."""
    moved_forward: float
    """Memory traffic of the forward pass."""
    moved_backward: float
    """Memory traffic of the backward pass."""


@lru_cache(maxsize=512)
def layer_bytes(parts: tuple[Part, ...], engine: Engine, input_needs_grad: bool = True) -> LayerBytes:
    """One layer, acted out: forward with and without saving, backward from kept tensors, backward after recomputation."""
    return LayerBytes(parts, engine, input_needs_grad)


def _before_recomputing(parts: tuple[Part, ...], tape: Tape, engine: Engine) -> None:
    """A layer is run again when its backward pass asks for the first tensor that was kept. Sums and products with constants come before that, and
    the first step of what they lead to: the cast of a norm's gradient, the scaling of an adapter's, the spreading of experts'."""
    ends = [part for part in parts[-2:] if isinstance(part, Scale)]  # Granite's product, between the last module and the sum
    tape.hold("d:first", sum(engine.compute_bytes * part.width for part in ends))
    last = _last_kernel(parts)
    for part in (part for part in parts if isinstance(part, Experts)):
        wide = 4 if part.wide_weights and engine.compute_bytes < 4 else 0
        if part is not last:  # of what experts add to a shared MLP: cast
            tape.hold("d:second", wide * part.width)
        elif not engine.expert_rank and type(part) is Experts:  # spread over those of each token
            tape.hold("d:second", max(wide, engine.compute_bytes) * part.active * part.width)
    if isinstance(last, Linear) and last.name in engine.adapted:
        cast = engine.compute_bytes if engine.adapter_bytes > engine.compute_bytes else 0  # the base's share of the gradient, in its own type
        tape.hold("d:second", (engine.adapter_bytes + cast) * last.outputs)
    elif isinstance(last, Norm) and last.kind != "rms" and engine.compute_bytes < 4 and not engine.fast:
        tape.hold("d:second", 4 * last.width)


def _last_kernel(parts: tuple[Part, ...]) -> Part:
    """The last part that keeps anything."""
    return next(part for part in reversed(parts) if not isinstance(part, (Residual, Scale)))


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
        case Latent():
            return (part.query_from, part.expanded, part.turning)
        case Experts():
            return (part.reads, part.weights)
        case Linear() | Norm() | Rotary() | Activation() | Scale() | Split() | Router() | fused.Linears() | fused.GatedMlp():
            return (part.reads,)
        case _:
            raise AssertionError(f"no such part: {part}")


def _forward(parts: tuple[Part, ...], tape: Tape, engine: Engine, saves: bool, grads: set[str]) -> list[Backward]:
    """Runs the parts; returns their backward passes. ``grads`` names the tensors that carry gradients and grows on the way."""
    last = {name: index for index, part in enumerate(parts) for name in _reads(part)}
    held: list[str] = []  # by the layer's own variable, until the module they went into returns; the layer's input stays with its caller
    undo: list[Backward] = []
    run = FAST if engine.fast else RUN
    for index, part in enumerate(parts):
        outer = isinstance(part, Norm) and not part.inner
        if outer:
            _let_go(held, tape, last, index)
        undo.append(run[type(part)](part, tape, engine, saves, grads))
        if outer:
            assert isinstance(part, Norm)
            held.append(part.writes)
        for name in _reads(part):
            if last[name] == index and name != "x" and name not in held:
                tape.drop(name)
        if isinstance(part, Residual):
            _let_go(held, tape, last, index + 1)
    return undo


def _let_go(held: list[str], tape: Tape, last: dict[str, int], index: int) -> None:
    """Drops the tensors that nothing from part ``index`` on reads."""
    for name in list(held):
        if last[name] < index:
            tape.drop(name)
            held.remove(name)


def _backward(undo: list[Backward], tape: Tape) -> tuple[Peak, ...]:
    """Runs the backward passes, last part first; the most held in each, or in each stretch of it where it is cut."""
    peaks = []
    for step in reversed(undo):
        tape.restart()
        step(tape)
        peaks += [*tape.cuts, tape.peak]
        tape.cuts.clear()
    return tuple(peaks)
