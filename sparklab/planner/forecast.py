"""A plan: what one recipe will hold, take and cost on one box. A plan table: the best plan of each method, fastest first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from sparklab.box import Box
from sparklab.errors import DoesNotFit, RecipeError
from sparklab.model.anatomy import Anatomy
from sparklab.planner import render
from sparklab.planner.cost import Cost, Range, cost, tokens_per_second
from sparklab.planner.fixes import Fix, find_fixes
from sparklab.planner.ledger import Ledger
from sparklab.planner.recipe import Recipe
from sparklab.planner.search import STEP_TOKENS, checkpoint_setting, least_checkpointing, longest_row
from sparklab.planner.stock import StockLedger
from sparklab.planner.traced import Traced
from sparklab.units import format_count, gib, is_na, jsonable

TOKENS_ASSUMED: Final = 10_000_000  # when nobody says how much there is to learn from
MOST_TOKENS: Final = 2**20  # the longest context looked for where a config does not say how long the model can read


@dataclass(frozen=True)
class Line:
    """One line of the ledger. Lines of zero bytes are left out."""

    name: str
    phase: str
    """load, train, evaluate, sample, save or merge."""
    bytes: float
    formula: str
    """How the bytes come about, with the numbers in it."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON; the size in GiB."""
        return {"name": self.name, "phase": self.phase, "gib": gib(self.bytes), "formula": self.formula}


