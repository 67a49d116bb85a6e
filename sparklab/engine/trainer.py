"""The loop: ``transformers.Trainer`` with sparklab's rows, loss and checkpoints put in at its own seams."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, overload

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import record_function
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainingArguments

from sparklab.data.dataset import Row
from sparklab.data.pack import epoch_order
from sparklab.data.report import total_steps
from sparklab.engine import checkpoint
from sparklab.engine.device import on_gpu
from sparklab.engine.finite import BadUpdate, Watch, drop_gradients, weights_are_finite
from sparklab.engine.graphs import Graphs
from sparklab.engine.lora import let_go
from sparklab.engine.loss import IGNORE, chunked_cross_entropy, full_cross_entropy
from sparklab.engine.memory import give_back, is_out_of_memory, longest, pieces
from sparklab.engine.profile import DATA, OPTIMIZER
from sparklab.errors import RecipeError
from sparklab.model.load import causal_lm
from sparklab.planner.items import filled
from sparklab.planner.recipe import Recipe
from sparklab.planner.recording import why_not_recorded


def collate(rows: Sequence[Row]) -> dict[str, Tensor]:
    """One packed row as tensors: [1, T] ids, positions that restart, labels, and the borders of its documents."""
    (row,) = rows  # the row is the micro-batch
    return {
        "input_ids": torch.tensor([row.input_ids]),
        "position_ids": torch.tensor([row.position_ids]),
        "labels": torch.tensor([row.labels]),
        "cu_seq_lens_q": torch.tensor(row.boundaries, dtype=torch.int32),
    }


class EpochSampler(Sampler[int]):
    """Every row once, in an order that depends on seed and epoch alone, so that a resumed run meets the same rows.

    accelerate gives each of ``world`` ranks every ``world``-th of these. Left to itself it would show the first rows a second time where
    ranks do not divide the rows; so the order is filled up, see :func:`epoch_order`.
    """

    def __init__(self, rows: int, seed: int, world: int = 1) -> None:
        self.rows, self.seed, self.world, self.epoch = rows, seed, world, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(epoch_order(self.rows, self.seed, self.epoch, self.world))

    def __len__(self) -> int:
        return self.rows + -self.rows % self.world


class FilledUp(Sequence[Row]):
    """Rows, and one more behind the last, of a single token from which nothing is learned: what a rank computes that has no row left."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        self.blank = Row(input_ids=[0], labels=[IGNORE], position_ids=[0], boundaries=[0, 1])

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | Sequence[Row]:
        return self.blank if index == len(self.rows) else self.rows[index]

    def lines(self, index: int) -> tuple[int, ...]:
        """Where the documents of a row come from; nothing where that is not known."""
        lines = getattr(self.rows, "lines", None)
        return lines(index) if lines is not None and index < len(self.rows) else ()


