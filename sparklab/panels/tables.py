"""What comparing and evaluating give back: small values that print well in a terminal and in a notebook."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparklab.panels.compare import comparison_html, comparison_text
from sparklab.panels.parts import escape
from sparklab.units import NA, is_na


@dataclass(frozen=True)
class Comparison:
    """Answers of base and tuned to the same prompts: ``rows`` of prompt, base and tuned."""

    rows: tuple[dict[str, str], ...]

    def to_dict(self) -> dict[str, Any]:
        """``{"rows": [{"prompt", "base", "tuned"}, ...]}``."""
        return {"rows": list(self.rows)}

    def __str__(self) -> str:
        return comparison_text(self.rows)

    def _repr_html_(self) -> str:
        return comparison_html(self.rows)


@dataclass(frozen=True)
class Scores:
    """One model on the held-out records. ``loss`` is nats per supervised token; ``standard_error`` is that of ``exact_match``."""

    loss: float
    exact_match: float
    standard_error: float
    n: int


def _scores(answer: dict[str, Any]) -> Scores:
    def figure(name: str) -> float:
        return NA if answer.get(name) is None else float(answer[name])

    return Scores(loss=figure("loss"), exact_match=figure("exact_match"), standard_error=figure("standard_error"), n=int(answer.get("n") or 0))


@dataclass(frozen=True)
class Evaluation:
    """Base and tuned on the same held-out records: ``held_out`` in all, of which ``answered`` were answered greedily."""

    base: Scores
    tuned: Scores
    held_out: int
    answered: int

    @classmethod
    def from_answer(cls, answer: dict[str, Any]) -> Evaluation:
        """From the JSON object of the evaluating process."""
        return cls(base=_scores(answer["base"]), tuned=_scores(answer["tuned"]), held_out=answer["held_out"], answered=answer["answered"])

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, as the CLI's ``--json`` prints them."""
        return {"held_out": self.held_out, "answered": self.answered, "base": vars(self.base), "tuned": vars(self.tuned)}

    def _rows(self) -> list[tuple[str, str, str]]:
        def share(scores: Scores) -> str:
            return "N/A" if is_na(scores.exact_match) else f"{scores.exact_match:.1%} ± {scores.standard_error:.1%}"

        losses = ("held-out loss", f"{self.base.loss:.4f}", f"{self.tuned.loss:.4f}")
        if not self.answered:  # of plain text nothing is asked
            return [losses]
        return [losses, (f"exact match (n={self.answered})", share(self.base), share(self.tuned))]

    def __str__(self) -> str:
        lines = [("", "base", "tuned"), *self._rows()]
        return "\n".join(f"{name:<22}{base:>16}{tuned:>16}" for name, base, tuned in lines)

    def _repr_html_(self) -> str:
        cell = '<td style="padding:2px 12px;text-align:right">'
        rows = "".join(f"<tr><th style='text-align:left'>{escape(name)}</th>{cell}{escape(a)}</td>{cell}{escape(b)}</td></tr>" for name, a, b in self._rows())
        return f"<table><tr><th></th><th>base</th><th>tuned</th></tr>{rows}</table>"