@dataclass(frozen=True, repr=False)
class Plan:
    """One recipe on one box: memory in bytes, speed in non-pad tokens a second, ranges as (low, high)."""

    recipe: Recipe
    anatomy: Anatomy
    box: Box
    data_tokens: float | None = None
    """Tokens in one pass over the data; None: nobody said, and 10 million are assumed."""
    traced: Traced | None = None
    """What a trace of the training step found, where one was asked for."""

    @property
    def tokens(self) -> float:
        """Tokens to train on, all passes together, no more than ``max_steps`` updates hold."""
        recipe = self.recipe
        total = float(TOKENS_ASSUMED if self.data_tokens is None else self.data_tokens) * recipe.epochs
        if recipe.max_steps is None:
            return total
        return min(total, float(recipe.max_steps * recipe.micro_batches_per_update * recipe.micro_batch_tokens))

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """What the reader must know beside the figures."""
        recipe, anatomy, box = self.recipe, self.anatomy, self.box
        notes = [*self.ledger.notes, *([box.note] if box.note else [])]
        if self.data_tokens is None:
            notes.append(f"time and energy are for {format_count(TOKENS_ASSUMED)} tokens of data, assumed: say tokens=... for yours")
        if anatomy.max_positions and recipe.max_length > anatomy.max_positions:
            notes.append(f"max_length {recipe.max_length} is longer than the {anatomy.max_positions} positions the model was made for")
        if self.ledger.dtype == "bf16" and not box.has_native_bf16:
            notes.append(f"{box.chip} does not compute in bf16: it is emulated, slower than fp32")
        if self.traced is not None:
            traced, ledger = (f"{gib(size):.4g} GiB" for size in (self.traced.peak_bytes, self.ledger.peaks["train"]))
            notes.append(f"traced: the training step holds {traced} at the {self.traced.moment}; these lines say {ledger}")
        if recipe.engine == "stock":
            elsewhere = StockLedger(anatomy, recipe, box)
            notes.append(f"these lines are for the libraries' own code on packed rows; transformers' Trainer and PEFT without sparklab (all logits at once, "
                         f"adapters in fp32 under autocast) hold {gib(elsewhere.peak_bytes):.4g} GiB on rows as long, without padding")  # fmt: skip
        return (*notes, *box.in_the_way(self.peak_bytes))

    @cached_property
    def ledger(self) -> Ledger:
        return Ledger(self.anatomy, self.recipe, self.box)

    @cached_property
    def lines(self) -> tuple[Line, ...]:
        """Every line of every phase; those of one phase sum to its peak."""
        return tuple(Line(item.name, phase, item.size_bytes, item.explain())
                     for phase, (_, items) in self.ledger.phases.items() for item in items if item.size_bytes > 0)  # fmt: skip

    @cached_property
    def phases(self) -> dict[str, float]:
        """Phase to the bytes at its highest moment."""
        return dict(self.ledger.peaks)

    @property
    def peak_phase(self) -> str:
        return self.ledger.peak_phase

    @property
    def peak_moment(self) -> str:
        """Where in the peak phase the peak stands, in words."""
        return self.ledger.phases[self.peak_phase][0]

    @cached_property
    def peak_bytes(self) -> float:
        """The most that is held at any time."""
        peak = sum(line.bytes for line in self.peak_lines)
        assert abs(peak - self.ledger.peak_bytes) < 1, "the books do not close"
        return peak

    @property
    def peak_lines(self) -> tuple[Line, ...]:
        """The lines of the peak phase, which sum to the peak."""
        return tuple(line for line in self.lines if line.phase == self.peak_phase)

    @property
    def usable_bytes(self) -> float:
        return self.box.usable_bytes

    @property
    def fits(self) -> bool:
        """The peak is within the usable memory (of each device). True where the box's memory is unknown."""
        return not self.peak_bytes > self.usable_bytes

    @property
    def trainable_parameters(self) -> int:
        return self.ledger.trainable

    @cached_property
    def cost(self) -> Cost:
        """FLOPs, traffic and time of one micro-batch."""
        return cost(self.ledger)

    @property
    def tokens_per_second(self) -> Range:
        """(low, high): high is the roofline; low adds compute and traffic up at the shares of their peaks reached so far."""
        return tokens_per_second(self.cost, self.box)

    @property
    def hours(self) -> Range:
        """(low, high) hours to train on ``tokens`` tokens."""
        low, high = self.tokens_per_second
        return (self.tokens / high / 3600, self.tokens / low / 3600)

    @property
    def watt_hours(self) -> Range:
        """(low, high) energy of the training."""
        return (self.hours[0] * self.box.power_watts, self.hours[1] * self.box.power_watts)

    @cached_property
    def fixes(self) -> tuple[Fix, ...]:
        """Changes that would make it fit, cheapest first; empty where it fits, and where nothing helps."""
        return () if self.fits else find_fixes(self.ledger)

    def check(self) -> Plan:
        """The plan itself if it fits; raises :class:`DoesNotFit` with the figures and what would."""
        if self.fits:
            return self
        largest = max(self.peak_lines, key=lambda line: line.bytes)
        recipe = self.recipe
        fact = (
            f"{recipe.method} in {self.ledger.dtype} at {recipe.micro_batch_tokens} tokens per micro-batch needs {gib(self.peak_bytes):.4g} GiB; "
            f"{gib(self.usable_bytes):.4g} GiB usable on {self.box.name} (reserve {gib(self.box.reserve_bytes):.2g}). "
            f"Largest line: {largest.name}, {gib(largest.bytes):.3g} GiB."
        )
        if self.fixes:
            raise DoesNotFit(fact, "Any one of these fits: " + ", ".join(str(fix) for fix in self.fixes))
        raise DoesNotFit(fact, "no setting of this model fits; use a smaller model or a box with more memory")

    def replace(self, **changes: Any) -> Plan:
        """The plan of the same recipe with some fields changed."""
        return Plan(self.recipe.replace(**changes), self.anatomy, self.box, self.data_tokens)

    def longest_context(self, **changes: Any) -> Plan:
        """The plan of the longest documents that fit, one to a row, exact to 128 tokens and no longer than the model was made for.

        As few layers as possible recompute, all of them if need be, unless ``changes`` (fields of the recipe) say how many. Where not even
        128 tokens fit it is the plan of those, which does not fit and says what would. Raises RecipeError.
        """
        solved = sorted({"micro_batch_tokens", "max_length"} & set(changes))
        if solved:
            raise RecipeError(f"the longest context is solved for {' and '.join(solved)}", "leave it out")
        base, layers = self.recipe.replace(**changes), self.anatomy.layers

        def at(tokens: int, **more: Any) -> Plan:
            recipe = base.replace(micro_batch_tokens=tokens, max_length=tokens, **more)
            return Plan(recipe, self.anatomy, self.box, self.data_tokens)

        most = self.anatomy.max_positions or MOST_TOKENS
        free = {} if "checkpoint_layers" in changes else {"checkpoint_layers": "all"}
        tokens = longest_row(lambda tokens: at(tokens, **free).fits, most)
        if not tokens or not free or is_na(self.usable_bytes):
            return at(tokens or min(most, STEP_TOKENS), **free)
        count = least_checkpointing(lambda count: at(tokens, checkpoint_layers=count).peak_bytes, layers, self.usable_bytes)
        assert count is not None, "what fits with every layer recomputed has a least number of them"
        return at(tokens, checkpoint_layers=checkpoint_setting(count, layers))

    def to_dict(self) -> dict[str, Any]:
        """For JSON, names as ``sparklab plan --json`` prints them; ranges as [low, high], unknown as null."""
        values: dict[str, Any] = jsonable({
            "model": self.recipe.model,
            "method": self.recipe.method,
            "parameters": self.anatomy.parameters,
            "trainable_parameters": self.trainable_parameters,
            "box": self.box.name,
            "fits": self.fits,
            "peak_gib": gib(self.peak_bytes),
            "usable_gib": gib(self.usable_bytes),
            "peak_phase": self.peak_phase,
            **({} if self.traced is None else {"traced_gib": gib(self.traced.peak_bytes)}),
            "lines": [line.to_dict() for line in self.lines],
            "tokens_per_second": list(self.tokens_per_second),
            "hours": list(self.hours),
            "wh": list(self.watt_hours),
            "tokens": self.tokens,
            "fixes": [fix.to_dict() for fix in self.fixes],
            "notes": list(self.notes),
            "recipe": self.recipe.to_dict(),
        })  # fmt: skip
        return values

    def __repr__(self) -> str:
        memory = f"{gib(self.peak_bytes):.3g} GiB of {gib(self.usable_bytes):.3g}, {'fits' if self.fits else 'does not fit'}"
        return f"Plan({self.recipe.method} of {self.recipe.model} on {self.box.name}: {memory})"

    def __str__(self) -> str:
        return render.plan_text(self)

    def _repr_html_(self) -> str:
        return render.plan_html(self)


