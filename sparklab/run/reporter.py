"""The Trainer callback between the loop and the run directory: writes events, carries out commands."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparklab.box.meter import read_memory
from sparklab.engine import checkpoint
from sparklab.engine.finite import BadUpdate
from sparklab.run.directory import RunDirectory
from sparklab.run.events import EventWriter
from sparklab.run.guard import Floors

MEMORY_SECONDS = 1.0  # between two memory events


class Reporter(TrainerCallback):  # type: ignore[misc]  # transformers is not typed
    """Turns what the Trainer does into events, and commands into what the Trainer does.

    ``stop_reason`` may be set from a signal handler: the update under way is finished, a checkpoint saved, and the loop left.
    """

    def __init__(self, directory: RunDirectory, events: EventWriter, on_samples: Callable[[tuple[str, ...]], None], floors: Floors | None = None) -> None:
        self.directory, self.events, self.floors = directory, events, floors
        self.stop_reason = ""
        self._stop_asked: dict[str, Any] = {}  # the command, where one asked
        self.peak_bytes = 0.0
        self.trainer: Any = None  # set once the Trainer exists
        self._on_samples = on_samples
        self._paused = False
        self._mark = time.perf_counter()
        self._memory_due = 0.0

    # what the Trainer tells

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.events.write("phase", phase="train")
        self._mark = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._obey(control)
        if self.stop_reason:
            control.should_training_stop = True
            control.should_save = state.global_step < state.max_steps
        if state.global_step >= state.max_steps:  # the end has an evaluation and a result of its own
            control.should_evaluate = control.should_save = False

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
        trainer.update_tokens, trainer.update_wait_seconds = 0, 0.0
        self.report_memory(every=MEMORY_SECONDS)
        self._mark = time.perf_counter()

    def on_bad_update(self, bad: BadUpdate, ends: bool) -> None:
        """An update that was not made, because loss or gradients are not finite; ``ends``: the run ends with it."""
        words = f"{bad}; {'nothing of it was used' if ends else 'it was left out'}"
        self.events.write("warning", kind="nonfinite", message=words, step=bad.step, rows=list(bad.rows), lines=list(bad.lines))

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: dict[str, float], **_: Any) -> None:
        self.events.write("eval", step=state.global_step, loss=metrics["eval_loss"], tokens=metrics["eval_tokens"])
        self._on_samples(self.directory.recipe.sample_prompts)
        self._mark = time.perf_counter()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        path = checkpoint.step_path(self.directory.checkpoints_path, state.global_step)
        self.events.write("checkpoint", step=state.global_step, path=f"checkpoints/{path.name}", bytes=checkpoint.size_bytes(path))
        self._mark = time.perf_counter()

    # what the user asks

    def _obey(self, control: TrainerControl) -> None:
        """Carries out the waiting commands; while paused, waits for the next."""
        while True:
            for name, command in self.directory.take_commands():
                self._carry_out(name, command, control)
            if self.stop_reason or not self._paused:
                return
            time.sleep(0.05)
            self._mark = time.perf_counter()

    def _carry_out(self, name: str, command: dict[str, Any], control: TrainerControl) -> None:
        match command["command"]:
            case "stop":
                self.stop_reason = str(command.get("reason") or "asked to stop")
                self._stop_asked = command
                if command.get("by") == "guard":
                    self.events.write("warning", kind="guard", message=self.stop_reason, numbers=command.get("numbers"))
            case "pause" | "resume" as wish:
                self._paused = wish == "pause"
                self.events.write("phase", phase="paused" if self._paused else "train")
            case "checkpoint":
                control.should_save = True
            case "evaluate":
                control.should_evaluate = True
            case "sample":
                prompts = command.get("prompts") or self.directory.recipe.sample_prompts
                self._on_samples(tuple(str(prompt) for prompt in prompts))
        self.events.write("command", name=command["command"], id=name)

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
        snapshot = read_memory()
        fields = {
            "process_bytes": snapshot.rss_bytes,
            "peak_bytes": snapshot.rss_peak_bytes,
            "available_bytes": snapshot.available_bytes,
            "total_bytes": snapshot.total_bytes,
            "free_bytes": snapshot.free_bytes,
            "cached_bytes": snapshot.cached_bytes,
            "swap_used_bytes": snapshot.swap_used_bytes,
            "pressure_percent": snapshot.pressure_percent,
        }
        if self.floors is not None:
            fields["floor_bytes"] = self.floors.soft_bytes
        if torch.cuda.is_available():
            fields["allocated_bytes"] = torch.cuda.max_memory_allocated()
            fields["reserved_bytes"] = torch.cuda.max_memory_reserved()
        self.peak_bytes = max(self.peak_bytes, snapshot.rss_peak_bytes)
        self.events.write("memory", **fields)
