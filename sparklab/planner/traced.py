"""What a trace found (:mod:`sparklab.engine.trace`), as plain values: they come from another process, and whoever looks at them needs no torch."""

from __future__ import annotations

import html
from dataclasses import asdict, dataclass
from typing import Any

from sparklab.box import Box
from sparklab.planner.recipe import Recipe
from sparklab.units import NA, format_bytes, gib, jsonable


@dataclass(frozen=True)
class TracedLine:
    """One line of the highest moment of a traced training step."""

    name: str
    bytes: float
    formula: str
    """Where the figure comes from."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Traced:
    """The most that a training step holds, from following the storages of the real step on tensors without memory."""

    lines: tuple[TracedLine, ...]
    """What is held at the highest moment; those of zero bytes are left out."""
    moment: str
    """Where in the step that is."""
    layers: int
    """Layers that were traced; equal ones stand in for each other."""
    seconds: float
    """How long it took."""

    @property
    def peak_bytes(self) -> float:
        """The sum of the lines."""
        return sum(line.bytes for line in self.lines)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the values themselves, and ``traced_gib``."""
        return {"traced_gib": gib(self.peak_bytes), **asdict(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Traced:
        """The inverse of :meth:`to_dict`."""
        lines = tuple(TracedLine(**line) for line in values["lines"])
        return cls(lines=lines, moment=values["moment"], layers=values["layers"], seconds=values["seconds"])

    def __repr__(self) -> str:
        return f"Traced({gib(self.peak_bytes):.4g} GiB in training, at the {self.moment}; {self.layers} layers in {self.seconds:.1f} s)"


@dataclass(frozen=True, kw_only=True, repr=False)
class TracedPlan:
    """What stands in for a :class:`~sparklab.planner.forecast.Plan` where the ledger does not know the model's family: traced, not itemised.

    It knows the training step alone, and neither time nor energy.
    """

    recipe: Recipe
    box: Box
    traced: Traced

    @property
    def peak_bytes(self) -> float:
        return self.traced.peak_bytes

    @property
    def fits(self) -> bool:
        """The training step is within the usable memory. True where the box's memory is unknown."""
        return not self.peak_bytes > self.box.usable_bytes

    @property
    def notes(self) -> tuple[str, ...]:
        """What the reader must know beside the figures."""
        unknown = "traced, not itemised: the family of this model is not known, so of the phases only training is, and neither time nor energy"
        return (unknown, *([self.box.note] if self.box.note else []))

    def best(self) -> TracedPlan:
        """Itself: it is the only one."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """As :meth:`Plan.to_dict`, with null for what is unknown."""
        values: dict[str, Any] = jsonable({
            "model": self.recipe.model,
            "method": self.recipe.method,
            "box": self.box.name,
            "fits": self.fits,
            "peak_gib": gib(self.peak_bytes),
            "usable_gib": gib(self.box.usable_bytes),
            "peak_phase": "train",
            "traced_gib": gib(self.peak_bytes),
            "lines": [{"name": line.name, "phase": "train", "gib": gib(line.bytes), "formula": line.formula} for line in self.traced.lines],
            "tokens_per_second": [NA, NA],
            "hours": [NA, NA],
            "wh": [NA, NA],
            "fixes": [],
            "notes": list(self.notes),
            "recipe": self.recipe.to_dict(),
        })  # fmt: skip
        return values

    def __repr__(self) -> str:
        verdict = "fits" if self.fits else "does not fit"
        return f"TracedPlan({self.recipe.method} of {self.recipe.model} on {self.box.name}: {format_bytes(self.peak_bytes)}, {verdict})"

    def __str__(self) -> str:
        usable = format_bytes(self.box.usable_bytes)
        rows = [f"  {line.name:<24}{format_bytes(line.bytes):>12}   {line.formula}" for line in sorted(self.traced.lines, key=lambda line: -line.bytes)]
        verdict = f"{'fits' if self.fits else 'does not fit'}; highest at the {self.traced.moment}"
        head = f"{self.recipe.method} of {self.recipe.model} on {self.box.name}: {format_bytes(self.peak_bytes)} of {usable} usable, {verdict}"
        return "\n".join([head, *rows, *(f"  {note}" for note in self.notes)])

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"
