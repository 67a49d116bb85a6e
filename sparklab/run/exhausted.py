"""What is said when memory ran out: where, what was planned and measured, and the nearest plan that fits. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from sparklab.box import Box
from sparklab.errors import OutOfMemory, SparklabError
from sparklab.model.anatomy import Anatomy
from sparklab.planner.fixes import Fix, find_fixes
from sparklab.planner.ledger import Ledger
from sparklab.planner.recipe import Recipe
from sparklab.units import GIB, NA, format_bytes, is_na

SHARE: Final = 0.9
"""Of the tensors that did not fit, by the plan's own measure: a plan is offered where it peaks below that."""

MAY_CHANGE: Final = frozenset({
    "checkpoint_layers", "loss", "retry", "eval_every", "save_every", "keep_checkpoints", "keep_best", "sample_prompts", "answer_held_out", "answer_tokens",
    "guard", "soft_floor_gib", "hard_floor_gib", "skip_bad_updates",
})  # fmt: skip
"""Fields of a recipe that a resume may change: weights, optimizer, rows and their order stay what the checkpoint was made with."""

_PHASES: Final = {
    "load": "while the model was loaded", "prepare": "while the data was prepared", "forward": "in a forward pass", "backward": "in a backward pass",
    "optimizer": "in the optimizer's step", "evaluate": "while evaluating", "sample": "while sampling", "save": "while saving",
}  # fmt: skip
_PLANNED: Final = {"forward": "train", "backward": "train", "optimizer": "train"}


@dataclass(frozen=True, kw_only=True)
class Exhausted:
    """Memory ran out."""

    phase: str
    """load, prepare, evaluate, forward, backward, optimizer, sample or save."""
    step: int
    """Updates made before."""
    words: str
    """The first line of what was raised."""
    measured_bytes: float
    """The most this process held: of the device where there is one."""
    available_bytes: float
    """What the machine still had at that moment."""
    stuck: str = ""
    """Why ``retry="smaller"`` could not go on."""

    def error(self, recipe: Recipe, plan: Mapping[str, Any], box: Box) -> OutOfMemory:
        """What to raise."""
        planned = self._planned(plan)
        fixes = nearest(recipe, box)
        at = f" after update {self.step}" if self.step else ""
        have = f"; {format_bytes(self.available_bytes)} of the machine were available" if not is_na(self.available_bytes) else ""
        fact = (
            f"memory ran out {_PHASES.get(self.phase, f'in phase {self.phase}')}{at}: {format_bytes(planned)} were planned there, "
            f"{format_bytes(self.measured_bytes)} were held at the most{have}. {self.words}"
        )
        changes = fixes[0].changes if fixes else {}
        error = OutOfMemory(fact, self._fix(recipe, fixes))
        error.details = {"phase": self.phase, "planned_bytes": planned, "measured_bytes": self.measured_bytes, "changes": changes}
        return error

    def _planned(self, plan: Mapping[str, Any]) -> float:
        """The plan's peak in this phase; the whole peak where it does not tell."""
        phase = _PLANNED.get(self.phase, self.phase)
        lines = plan.get("lines")
        sizes = [line["gib"] for line in lines if line["phase"] == phase] if isinstance(lines, list) else []
        peak = plan.get("peak_gib")
        total = sum(sizes) if sizes else peak if isinstance(peak, (int, float)) else NA
        return total * GIB

    def _fix(self, recipe: Recipe, fixes: tuple[Fix, ...]) -> str:
        words = [self.stuck] if self.stuck else []
        kept = [fix for fix in fixes if set(fix.changes) <= MAY_CHANGE]
        if self.phase in ("forward", "backward", "evaluate") and recipe.retry == "none":
            words.append("let the run take smaller pieces by itself: run.resume(retry='smaller')")
        words += [f"{fix.text}, planned at {format_bytes(fix.peak_bytes)}: run.resume({_arguments(fix.changes)})" for fix in kept[:1]]
        anew = [fix for fix in fixes if fix not in kept]
        words += [f"start anew with {anew[0].text}, planned at {format_bytes(anew[0].peak_bytes)}"] if anew else []
        return "; or ".join(words) or "close what else holds memory (sparklab doctor names it), or train a smaller model"


def nearest(recipe: Recipe, box: Box) -> tuple[Fix, ...]:
    """Single changes of the recipe, cheapest first, whose plans peak well below this one's and below what is usable now; none where nobody can plan."""
    try:
        anatomy = Anatomy.read(recipe.model)
        fixed = box.runtime_bytes
        budget = min(fixed + SHARE * (Ledger(anatomy, recipe, box).peak_bytes - fixed), box.usable_bytes)
        return find_fixes(Ledger(anatomy, recipe, dataclasses.replace(box, available_bytes=budget + box.reserve_bytes)))
    except SparklabError:
        return ()


def _arguments(changes: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in changes.items())
