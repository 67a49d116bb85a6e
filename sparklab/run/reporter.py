"""The Trainer callback between the loop and the run directory: writes events, carries out commands."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparklab.box.live import LiveMeter
from sparklab.engine import checkpoint
from sparklab.engine.finite import BadUpdate
from sparklab.run.directory import RunDirectory
from sparklab.run.events import Event, EventWriter, steering
from sparklab.run.guard import Floors
from sparklab.text import one_line
from sparklab.units import jsonable

MEMORY_SECONDS = 1.0  # between two memory events
QUIET_SECONDS = 10.0  # between two that say the same: a run of a day must not drown in them
MOST_PROMPTS = 16  # that one command may ask
LONGEST_PROMPT = 4000  # characters


class _Refused(Exception):
    """A command that cannot be carried out, and why."""


class Reporter(TrainerCallback):  # type: ignore[misc]  # transformers is not typed
    """Turns what the Trainer does into events, and commands into what the Trainer does.

    ``stop_reason`` may be set from a signal handler: the update under way is finished, a checkpoint saved, and the loop left.
    """

    def __init__(self, directory: RunDirectory, events: EventWriter, on_samples: Callable[[tuple[str, ...]], None], meter: LiveMeter,
                 floors: Floors | None = None) -> None:  # fmt: skip
        self.directory, self.events, self.meter, self.floors = directory, events, meter, floors
        self.stop_reason = ""
        self._stop_asked: dict[str, Any] = {}  # the command, where one asked
        self.peak_bytes = 0.0
        self.tokens = 0  # trained on so far, padding not counted
        self.best_loss = math.inf  # held-out, so far
        self._held_out: dict[int, float] = {}  # the last one, by its step
        self.phase = "start"
        self.trainer: Any = None  # set once the Trainer exists
        self._on_samples = on_samples
        self._paused = False
        self._mark = time.perf_counter()
        self._memory_due = self._quiet_until = 0.0
        self._memory_said = (0.0, 0.0)
        self._steering: list[Event] = []
        """What was changed on the way, also what an interruption has undone and is still to come again."""

    # what the Trainer tells

    def steer(self, steering: Sequence[Event]) -> None:
        """What the diary says was changed on the way: it holds for this worker too, from the same updates on."""
        self._steering = list(steering)

    def begin(self, trainer: Any, step: int) -> None:
        """The Trainer that goes on from update ``step``."""
        self.trainer = trainer
        for change in self._steering:
            if change["event"] == "retry" and change["step"] <= step:
                self._apply(change)

    def enter(self, phase: str) -> None:
        """Says what is being done now."""
        self.phase = phase
        self.events.write("phase", phase=phase)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.enter("train")
        for change in self._steering:
            if change["step"] <= state.global_step:
                self._apply(change)
        self._mark = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        for change in self._steering:
            if change["step"] == state.global_step:
                self._apply(change)
        self._obey(control)
        if self.stop_reason:
            control.should_training_stop = control.should_save = True
        if state.global_step >= state.max_steps:  # the end has an evaluation of its own; whatever befalls that, the last update is kept
            control.should_evaluate, control.should_save = False, True

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float], **_: Any) -> None:
        state.log_history.clear()  # events.jsonl is the history
        if "loss" not in logs:
            return
        seconds = time.perf_counter() - self._mark
        trainer = self.trainer
        self.events.write(
            "step", step=state.global_step, steps=state.max_steps, epoch=round(state.epoch or 0.0, 4), loss=logs["loss"],
            learning_rate=logs.get("learning_rate"), grad_norm=logs.get("grad_norm"), tokens=trainer.update_tokens, seconds=round(seconds, 6),
            wait_seconds=round(trainer.update_wait_seconds, 6),
        )  # fmt: skip
        self.tokens += trainer.update_tokens
        trainer.update_tokens, trainer.update_wait_seconds = 0, 0.0
        self.report_memory(every=MEMORY_SECONDS)
        self._mark = time.perf_counter()

    def on_bad_update(self, bad: BadUpdate, ends: bool) -> None:
        """An update that was not made, because loss or gradients are not finite; ``ends``: the run ends with it."""
        words = f"{bad}; {'nothing of it was used' if ends else 'it was left out'}"
        self.events.write("warning", kind="nonfinite", message=words, step=bad.step, rows=list(bad.rows), lines=list(bad.lines))

    def on_retry(self, phase: str, row_tokens: int, was: int) -> None:
        """Memory ran out, and the update is taken again in smaller pieces."""
        self._change("retry", step=self.trainer.state.global_step, phase=phase, row_tokens=row_tokens, was=was)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: dict[str, float], **_: Any) -> None:
        self.events.write("eval", step=state.global_step, loss=metrics["eval_loss"], tokens=metrics["eval_tokens"])
        self._held_out = {state.global_step: metrics["eval_loss"]}
        if metrics["eval_loss"] < self.best_loss:
            self.best_loss = metrics["eval_loss"]
            control.should_save = control.should_save or self.directory.recipe.keep_best
        self._on_samples(self.directory.recipe.sample_prompts)
        self._mark = time.perf_counter()

    def progress(self) -> dict[str, Any]:
        """What a checkpoint of this moment carries for the run: its place in the story, tokens trained on, held-out loss where it was measured."""
        return {"told": self.events.told, "tokens": self.tokens, "held_out_loss": jsonable(self._held_out.get(self.trainer.state.global_step))}

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        path = checkpoint.step_path(self.directory.checkpoints_path, state.global_step)
        self.events.write("checkpoint", step=state.global_step, path=f"checkpoints/{path.name}", bytes=checkpoint.size_bytes(path),
                          held_out_loss=self._held_out.get(state.global_step))  # fmt: skip
        self._mark = time.perf_counter()

    # what the user asks

    def obey_before_training(self) -> None:
        """Of what waits while the run is made ready, a stop is carried out at once; the rest waits for the first update."""
        for name, command in self.directory.take_commands(lambda content: content.get("command") == "stop"):
            self._answer(name, command, TrainerControl())

    def _obey(self, control: TrainerControl) -> None:
        """Carries out the waiting commands; while paused, waits for the next."""
        while True:
            for name, command in self.directory.take_commands():
                self._answer(name, command, control)
            if self.stop_reason or not self._paused:
                return
            time.sleep(0.05)
            self._mark = time.perf_counter()

    def _answer(self, name: str, command: dict[str, Any], control: TrainerControl) -> None:
        """Carries one out, or refuses it, and says so in an event."""
        word, refused = one_line(command.get("command", "?"), 40), False
        try:
            detail = self._carry_out(command, control)
        except _Refused as reason:
            detail, refused = f"refused: {reason}", True
        self.events.write("command", name=word, id=name, refused=refused, detail=detail)

    def _carry_out(self, command: dict[str, Any], control: TrainerControl) -> str:
        """Does what is asked, or sees to it that the Trainer does after this update; what to say about it. Raises :class:`_Refused`."""
        match command.get("command"):
            case "stop":
                self.stop_reason = one_line(command.get("reason") or "asked to stop")
                self._stop_asked = command
                if command.get("by") == "guard":
                    self.events.write("warning", kind="guard", message=self.stop_reason, numbers=command.get("numbers"))
            case "pause" | "resume" as wish:
                if self._paused == (wish == "pause"):
                    raise _Refused("it is paused already" if self._paused else "it is not paused")
                self._paused = wish == "pause"
                self.events.write("phase", phase="paused" if self._paused else "train")
            case "checkpoint":
                control.should_save = True
            case "evaluate":
                if not self.trainer.eval_dataset:
                    raise _Refused("this run held nothing out to evaluate on")
                control.should_evaluate = True
            case "sample":
                self._on_samples(self._prompts(command))
            case "learning_rate":
                return self._change_rate(command.get("learning_rate"))
            case other:
                raise _Refused(f"there is no command {one_line(other, 40)!r}")
        return ""

    def _prompts(self, command: dict[str, Any]) -> tuple[str, ...]:
        prompts = command.get("prompts") or self.directory.recipe.sample_prompts
        if not prompts or not isinstance(prompts, (list, tuple)) or not all(isinstance(prompt, str) and prompt for prompt in prompts):
            raise _Refused("no prompt was given, and the recipe has no sample_prompts" if not prompts else "prompts must be texts")
        if len(prompts) > MOST_PROMPTS or max(map(len, prompts)) > LONGEST_PROMPT:
            raise _Refused(f"at most {MOST_PROMPTS} prompts of {LONGEST_PROMPT:,} characters are answered at once")
        return tuple(prompts)

    def _change_rate(self, wanted: Any) -> str:
        """The schedule as if the recipe's learning_rate had been ``wanted``, from the next update on."""
        if isinstance(wanted, bool) or not isinstance(wanted, (int, float)) or not 0 < wanted < math.inf:
            raise _Refused(f"learning_rate is {one_line(wanted, 40)}; it must be a number above 0")
        state = self.trainer.state
        if state.global_step >= state.max_steps:
            raise _Refused("there is no update left")
        was = self.trainer.peak_learning_rate
        self._change("learning_rate", step=state.global_step, learning_rate=float(wanted), was=was)
        return f"{was:.3g} → {wanted:.3g}"

    def _change(self, kind: str, **fields: Any) -> None:
        """Changes how it goes on: on record first, so that whatever happens next, a resume does the same at the same update."""
        event = self.events.write(kind, **fields)
        self._steering = steering([*self._steering, event])
        self._apply(event)

    def _apply(self, change: Event) -> None:
        if change["event"] == "learning_rate":
            self.trainer.peak_learning_rate = float(change["learning_rate"])
        elif change["event"] == "retry":
            self.trainer.row_tokens = int(change["row_tokens"])

    def stop_words(self) -> dict[str, Any]:
        """Reason, who asked, and the fix, for the ``stopped`` event; what nobody said is left out."""
        words = {"reason": self.stop_reason, "by": self._stop_asked.get("by"), "fix": self._stop_asked.get("fix")}
        return {name: text for name, text in words.items() if text}

    # what it costs

    def report_memory(self, every: float = 0.0) -> None:
        """A memory event, unless the last one is younger than ``every`` seconds."""
        now = time.monotonic()
        if now < self._memory_due:
            return
        self._memory_due = now + every
        look = self.meter.look()
        snapshot = look.memory
        self.peak_bytes = max(self.peak_bytes, look.held_peak_bytes)
        said = (look.held_bytes, snapshot.available_bytes)
        step = snapshot.total_bytes / 256
        if every and now < self._quiet_until and all(abs(new - old) < step for new, old in zip(said, self._memory_said, strict=True)):
            return
        self._memory_said, self._quiet_until = said, now + QUIET_SECONDS
        fields: dict[str, Any] = {
            "process_bytes": look.process_bytes,
            "peak_bytes": look.held_peak_bytes,
            "available_bytes": snapshot.available_bytes,
            "total_bytes": snapshot.total_bytes,
            "free_bytes": snapshot.free_bytes,
            "cached_bytes": snapshot.cached_bytes,
            "swap_used_bytes": snapshot.swap_used_bytes,
            "pressure_percent": snapshot.pressure_percent,
        }
        told: dict[str, Any] = {"others": dict(look.others), "watts": look.device.watts, "celsius": look.device.celsius}
        fields |= {name: value for name, value in told.items() if value == value and value != {}}  # noqa: PLR0124 - what nobody tells is left out
        if look.held_bytes != look.process_bytes:
            fields["held_bytes"] = look.held_bytes
        if self.floors is not None:
            within = snapshot.total_bytes == snapshot.limit_bytes
            fields["floor_bytes"] = self.floors.limit_soft_bytes if within else self.floors.soft_bytes
        if torch.cuda.is_available():
            fields["allocated_bytes"] = torch.cuda.max_memory_allocated()
            fields["reserved_bytes"] = torch.cuda.max_memory_reserved()
        self.events.write("memory", **fields)