@dataclass(frozen=True, repr=False)
class PlanTable:
    """One plan a method: those that fit first, fastest first."""

    plans: tuple[Plan, ...]

    @classmethod
    def ranked(cls, plans: list[Plan]) -> PlanTable:
        """The plans in order: what fits by speed, then what does not by size."""

        def place(plan: Plan) -> tuple[bool, float, float]:
            rate = plan.tokens_per_second[0]
            return (not plan.fits, 0.0 if is_na(rate) or not plan.fits else -rate, plan.peak_bytes)

        return cls(tuple(sorted(plans, key=place)))

    def best(self) -> Plan:
        """The first: the fastest plan that fits; where none fits, the smallest."""
        return self.plans[0]

    def longest_context(self, **changes: Any) -> PlanTable:
        """For each method the plan of the longest documents that fit (:meth:`Plan.longest_context`), longest first."""
        found = [plan.longest_context(**changes) for plan in self.plans]
        return PlanTable(tuple(sorted(found, key=lambda plan: (not plan.fits, -plan.recipe.max_length))))

    def __iter__(self) -> Iterator[Plan]:
        return iter(self.plans)

    def __len__(self) -> int:
        return len(self.plans)

    def __getitem__(self, method: str | int) -> Plan:
        """The plan of a method by its name, or by its place in the ranking."""
        if isinstance(method, int):
            return self.plans[method]
        for plan in self.plans:
            if plan.recipe.method == method:
                return plan
        raise KeyError(method)

    def to_dict(self) -> dict[str, Any]:
        """The best plan's figures, and ``plans`` with all of them in order."""
        return {**self.best().to_dict(), "plans": [plan.to_dict() for plan in self.plans]}

    def __repr__(self) -> str:
        return f"PlanTable({', '.join(repr(plan) for plan in self.plans)})"

    def __str__(self) -> str:
        return render.table_text(self)

    def _repr_html_(self) -> str:
        return render.table_html(self)


@dataclass(frozen=True, repr=False)
class ModelTable:
    """One plan table a model, the largest model first."""

    tables: tuple[PlanTable, ...]

    @classmethod
    def ordered(cls, tables: list[PlanTable]) -> ModelTable:
        """The tables in order."""
        return cls(tuple(sorted(tables, key=lambda table: -table.best().anatomy.parameters)))

    def largest(self) -> Plan:
        """The best plan of the largest model that fits. Raises :class:`DoesNotFit` with what is nearest to fitting where none does."""
        return self._nearest().check()

    def _nearest(self) -> Plan:
        """The largest that fits; where none does, the one whose best plan is smallest."""
        best = [table.best() for table in self.tables]
        return next((plan for plan in best if plan.fits), min(best, key=lambda plan: plan.peak_bytes))

    def longest_context(self, **changes: Any) -> ModelTable:
        """For each model and method the plan of the longest documents that fit (:meth:`Plan.longest_context`)."""
        return ModelTable(tuple(table.longest_context(**changes) for table in self.tables))

    def __iter__(self) -> Iterator[PlanTable]:
        return iter(self.tables)

    def __len__(self) -> int:
        return len(self.tables)

    def __getitem__(self, model: str | int) -> PlanTable:
        """The table of a model by its name, or by its place."""
        if isinstance(model, int):
            return self.tables[model]
        for table in self.tables:
            if table.best().anatomy.source == model:
                return table
        raise KeyError(model)

    def to_dict(self) -> dict[str, Any]:
        """The figures of the largest model that fits (of the nearest, where none does), and ``models`` with all tables in order."""
        return {**self._nearest().to_dict(), "models": [table.to_dict() for table in self.tables]}

    def __repr__(self) -> str:
        return f"ModelTable({', '.join(repr(table.best()) for table in self.tables)})"

    def __str__(self) -> str:
        return render.models_text(self)

    def _repr_html_(self) -> str:
        return render.models_html(self)