class PackedTrainer(Trainer):  # type: ignore[misc]  # transformers is not typed
    """Trainer over packed rows: loss from hidden states, a mean over all supervised tokens of an update, checkpoints without pickles."""

    def __init__(
        self, model: nn.Module, recipe: Recipe, folder: Path, train_rows: Sequence[Row], held_out_rows: Sequence[Row], callback: TrainerCallback
    ) -> None:
        self.recipe, self.folder = recipe, folder
        self.update_tokens = self.update_supervised = 0
        self.watch = Watch(recipe.skip_bad_updates)
        self.update_wait_seconds = 0.0  # of the update under way, for its rows
        self.carry: Callable[[], dict[str, Any]] = dict
        """What a checkpoint is to hold beside the Trainer's own state, asked for as it is written."""
        self.where = ""
        """forward, backward, optimizer, evaluate or save: what is being done, and was where an error came."""
        self.row_tokens = recipe.micro_batch_tokens
        """The most tokens that go through the model at once; rows are taken in pieces where it is less than they hold."""
        self.stuck = ""
        """Why they cannot be made smaller still."""
        self._update: list[dict[str, Tensor]] = []
        self._random: dict[str, Any] = {}
        arguments = training_arguments(recipe, folder, len(train_rows), held_out=bool(held_out_rows))
        super().__init__(
            model=model,
            args=arguments,
            data_collator=collate,
            train_dataset=FilledUp(train_rows),
            eval_dataset=held_out_rows if len(held_out_rows) else None,
            callbacks=[callback],
        )
        # compute_loss divides by the supervised tokens of the whole update itself
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        # Thousands of modules are walked through in no time that an update on a fast GPU has: what learns is looked up once.
        self._learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
        model.zero_grad = partial(drop_gradients, self._learned)  # type: ignore[method-assign]
        alone = recipe.micro_batches_per_update == 1
        self.graphs = Graphs(self._learned, recipe.micro_batch_tokens, self._not_recorded(), alone=alone, clear=partial(let_go, model))

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None) -> Tensor:
        """Cross-entropy of one row, as its part of the mean over the ``num_items_in_batch`` supervised tokens of the update."""
        assert not return_outputs, "no logits are ever held"
        self.update_tokens += inputs["input_ids"].numel()
        count = float(num_items_in_batch) if num_items_in_batch is not None else float((inputs["labels"][:, 1:] != IGNORE).sum())
        ranks: int = self.accelerator.num_processes
        self.where = "forward"
        loss = through(model, lambda inside: row_loss(inside, inputs, count, self.recipe.loss, self.graphs)) * ranks  # gradients become means over the ranks
        self.where = "backward"
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Clips, and looks at loss and gradients before the optimizer takes them. Raises :class:`RunFailed` where they are not finite."""
        self.where = "optimizer"
        with record_function(OPTIMIZER):
            norm: Tensor = self.accelerator.clip_grad_norm_(self._learned, self.args.max_grad_norm)
        found = self.watch.judge(norm, self.accelerator)
        if found is not None:
            self._refuse(model, *found)
        return norm

    def _refuse(self, model: nn.Module, loss: float, grad_norm: float, places: list[int]) -> None:
        """Tells of a bad update, drops its gradients, and ends the run unless the recipe lets it pass; what was good until here is saved first."""
        rows = self.rows_of_update()
        suspects = tuple(rows[place] for place in places) or tuple(rows)
        lines_of = getattr(self.train_dataset, "lines", None)
        lines = tuple(sorted({line for row in suspects for line in lines_of(row)})) if lines_of else ()
        bad = BadUpdate(self.state.global_step + 1, loss, grad_norm, suspects, lines, weights_are_finite(model))
        drop_gradients(self._learned)
        ends = self.watch.skipped >= self.watch.allowed or not bad.weights_are_finite
        for callback in self.callback_handler.callbacks:
            if hasattr(callback, "on_bad_update"):
                callback.on_bad_update(bad, ends)
        if ends:
            if bad.weights_are_finite and self.state.global_step and not checkpoint.step_path(self.folder, self.state.global_step).exists():
                self._save_checkpoint(model, None)
                self.callback_handler.on_save(self.args, self.state, self.control)
            raise bad.failure(self.watch.skipped)
        self.watch.skipped += 1

    def _not_recorded(self) -> str:
        """Why rows are not recorded as CUDA graphs, or ""."""
        if self.accelerator.num_processes > 1:
            return "several processes share an update"
        return why_not_recorded(self.recipe, self.args.device.type == "cuda")

    def rows_of_update(self) -> list[int]:
        """Numbers of the training rows in the update under way, of this rank, in the order of its micro-batches."""
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        each = self.recipe.micro_batches_per_update // ranks
        batches = math.ceil(len(self.train_dataset) / ranks)
        updates = math.ceil(batches / each)
        epoch, update = divmod(self.state.global_step, updates)
        order = epoch_order(len(self.train_dataset), self.recipe.seed, epoch, ranks)
        return [int(order[batch * ranks + rank]) for batch in range(update * each, min((update + 1) * each, batches))]

    def train(self, *arguments: Any, **options: Any) -> Any:
        """Trainer's own; what was recorded goes with it."""
        self.model.train()  # a base comes from its files in evaluation mode, under adapters that are not: the model's own word is no sign
        try:
            return super().train(*arguments, **options)
        finally:
            self.graphs.drop()

    def get_batch_samples(self, *arguments: Any, **options: Any) -> Any:
        """Trainer's own, timed: how long an update waits for its data."""
        began = time.perf_counter()
        self._update.clear()
        try:
            with record_function(DATA):
                rows, count = super().get_batch_samples(*arguments, **options)
            for row in rows:  # accelerate has sent all of them to the device; every layer asks the borders for numbers
                row["cu_seq_lens_q"] = row["cu_seq_lens_q"].cpu()
            return rows, None if count is None else float(count)  # read once an update, while the device has nothing to do
        finally:
            self.update_wait_seconds += time.perf_counter() - began

    def _prepare_inputs(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Trainer's own, but for the borders, which stay where they are."""
        rest = {name: tensor for name, tensor in inputs.items() if name != "cu_seq_lens_q"}
        return {**super()._prepare_inputs(rest), "cu_seq_lens_q": inputs["cu_seq_lens_q"]}

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """As :meth:`measure_loss`, and tells the callbacks."""
        metrics = self.measure_loss()
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def measure_loss(self) -> dict[str, float]:
        """Held-out loss as ``eval_loss`` and the supervised tokens it is a mean over as ``eval_tokens``."""
        self.where = "evaluate"
        self.graphs.make_way()  # a plan counts what evaluation holds beside the weights, not beside a training row's memory
        while True:
            try:
                measured = mean_loss(self.model, self.eval_dataset or (), self.recipe.loss, self.args.device, self.row_tokens)
            except Exception as error:
                if not (is_out_of_memory(error) and self._take_less()):
                    raise
            else:
                self.where = ""
                return {"eval_loss": measured["loss"], "eval_tokens": measured["tokens"]}
            let_go(self.model)
            give_back()

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one row. Where memory runs out and the recipe says so, the whole update is taken again in smaller pieces."""
        if self.watch.skipped and not self.watch.has_losses:
            self._tr_loss.zero_()  # the loss Trainer adds up starts anew after a skipped update, which would else stay NaN for ever
        if not self._update and self.recipe.retry == "smaller":
            self._random = checkpoint.rng_state()
        self._update.append(inputs)
        rows = [inputs]
        while True:
            try:
                for row in rows[:-1]:
                    self._tr_loss += self._step(model, row, num_items_in_batch)
                return self._step(model, rows[-1], num_items_in_batch)
            except Exception as error:
                if not (is_out_of_memory(error) and (self._without_graphs() or self._take_less())):
                    raise
            # Out of the handler, so that nothing refers to what the failed pass held. Its gradients may be half there: all of them go, and the
            # update begins again, with the random numbers it had.
            drop_gradients(self._learned)
            let_go(model)
            give_back()
            self.watch.restart()
            self._tr_loss.zero_()
            self.update_tokens = 0
            if self._random:
                checkpoint.set_rng(self._random)
            rows = list(self._update)

    def _step(self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Any) -> Tensor:
        """Forward and backward, once for each piece of the row."""
        if not model.training:
            model.train()
        losses = []
        for piece in pieces(inputs, self.row_tokens):
            row = self._prepare_inputs(piece)
            with self.graphs.row(row):
                loss = self.compute_loss(model, row, num_items_in_batch=num_items_in_batch)
                self.accelerator.backward(loss)
            losses.append(loss.detach())
        total: Tensor = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
        self.watch.note(total)
        return total

    def floating_point_ops(self, inputs: dict[str, Tensor]) -> int:
        """None are counted, see :mod:`sparklab.planner.cost`: Trainer would walk through all modules for it at every row."""
        return 0

    def _without_graphs(self) -> bool:
        """Lets go of recordings, for good; whether there were any. A row that is computed plainly beside them holds its activations a second time."""
        held = self.graphs.held
        if held:
            self.graphs.refuse("memory ran out")
        return held

    def _take_less(self) -> bool:
        """Halves what goes through the model at once, where the recipe allows it and it helps. Documents are never cut for it: what they are
        to teach would change.
        """
        if self.recipe.retry != "smaller" or self.accelerator.num_processes > 1:  # other ranks would wait for this one in the middle of an update
            return False
        row, document = longest(self.train_dataset if self.where != "evaluate" else [*(self.eval_dataset or ()), *self.train_dataset])
        was = min(self.row_tokens, row)
        now = max(was // 2, document)
        if now >= was:
            self.stuck = f"the longest document alone has {document:,} tokens, and documents are not cut to make room"
            return False
        self.graphs.refuse("memory ran out")
        for callback in self.callback_handler.callbacks:
            if hasattr(callback, "on_retry"):
                callback.on_retry(self.where, now, was)
        self.row_tokens = now
        return True

    @property
    def peak_learning_rate(self) -> float:
        """What the schedule is a share of: the recipe's learning rate, or what it was changed to. Setting it holds from the next update on."""
        return float(self.lr_scheduler.base_lrs[0])

    @peak_learning_rate.setter
    def peak_learning_rate(self, peak: float) -> None:
        scheduler = self.lr_scheduler
        for group, base in zip(self.optimizer.param_groups, scheduler.base_lrs, strict=True):
            group["lr"] = group["lr"] * (peak / base)
            group["initial_lr"] = peak
        # The schedulers of transformers multiply these at every update; they are part of the state that checkpoints hold.
        scheduler.base_lrs = [peak for _ in scheduler.base_lrs]
        scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def create_optimizer(self, model: Any = None) -> Any:
        """Trainer's own; bitsandbytes remembers by position which parameters keep fp32 states, and must forget an earlier run of this process."""
        if self.recipe.optimizer == "adamw_8bit":
            from bitsandbytes.optim import GlobalOptimManager  # noqa: PLC0415 - loads only where it is used

            GlobalOptimManager.get_instance().initialize()
        return super().create_optimizer(model)

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        return EpochSampler(len(train_dataset if train_dataset is not None else self.train_dataset), self.recipe.seed, self.accelerator.num_processes)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.where = "save"
        ranks = gather_object([checkpoint.rng_state()])
        if self.accelerator.is_main_process:
            with checkpoint.written_whole(checkpoint.step_path(self.folder, self.state.global_step)) as draft:
                checkpoint.save_weights(self.model, draft)
                checkpoint.save_optimizer(self.optimizer, draft)
                checkpoint.save_scheduler(self.lr_scheduler, draft)
                checkpoint.save_rng(draft, ranks)
                self.state.save_to_json(str(draft / "trainer_state.json"))
                checkpoint.save_progress({"step": self.state.global_step, "skipped": self.watch.skipped, **self.carry()}, draft)
            checkpoint.keep_last(self.folder, self.recipe.keep_checkpoints, self.recipe.keep_best)
        self.accelerator.wait_for_everyone()
        self.where = ""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with checkpoint.reading(Path(resume_from_checkpoint)):
            checkpoint.load_weights(model if model is not None else self.model, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, folder: str | None) -> None:
        if folder is not None:
            with checkpoint.reading(Path(folder)):
                checkpoint.load_optimizer(self.optimizer, Path(folder))
                checkpoint.load_scheduler(self.lr_scheduler, Path(folder))

    def _load_rng_state(self, folder: str | None) -> None:
        if folder is not None:
            with checkpoint.reading(Path(folder)):
                checkpoint.load_rng(Path(folder), self.accelerator.process_index)

    def _load_scaler(self, checkpoint: str | None) -> None:
        """There is none: bf16 needs no scaling, and Trainer's own would read a pickle."""

    def _load_callback_state(self) -> None:
        """Ours keep none in the Trainer's state, and what stands there may be anybody's."""


def mean_loss(model: nn.Module, rows: Sequence[Row], kind: str, device: torch.device, row_tokens: int | None = None) -> dict[str, float]:
    """Mean cross-entropy over all supervised tokens of the rows (NaN for none). Draws no random number, so it changes no later step.

    ``row_tokens``: the most that go through the model at once (None: a row).
    """
    was_training = model.training
    model.eval()
    total = tokens = 0.0
    try:
        with torch.no_grad():
            for row in rows:
                inputs = {name: tensor.to(device) if name != "cu_seq_lens_q" else tensor for name, tensor in collate([row]).items()}
                for piece in [inputs] if row_tokens is None else pieces(inputs, row_tokens):
                    total += float(row_loss(model, piece, 1.0, kind))
                tokens += float((inputs["labels"][:, 1:] != IGNORE).sum())
    finally:
        model.train(was_training)
    return {"loss": total / tokens if tokens else math.nan, "tokens": tokens}


def through(model: nn.Module, compute: Callable[[nn.Module], Tensor]) -> Tensor:
    """``compute`` of the model; of one wrapped for several ranks, called through its wrapper, which must see a forward pass to share gradients.

    The wrapper calls its module's ``forward``, whatever that is: for this one call it is ``compute``.
    """
    if not isinstance(model, DistributedDataParallel):
        return compute(model)
    module = model.module

    def once(*_: Any, **__: Any) -> Tensor:
        del module.forward  # the instance's; its class has its own again before anything inside is called
        return compute(module)

    module.forward = once
    loss: Tensor = model()
    return loss


def last_states(language_model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """A packed row's last hidden states [T, H]."""
    borders = inputs["cu_seq_lens_q"]
    found: Tensor = language_model.get_decoder()(
        input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], use_cache=False, cu_seq_lens_q=borders, cu_seq_lens_k=borders
    ).last_hidden_state.squeeze(0)  # a view back too, where [0] would lay its gradient into zeros
    return found


def row_loss(model: nn.Module, inputs: dict[str, Tensor], count: float, kind: str, graphs: Graphs | None = None) -> Tensor:
    """Sum of the cross-entropies of one packed row's supervised tokens, divided by ``count``; ``graphs``: of the run that trains on it."""
    language_model = causal_lm(model)
    inputs = _filled(inputs)
    decode = partial(last_states, language_model)
    hidden_TH = None if graphs is None else graphs.states(decode, inputs)
    if hidden_TH is None:
        hidden_TH = decode(inputs)
    labels_T = torch.nn.functional.pad(inputs["labels"][0, 1:], (0, 1), value=IGNORE)  # position t predicts token t + 1
    head_VH = language_model.get_output_embeddings().weight
    loss = chunked_cross_entropy if kind == "chunked" else full_cross_entropy
    config = language_model.config  # what transformers' own heads do with logits: Granite divides them, Gemma 2 caps them
    scale, cap = 1.0 / getattr(config, "logits_scaling", 1.0), getattr(config, "final_logit_softcapping", None)
    return loss(hidden_TH, head_VH, labels_T, count, scale=scale, cap=cap)


def _filled(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """A row with as many tokens as :func:`sparklab.planner.items.filled` says: one more document, which teaches nothing."""
    length = inputs["input_ids"].shape[1]
    more = filled(length, on_gpu(inputs["input_ids"])) - length
    if not more:
        return inputs
    pad = torch.nn.functional.pad
    return {
        "input_ids": pad(inputs["input_ids"], (0, more)),
        "labels": pad(inputs["labels"], (0, more), value=IGNORE),
        "position_ids": torch.cat((inputs["position_ids"], torch.arange(more)[None]), 1),
        "cu_seq_lens_q": pad(inputs["cu_seq_lens_q"], (0, 1), value=length + more),
    }


def training_arguments(recipe: Recipe, folder: Path, rows: int, held_out: bool) -> TrainingArguments:
    """The recipe in Trainer's words. Logging every update is ours to read; saving and evaluating keep to the recipe's pace."""
    steps = total_steps(recipe, rows)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))  # as torchrun says it
    if recipe.micro_batches_per_update % ranks:
        fact = f"{ranks} processes cannot share {recipe.micro_batches_per_update} rows an update (micro_batches_per_update) evenly"
        raise RecipeError(fact, f"set micro_batches_per_update to a multiple of {ranks}, or start fewer processes")
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=1,  # one packed row
        gradient_accumulation_steps=recipe.micro_batches_per_update // ranks,  # an update is over as many rows, however many share them
        max_steps=steps,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.schedule,
        warmup_steps=math.ceil(recipe.warmup_share * steps),
        weight_decay=recipe.weight_decay,
        adam_beta1=recipe.betas[0],
        adam_beta2=recipe.betas[1],
        max_grad_norm=recipe.clip_norm,
        optim={"adamw": "adamw_torch_fused", "adamw_8bit": "adamw_bnb_8bit"}[recipe.optimizer],
        seed=recipe.seed,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,  # a NaN is news, not noise
        save_strategy="steps",
        save_steps=recipe.save_every or max(1, math.ceil(steps / 4)),
        eval_strategy="steps" if held_out else "no",
        eval_steps=recipe.eval_every or max(1, math.ceil(steps / 10)),
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,  # one pool: there is nothing to copy faster to
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # of several that it sees, Trainer would take all, a row each, by DataParallel: one process has one
    return arguments
