"""The plan with sliders: a picture in the notebook that a live kernel makes movable, and that stays when the kernel is gone.

When the sliders rest, the twin in the output is brought up to date.
"""

from __future__ import annotations

import threading
from typing import Any, Final

import anywidget
import traitlets

from sparklab.box import Box
from sparklab.errors import RecipeError
from sparklab.panels import parts, plan_view
from sparklab.panels.plan_view import Choice, Settings
from sparklab.panels.resident import Resident
from sparklab.panels.widget import asset, hear_every_page
from sparklab.planner import ModelTable, Plan, PlanTable, plan
from sparklab.planner.recipe import METHODS, Method, Recipe

REST_SECONDS: Final = 0.7
"""How long the sliders must rest before the twin in the output follows: it is drawn anew then, which would end a drag."""


def explore(source: Any, *, box: Box | str | None = None, method: Method | None = None, tokens: float | None = None, **changes: Any) -> PlanPanel:
    """The plan of a recipe or a model, with sliders for tokens, rank, recomputed layers and method.

    ``source`` and the keywords are those of :func:`sparklab.plan` for one model or recipe, or what it returned for one. The panel's ``recipe`` and ``plan``
    are always those the sliders show. Raises what :func:`sparklab.plan` raises.

    ::

        panel = sl.explore("path/to/model", box="dgx-spark")
        panel                   # shows it; move the sliders
        panel.recipe            # what they say, as a recipe
    """
    planned: object = source if isinstance(source, (Plan, PlanTable, ModelTable)) else plan(source, box=box, method=method, tokens=tokens, **changes)
    if isinstance(planned, PlanTable):
        found = {one.recipe.method: one for one in planned}
        return PlanPanel({name: found[name] for name in METHODS if name in found}, planned.best())
    if isinstance(planned, Plan):
        return PlanPanel({name: planned.replace(method=name) for name in METHODS}, planned)
    raise RecipeError("sliders are for one model, and these are several", "explore each of them, or sl.plan([...]).largest()")


class PlanWidget(anywidget.AnyWidget):  # type: ignore[misc]  # anywidget is not annotated well enough to be followed
    """What the page sees. ``choice`` is written by the page, everything else by the kernel."""

    _esm = asset("parts.js", "plan.js")
    _css = parts.css_variables() + asset("panel.css")

    home = traitlets.Unicode("", help="Class of the element whose place the panel takes.").tag(sync=True)
    name: traitlets.List[str] = traitlets.List([], help="The model's name; the box.").tag(sync=True)
    scales = traitlets.Dict({}, help="The values that methods, tokens and ranks may take, and the number of layers.").tag(sync=True)
    choice = traitlets.Dict({}).tag(sync=True)
    view = traitlets.Dict({}).tag(sync=True)
    settled = traitlets.Int(0, help="Counts how often a slider was let go.").tag(sync=True)


class PlanPanel(Resident):
    """Sliders over plans: shows itself in a notebook, and elsewhere prints the plan it stands at."""

    kind = "plan"

    def __init__(self, bases: dict[Method, Plan], start: Plan) -> None:
        super().__init__()
        self._settings = Settings(bases, Choice.of(start))
        self._choice = self._settings.start
        self._timer: threading.Timer | None = None

    @property
    def plan(self) -> Plan:
        """The plan that the sliders show."""
        return self._settings.plan(self._choice)

    @property
    def recipe(self) -> Recipe:
        """Its recipe."""
        return self.plan.recipe

    def __repr__(self) -> str:
        return f"PlanPanel({self.plan!r})"

    def __str__(self) -> str:
        return str(self.plan)

    def _twin(self) -> str:
        return plan_view.twin_html(self._settings, self._choice, self._home)

    def _make_widget(self) -> PlanWidget:
        settings, start = self._settings, self._choice
        scales = {"methods": list(settings.bases), "tokens": settings.tokens, "ranks": settings.ranks, "layers": settings.layers}
        widget = PlanWidget(home=self._home, name=list(plan_view.title(settings)), scales=scales, choice=vars(start), view=plan_view.view(settings, start))
        hear_every_page(widget.comm)
        widget.observe(lambda change: self._choose(change["new"]), "choice")
        widget.observe(lambda _change: self._settle(), "settled")
        return widget

    def _choose(self, values: object) -> None:
        """The page moved a slider: answer with the plan there. What is not on offer changes nothing."""
        choice = self._settings.read(values)
        with self._guard:
            if choice is not None and self.widget is not None:
                self._choice = choice
                self.widget.view = plan_view.view(self._settings, choice)

    def _settle(self) -> None:
        """A slider was let go: the twin follows when nothing moves any more."""
        with self._guard:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = threading.Timer(REST_SECONDS, self._keep)
            self._timer.daemon = True
            self._timer.start()
