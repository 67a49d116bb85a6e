"""The verbs on a run: train, watch, stop, resume, compare, evaluate. What ``import sparklab as sl`` hands out, above all other floors."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, overload

from sparklab.box import Box
from sparklab.data.lesson import lesson
from sparklab.data.read import check, resolved
from sparklab.errors import RecipeError, RunError, UnknownFamily
from sparklab.model.source import check_trainable
from sparklab.planner import plan as make_plan
from sparklab.planner.kept import kept
from sparklab.planner.recipe import Method, Recipe
from sparklab.results.job import ask
from sparklab.run import guard, inputs, launch
from sparklab.run.directory import RunDirectory
from sparklab.run.state import RunState
from sparklab.run.tracing import traced, traced_alone
from sparklab.text import one_line

if TYPE_CHECKING:
    from sparklab.box.doctor import Checkup
    from sparklab.model.anatomy import Anatomy
    from sparklab.panels.runs_panel import RunTable
    from sparklab.panels.tables import Comparison, Evaluation
    from sparklab.planner import ModelTable, Plan, PlanTable
    from sparklab.planner.traced import TracedPlan
    from sparklab.run.rehearsal import Rehearsal

RUNS: Final = Path("runs")
"""Where runs go, and are looked for, unless somebody says otherwise."""


@overload
def plan(source: Recipe, *, trace: bool = False, box: Box | str | None = None, tokens: float | None = None) -> Plan | TracedPlan: ...
@overload
def plan(
    source: str | Path | Anatomy,
    *,
    trace: bool = False,
    box: Box | str | None = None,
    method: Method | None = None,
    tokens: float | None = None,
    **changes: Any,
) -> PlanTable | TracedPlan: ...
@overload
def plan(
    source: Sequence[str | Path | Anatomy], *, box: Box | str | None = None, method: Method | None = None, tokens: float | None = None, **changes: Any
) -> ModelTable: ...
def plan(
    source: Any, *, trace: bool = False, box: Box | str | None = None, method: Method | None = None, tokens: float | None = None, **changes: Any
) -> Plan | PlanTable | ModelTable | TracedPlan:
    """What a recipe will hold and take on ``box`` (one, its name, or this machine); or, for a model, the best plan of each method; or that of several models.

    ``source`` is a :class:`Recipe`, planned as it is, or a model (config.json, directory, hub name, ``"tiny"`` or :class:`Anatomy`): then
    tokens per micro-batch and layers to checkpoint are solved for, unless ``changes`` (fields of a recipe) say them; or a list of models.
    ``tokens`` is the size of the training data in tokens, one pass (default: 10 million, and the plan says so).

    With ``trace=True`` the real training step is traced beside it, in a process of its own: on tensors without memory, in seconds, at any
    size. A model whose family is not known is traced in any case, and its plan says so: the training step alone, without time and energy.

    ::

        plan("path/to/8b").best()                                   # the fastest way to train it here
        plan("path/to/8b", method="qlora").longest_context()        # the longest documents that fit
        plan(["path/to/8b", "path/to/70b"]).largest()               # the largest of them that fits
        plan("path/to/8b", method="lora", trace=True).best().traced

    Reads config.json and nothing else. Raises ModelNotFound, ModelError, RecipeError, BoxError.
    """
    box = Box.of(box)
    try:
        made: Any = make_plan(source, box=box, method=method, tokens=tokens, **changes)
    except UnknownFamily:
        if isinstance(source, Sequence) and not isinstance(source, str):
            raise
        chosen = {} if method is None else {"method": method}
        recipe = source if isinstance(source, Recipe) else Recipe(**{"model": str(source), "data": "data.jsonl", **chosen, **changes})
        return traced_alone(recipe, box, sized=isinstance(source, Recipe) or "checkpoint_layers" in changes)
    planned: Plan | PlanTable | ModelTable = traced(made) if trace else made
    return planned


def train(
    recipe: Recipe, path: str | os.PathLike[str] | None = None, *, data: Any = None, inline: bool = False, panel: bool = True, force: bool = False
) -> Run:
    """Starts a run in the directory ``path`` (default: ``runs/`` and a name of its own) and returns at once.

    A worker process trains; this one stays free. In a notebook a live panel appears (``panel=False``: none). ``inline=True`` trains in this
    process instead and returns when it is over. Everything that can be known beforehand is checked before anything is written: the recipe,
    the model's files, every line of the data, the disk, and that the plan fits (``force=True`` starts what does not). ``data`` takes the
    place of the recipe's: a path, or records from memory (a pandas DataFrame, a list of dicts, a ``datasets.Dataset``), which are written
    beside the run first.

    Raises RecipeError, ModelError, DataError, DoesNotFit, DiskFull, RunExists.
    """
    if not isinstance(recipe, Recipe):
        raise RecipeError(f"what is to be trained is a {type(recipe).__name__}, not a recipe", "make one first: sl.recipes.lora(model, data)")
    target = Path(path) if path is not None else RUNS / f"{time.strftime('%Y%m%d-%H%M%S')}-{recipe.fingerprint[:4]}"
    planned = make_plan(recipe, box=Box.detect())
    check_trainable(recipe.model)
    if data is not None:
        recipe = recipe.replace(data=kept(data, target.parent / "data"))
    check(recipe.data, recipe.format, recipe.on_bad, divided=not isinstance(recipe.held_out, str) and recipe.held_out > 0)
    if isinstance(recipe.held_out, str):
        check(recipe.held_out, recipe.format, recipe.on_bad)
    if not force:
        planned.check()
        guard.check_plan(recipe, planned.box, planned.peak_bytes)
    launch.check_writable(target)
    launch.check_disk(target, written_bytes(planned, recipe))
    held_out = resolved(recipe.held_out) if isinstance(recipe.held_out, str) else recipe.held_out
    model = str(Path(recipe.model).resolve()) if Path(recipe.model).is_dir() else recipe.model
    recipe = recipe.replace(model=model, data=resolved(recipe.data), held_out=held_out)
    directory = RunDirectory.create(target, recipe, planned.to_dict(), inputs.describe(recipe))
    run = Run(directory)
    if inline:
        launch.run_inline(directory, accept=None)
    else:
        launch.start(directory, accept=None)
    if panel and not inline:
        run._look(starting=True)
    return run


def rehearse(recipe: Recipe, *, box: Box | str | None = None, force: bool = False, profile: bool = False,
             on_phase: Callable[[str], None] | None = None) -> Rehearsal:  # fmt: skip
    """The recipe at full size with random weights and random tokens, nothing downloaded: what it holds and how fast it is, against its plan.

    Loads, trains five updates on the longest micro-batch, evaluates, answers, saves and merges, in a process of its own, which may take no
    more memory than the plan may. What it learns of this machine is kept for later plans. ``box`` plans for another box than this one; speeds
    are always those of this machine. ``profile=True`` adds where the time of an update goes, by kind of work. ``on_phase`` is told each phase
    as it begins. Of the model, config.json alone is read, and the data not at all.

    Raises DoesNotFit before anything is allocated (``force=True`` tries what does not fit), RunFailed where memory runs out, with the phase
    it ran out in, RecipeError, ModelError, DiskFull.
    """
    from sparklab.run.rehearsal import rehearse_plan  # noqa: PLC0415

    here = Box.detect()
    planned = make_plan(recipe, box=here if box is None else box)
    if not force:
        planned.check()
        make_plan(recipe, box=here).check()
    return rehearse_plan(planned, on_phase, profile)


def doctor(source: Recipe | str | os.PathLike[str] | None = None, *, drill: bool = False) -> Checkup:
    """What about this machine would spoil a run: torch and its libraries, the memory pool, the disk, Jupyter; each with the line that mends it.

    ``source``: a recipe, or the directory of a run, whose checkpoints must fit on the disk. ``drill=True`` rehearses the guard's trip with a
    tiny run that is made to believe memory runs out, in under a minute. Takes the seconds that loading torch takes, in a process of its own.

    Raises RunNotFound, and where the drill's own run fails RunError.
    """
    from sparklab.box.doctor import Checkup, Examination, Machine  # noqa: PLC0415 - only who asks pays
    from sparklab.run.drill import drill as rehearse_trip  # noqa: PLC0415

    disk = None
    if source is not None:
        recipe, path = (source, RUNS) if isinstance(source, Recipe) else (RunDirectory(source).recipe, Path(source))
        disk = (path, written_bytes(make_plan(recipe, box=Box.detect()), recipe))
    findings = Examination(Machine(), disk).findings()
    return Checkup((*findings, *(rehearse_trip() if drill else ())))


def written_bytes(planned: Any, recipe: Recipe) -> float:
    """Most bytes a run may write: each checkpoint kept, one being written, and the result. Weights, and two AdamW moments of their size."""
    width = 4 if recipe.dtype == "fp32" else 2
    trained = planned.trainable_parameters * max(width, 4 if not planned.box.has_native_bf16 else 2)
    return float(trained * (3 * (recipe.keep_checkpoints + 1) + 1) + 2**20)


class Run:
    """A run, by its directory. Holds no state of its own: what it says is read from the files, so it is true in any kernel, at any time."""

    def __init__(self, directory: RunDirectory) -> None:
        self.directory = directory
        self._panel: Any = None

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Run:
        """The run in a directory, live or long finished. Raises RunNotFound."""
        return cls(RunDirectory(path))

    @property
    def path(self) -> Path:
        """The run's directory."""
        return self.directory.path

    @property
    def recipe(self) -> Recipe:
        """What the run was started with."""
        return self.directory.recipe

    @property
    def state(self) -> RunState:
        """The run as it stands now: step, losses, evaluations, memory ..."""
        return self.directory.state

    @property
    def status(self) -> str:
        """starting, running, paused, stopped, failed, finished, or lost (the worker vanished)."""
        return self.state.status

    # steering

    def stop(self, reason: str = "asked to stop") -> None:
        """Asks the worker to finish its update, save a checkpoint and leave. Returns at once; :meth:`wait` waits."""
        self._ask("stop", reason=reason)

    def pause(self) -> None:
        """Asks the worker to hold still after its update; it keeps its memory. ``resume()`` goes on."""
        self._ask("pause")

    def checkpoint(self) -> None:
        """Asks for a checkpoint after the update under way."""
        self._ask("checkpoint")

    def evaluate_now(self) -> None:
        """Asks for the held-out loss as the model is now; it comes as an ``eval`` event. (:meth:`evaluate` asks a finished run.)"""
        self._ask("evaluate")

    def sample(self, prompts: Sequence[str] = ()) -> None:
        """Asks the model as it is now; the answers come as ``sample`` events. Default: the recipe's prompts; RunError where there are none."""
        asked = [prompts] if isinstance(prompts, str) else list(prompts)
        if not asked and not self.recipe.sample_prompts:
            raise RunError("no prompt was given, and the recipe has no sample_prompts", "say what to ask")
        self._ask("sample", prompts=asked)

    def set_learning_rate(self, learning_rate: float) -> None:
        """Asks for the schedule as if the recipe's ``learning_rate`` had been this, from the next update on; it survives every resume.

        Raises RecipeError where it is not a number above 0.
        """
        self.recipe.replace(learning_rate=learning_rate)
        self._ask("learning_rate", learning_rate=learning_rate)

    def _ask(self, command: str, **details: Any) -> None:
        if not self.directory.is_alive:
            status = self.status
            raise RunError(f"no worker is at work on {self.path} (it is {status})", "start a new run" if status == "finished" else "resume it first")
        self.directory.send(command, **details)

    def resume(self, *, accept: Sequence[str] = (), inline: bool = False, panel: bool = True, **changes: Any) -> Run:
        """Goes on: a paused run at once, a stopped, failed or lost one from its newest good checkpoint.

        What the run was started with must lie there as it was. What has changed since goes into ``accept`` by name: ``"recipe"``, ``"data"``,
        ``"held_out"``, ``"model"`` or ``"versions"``. The run then is no longer the one that was started, and its diary says so. ``changes``
        are fields of the recipe that leave weights and rows as they are, such as ``checkpoint_layers=20`` or ``retry="smaller"`` after memory
        ran out.

        Raises RunChanged, which names all that changed; RunBusy; RecipeError; RunError on a finished run.
        """
        status = self.status
        if status == "paused":
            self.directory.send("resume")
            return self
        if status == "finished":
            raise RunError(f"{self.path} is finished: there is nothing left to do", "to train longer, start a new run with more epochs or max_steps")
        accept = [accept] if isinstance(accept, str) else list(accept)
        if changes:
            inputs.change_recipe(self.directory, changes)
            accept.append("recipe")
        if not self.directory.is_alive:
            self.directory.take_commands()  # what was asked of a worker that is gone is not asked of the next
        if inline:
            launch.run_inline(self.directory, accept)
        else:
            launch.start(self.directory, accept)
        if panel and not inline:
            self._look(starting=True)
        return self

    def wait(self, timeout_seconds: float | None = None) -> Run:
        """Blocks until the run is over. Ctrl-C (interrupting the kernel) stops the run gracefully and waits for that; a second one only waits no more.

        Raises RunFailed with the worker's own fact and fix, TimeoutError.
        """
        try:
            launch.wait(self.directory, timeout_seconds, on_look=self._watch)
        except KeyboardInterrupt:
            if self.directory.is_alive:
                self.stop("interrupted in the notebook")
            launch.wait(self.directory, timeout_seconds, on_look=self._watch)
        finally:
            if self._panel is not None and not self.directory.is_alive:
                self._panel.freeze()
        return self

    def _watch(self) -> None:
        """While this thread waits, it moves the panel where no other thread can."""
        if self._panel is not None:
            self._panel.tick()

    # looking

    def panel(self) -> Run | None:
        """The live panel, in a notebook, or the picture of a run that is over; elsewhere a summary is printed.

        marimo shows what a cell ends in, so there the run is handed back, which shows itself as its panel.
        """
        from sparklab.panels.resident import in_marimo  # noqa: PLC0415
        from sparklab.panels.terminal import summary  # noqa: PLC0415 - panels only where somebody looks

        if in_marimo():
            return self
        if not self._look():
            print(summary(self.state, self.directory.plan))  # noqa: T201 - what the user asked for
        return None

    def _display_(self) -> Any:
        """What marimo shows for a run."""
        from sparklab.panels.run_panel import LivePanel  # noqa: PLC0415

        self._panel = LivePanel(self.directory)
        return self._panel._display_()

    def report(self, path: str | os.PathLike[str] | None = None) -> Path:
        """Writes the run as one HTML file that needs nothing else, and returns where (default: ``report.html`` in the run's directory).

        Raises RunError where it cannot be written.
        """
        from sparklab.panels.report import write_report  # noqa: PLC0415

        return write_report(self.directory, path)

    def _look(self, starting: bool = False) -> bool:
        """Shows the panel where there is a notebook to show it in; ``starting``: a worker is on its way."""
        from sparklab.panels.run_panel import show  # noqa: PLC0415

        self._panel = show(self.directory, starting=starting)
        return self._panel is not None

    def compare(self, prompts: Sequence[str], max_new_tokens: int | None = None) -> Comparison:
        """Base and tuned, side by side, on the same prompts (greedy), in a process of its own. ``max_new_tokens``: default is ``answer_tokens``.

        Raises RunError where there are no prompts, or they are no texts.
        """
        from sparklab.panels.tables import Comparison  # noqa: PLC0415

        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise RunError(f"prompts is {one_line(prompts, 80)}; it must be one text or some", 'ask as run.compare(["Hello!"])')
        _at_least_one("max_new_tokens", max_new_tokens)
        answer = ask(self.directory, "compare", prompts=prompts, max_new_tokens=max_new_tokens or self.recipe.answer_tokens)
        return Comparison(rows=tuple(answer["rows"]))

    def evaluate(self, n: int | None = None) -> Evaluation:
        """Held-out loss, and exact match on the first ``n`` held-out records (default: all), of base and tuned, in a process of its own.

        Plain text has nothing to be asked: there ``exact_match`` is NA and ``n`` 0. Raises RunError where ``n`` is below 1.
        """
        from sparklab.panels.tables import Evaluation  # noqa: PLC0415

        _at_least_one("n", n)
        return Evaluation.from_answer(ask(self.directory, "evaluate", n=n))

    def to_dict(self) -> dict[str, Any]:
        """The run in figures, as the CLI's ``--json`` prints it."""
        state = self.state
        best = state.best_eval
        return {
            "run": str(self.path), "status": state.status, "step": state.step, "steps": state.steps, "reason": state.reason, "fix": state.fix,
            "loss": state.losses[-1] if state.losses else None, "best_held_out_loss": best["loss"] if best else None,
            "worker": str(self.directory.owner or "") or None,
            "tokens": state.tokens, "tokens_per_second": state.tokens_per_second, "peak_bytes": state.peak_bytes,
            "warnings": [note["text"] for note in state.messages if note["event"] == "warning"],
        }  # fmt: skip

    def __repr__(self) -> str:
        state = self.state
        return f"Run({str(self.path)!r}: {state.status}, step {state.step} of {state.steps})"


