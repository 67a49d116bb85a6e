"""What one worker does with one run, in order: prepare the data, load the model, train, evaluate, save."""

from __future__ import annotations

import os
import socket
import time
import traceback
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from sparklab.box import Box
from sparklab.box.live import LiveMeter
from sparklab.box.meter import read_memory
from sparklab.data.dataset import Prepared, prepare
from sparklab.engine import checkpoint
from sparklab.engine.answer import answer, exact_match
from sparklab.engine.cap import cap_device
from sparklab.engine.fast import left_to_stock, ready_model
from sparklab.engine.memory import give_back, is_out_of_memory
from sparklab.engine.trainer import PackedTrainer
from sparklab.model import load
from sparklab.run import guard, inputs
from sparklab.run.directory import RunDirectory
from sparklab.run.events import EventReader, EventWriter, recall
from sparklab.run.exhausted import Exhausted
from sparklab.run.guard import Floors
from sparklab.run.reporter import Reporter
from sparklab.text import first_line, one_line


class Session:
    """One worker's work on one run."""

    def __init__(self, directory: RunDirectory, events: EventWriter, began: float, floors: Floors | None = None) -> None:
        self.directory, self.events, self.began, self.floors = directory, events, began, floors
        self.recipe = directory.recipe
        self.box = Box.detect()
        self.reporter = Reporter(directory, events, self._sample, LiveMeter(self.box.unified, on_gpu=torch.cuda.is_available()), floors)
        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()

    def ask_to_stop(self, reason: str) -> None:
        """Finish the update under way, save a checkpoint, leave. Safe in a signal handler."""
        self.reporter.stop_reason = reason

    def run(self) -> None:
        """From wherever the run stands to its end, or to a stop. Raises :class:`Exhausted.error` where memory runs out, with all given back."""
        try:
            self._run()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            found = self._exhausted(error)
            traceback.clear_frames(error.__traceback__)
        else:
            return
        self.__dict__.pop("model", None)
        self.reporter.trainer = None
        give_back()
        raise found.error(self.recipe, self.directory.plan, Box.detect())

    def _exhausted(self, error: BaseException) -> Exhausted:
        trainer = self.reporter.trainer
        snapshot = read_memory()
        return Exhausted(
            phase=(trainer.where if trainer is not None else "") or self.reporter.phase, step=trainer.state.global_step if trainer is not None else 0,
            words=one_line(first_line(error)),
            measured_bytes=float(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else snapshot.rss_peak_bytes,
            available_bytes=snapshot.available_bytes, stuck=trainer.stuck if trainer is not None else "",
        )  # fmt: skip

    def _run(self) -> None:
        checkpoint.clear_leftovers(self.directory.path)
        checkpoint.clear_leftovers(self.directory.checkpoints_path)
        resume_from, complaints = checkpoint.newest_good(self.directory.checkpoints_path)
        self._begin(resume_from)
        for complaint in complaints:
            self.events.write("warning", message=f"{complaint}; going on from {resume_from.name if resume_from else 'the start'}")
        for work in (self._prepare, self._load):
            work()
            if self._asked_to_stop():
                return
        trainer = self._trainer()
        if resume_from is None:
            self._evaluate(trainer)
        if not self._train(trainer, resume_from):
            return
        self._evaluate(trainer)
        self._save()
        self._finish(trainer)

    def _begin(self, resume_from: Path | None) -> None:
        """The first word, and what earlier workers left for this one: where their story stood, what was changed on the way."""
        progress = {"step": 0, "told": 0, "tokens": 0, "skipped": 0} if resume_from is None else checkpoint.load_progress(resume_from)
        self.progress, self.resumed_from = progress, None if resume_from is None else progress["step"]
        self.events.told, self.reporter.tokens = progress["told"], progress["tokens"]
        self.events.write(
            "started", pid=os.getpid(), host=socket.gethostname(), device=str(load.pick_device()), dtype=self.box.resolve_dtype(self.recipe.dtype),
            method=self.recipe.method, resumed_from=self.resumed_from, nth=self.events.told,
            soft_floor_bytes=self.floors and self.floors.soft_bytes, hard_floor_bytes=self.floors and self.floors.hard_bytes,
        )  # fmt: skip
        self._tell_of_the_guard()
        past = recall(EventReader(self.directory.events_path).read_new())
        self.reporter.steer(past.steering)
        self.reporter.best_loss = past.best_loss
        accepted = inputs.accepted(self.directory)
        if len(accepted) > past.changes:
            self.events.write("changed", what=accepted[-1])

    def _train(self, trainer: PackedTrainer, resume_from: Path | None) -> bool:
        """True where every update is made; else the run was stopped. A run that ended after its last update has only the rest to do."""
        if resume_from is not None and self.progress["step"] >= trainer.args.max_steps:
            trainer._load_from_checkpoint(str(resume_from))
            trainer.state.global_step = trainer.state.max_steps = self.progress["step"]
            return True
        trainer.watch.skipped = self.progress["skipped"]
        trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
        done = trainer.state.global_step
        if done >= trainer.state.max_steps:
            return True
        self.events.write("stopped", **{"step": done, "reason": "the loop ended early", **self.reporter.stop_words()})
        return False

    def _tell_of_the_guard(self) -> None:
        """What the guard did to the last worker goes from its own file into the diary."""
        left = guard.left_behind(self.directory.path)
        if left is not None:
            self.events.write("warning", kind="guard", message=f"the guard ended the last worker: {left['reason']}", numbers=left["numbers"])
            guard.clear(self.directory.path)

    def _asked_to_stop(self) -> bool:
        """Between the long phases before training; nothing was trained since the last checkpoint, so nothing is saved."""
        self.reporter.obey_before_training()
        if self.reporter.stop_reason:
            self.events.write("stopped", step=self.resumed_from or 0, **self.reporter.stop_words())
        return bool(self.reporter.stop_reason)

    def _prepare(self) -> None:
        self.reporter.enter("prepare")
        self._told = time.monotonic()
        self.tokenizer = load.load_tokenizer(self.recipe.model)
        self.data: Prepared = prepare(self.recipe, self.tokenizer, self.directory.path / "skipped.jsonl", self._tell_prepared)
        self.events.write("data", **self.data.report.to_dict())

    def _tell_prepared(self, records: int, total: int | None) -> None:
        """How far tokenising is, every two seconds."""
        if time.monotonic() - self._told < 2:
            return
        self._told = time.monotonic()
        detail = f"{records:,} records tokenised" if total is None else f"{records:,} of {total:,} records tokenised"
        self.events.write("phase", phase="prepare", detail=detail, share=None if total is None else min(1.0, records / total))

    def _load(self) -> None:
        self.reporter.enter("load")
        self._told = 0.0
        if self.recipe.guard:
            cap_device(self.box.usable_bytes, self.box.runtime_bytes)
        self.model = ready_model(self.recipe, self.box, partial(load.load_base, tell=self._tell_loaded))
        total, trainable = load.count_parameters(self.model)
        self.events.write("model", parameters=total, trainable_parameters=trainable)
        inputs.complete(self.directory)
        for sentence in left_to_stock(self.model):
            self.events.write("warning", kind="stock", message=sentence)

    def _tell_loaded(self, words: str, done_bytes: float, total_bytes: float) -> None:
        """How far the weights are, every two seconds, and the first and last word of it."""
        if time.monotonic() - self._told < 2 and done_bytes != total_bytes:
            return
        self._told = time.monotonic()
        self.events.write("phase", phase="load", detail=words, share=done_bytes / total_bytes if total_bytes else None)

    def _trainer(self) -> PackedTrainer:
        trainer = PackedTrainer(self.model, self.recipe, self.directory.checkpoints_path, self.data.train_rows, self.data.held_out_rows, callback=self.reporter)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.carry = self.reporter.progress
        self.reporter.begin(trainer, self.progress["step"])
        return trainer

    def _evaluate(self, trainer: PackedTrainer) -> None:
        """Held-out loss, and exact match where the recipe wants answers: once before and once after training."""
        if not self.data.held_out_rows:
            return
        self.reporter.enter("evaluate")
        fields: dict[str, Any] = dict(self.exact_match()) if self.recipe.answer_held_out and self.data.held_out_chats else {}
        metrics = trainer.measure_loss()
        self.events.write("eval", step=trainer.state.global_step, loss=metrics["eval_loss"], tokens=metrics["eval_tokens"], **fields)
        self._sample(self.recipe.sample_prompts)
        self.reporter.report_memory()

    def exact_match(self) -> dict[str, float]:
        """Greedy answers to the first ``answer_held_out`` held-out chats against the true ones."""
        chats = self.data.held_out_chats[: self.recipe.answer_held_out]
        prompts = [self.data.encoder.prompt_ids(chat.prompt, chat.tools) for chat in chats]
        given = self._answer(prompts)
        return exact_match(given, [chat.answer for chat in chats])

    def _answer(self, prompts: list[list[int]]) -> list[str]:
        self.reporter.trainer.graphs.make_way()  # a plan counts what answers hold beside the weights, not beside a recorded row
        return answer(self.model, self.tokenizer, prompts, self.recipe.answer_tokens, self.recipe)

    def _sample(self, prompts: tuple[str, ...]) -> None:
        """Answers the prompts and writes each as an event."""
        if not prompts:
            return
        ids = [self.data.encoder.prompt_ids([{"role": "user", "content": prompt}]) for prompt in prompts]
        step, before = self.reporter.trainer.state.global_step, self.reporter.phase
        self.reporter.phase = "sample"
        answers = self._answer(ids)
        self.reporter.phase = before
        for prompt, text in zip(prompts, answers, strict=True):
            self.events.write("sample", step=step, prompt=prompt, text=text)

    def _save(self) -> None:
        """The result, whole or not at all, where PEFT and transformers find it."""
        self.reporter.enter("save")
        with checkpoint.written_whole(self.directory.result_path) as draft:
            checkpoint.save_weights(self.model, draft)
            self.tokenizer.save_pretrained(draft)

    def _finish(self, trainer: PackedTrainer) -> None:
        self.reporter.report_memory()
        state = self.directory.state
        self.events.write(
            "finished", step=trainer.state.global_step, seconds=round(time.perf_counter() - self.began, 3), tokens=self.reporter.tokens,
            tokens_per_second=state.tokens / state.seconds if state.seconds > 0 else None, peak_bytes=self.reporter.peak_bytes,
        )  # fmt: skip