def runs(*places: str | os.PathLike[str]) -> RunTable[Run]:
    """Runs side by side: a table, and in a notebook their loss curves on one axis, live while one of them is at work.

    ``places`` are run directories or folders of runs (default: ``runs``). The table is a sequence of :class:`Run`, ``.best`` the one with the
    lowest held-out loss. Raises RunNotFound where a place is neither.
    """
    from sparklab.panels.runs_panel import RunTable, find  # noqa: PLC0415 - panels only where somebody looks

    return RunTable(find(places or (RUNS,)), Run)


def _at_least_one(name: str, value: int | None) -> None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise RunError(f"{name} is {value!r}; it must be a whole number of at least 1", f"leave {name} out for the default")


def quickstart(method: str = "lora", seed: int = 0, path: str | os.PathLike[str] | None = None, *, panel: bool = True) -> Run:
    """Teaches the bundled tiny model to note a free-text order as JSON, which it cannot do before, and returns the run at once.

    The lesson's records are written beside the run. Raises RecipeError on an unknown method, and what :func:`train` raises.
    """
    target = Path(path) if path is not None else RUNS / f"quickstart-{method}-{seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    return train(lesson(method, seed, target.parent / "lesson"), target, panel=panel)


def quickstart_result(run: Run) -> dict[str, Any]:
    """What the quickstart showed, from the run's events: exact match before and after, time, speed, planned and measured memory."""
    state = run.state
    scored = [entry for entry in state.evals if entry["n"] == entry["n"]]  # NaN where no answers were compared
    finished = next(event for event in reversed(_events(run)) if event["event"] == "finished")
    return {
        "method": run.recipe.method,
        "seed": run.recipe.seed,
        "exact_match_before": scored[0]["exact_match"],
        "exact_match_after": scored[-1]["exact_match"],
        "held_out": int(scored[-1]["n"]),
        "held_out_loss_before": scored[0]["loss"],
        "held_out_loss_after": scored[-1]["loss"],
        "seconds": finished["seconds"],
        "tokens_per_second": round(finished["tokens_per_second"], 1),
        "planned_gib": run.directory.plan["peak_gib"],
        "measured_gib": round(finished["peak_bytes"] / 2**30, 3),
        "run": str(run.path),
    }


def _events(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.directory.events_path.read_text(encoding="utf-8").splitlines()]
