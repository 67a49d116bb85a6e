"""The memory ledger: what a recipe holds in every phase, line by line, from the model's anatomy alone.

A phase is a list of *moments* (the loss, the backward pass of one layer, the optimizer's step ...). A phase's lines are those of its highest
moment, and the plan's peak is the highest phase; every figure is a sum of lines, and every line carries its formula.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Final

from sparklab.model.anatomy import DTYPE_BYTES
from sparklab.planner.activations import layer_bytes
from sparklab.planner.items import Item, Moment, answers_at_once, cache_bytes_per_token, runtime, slack
from sparklab.planner.kernels import Engine
from sparklab.planner.step import Step
from sparklab.planner.tape import Peak

TENSORS_IN_FLIGHT: Final = 1  # sparklab.model.stream reads one source tensor after the other
PHASES: Final = ("load", "train", "evaluate", "sample", "save", "merge")


class Ledger(Step):
    """The bytes of one recipe on one box. Raises :class:`RecipeError` where recipe and model do not go together."""

    def _load(self) -> list[Moment]:
        largest, stack = (
            max(self.anatomy.embedding_parameters, self.anatomy.largest_linear.inputs * self.anatomy.largest_linear.outputs),
            self.anatomy.largest_stack,
        )
        width = DTYPE_BYTES.get(self.anatomy.dtype, 2)
        stream = Item("source tensors", float(TENSORS_IN_FLIGHT * largest * width),
                      lambda: f"{TENSORS_IN_FLIGHT} at a time, none above {largest:,} x {width} B; the page cache behind them can go")  # fmt: skip
        stacked = Item("experts being stacked", float(stack * width), lambda: f"one layer's, {stack:,} x {width} B, as separate tensors before they are one")
        return [Moment("streaming the weights", (stream, stacked)), *([] if self.full else [Moment("making the adapters", self.states[:1])])]

    def _evaluate(self) -> list[Moment]:
        tokens, hidden, width = self.tokens, self.anatomy.hidden, self.width
        vocabulary, work = self.anatomy.vocabulary, self._at_work(self._forward(self.engine), "one layer forward, nothing kept")
        if self.recipe.loss == "chunked":
            tile: tuple[Item, ...] = (
                    Item("loss", 2.0 * hidden * width * tokens, lambda: f"hidden states, all and supervised: {tokens:,} x 2 x {hidden:,} x {width} B"),
                    *self._loss_tile(slope=False))  # fmt: skip
        else:
            tile = (Item("loss", 1.0 * hidden * width * tokens, lambda: f"hidden states: {tokens:,} x {hidden:,} x {width} B"),
                    Item("all logits", 8.0 * tokens * vocabulary, lambda: f"{tokens:,} tokens x {vocabulary:,} x 8 B (in fp32, and log-softmax)"))  # fmt: skip
        return [Moment("forward pass", (self.shared, *work)), Moment("loss", (self.shared, *tile))]

    def _forward(self, engine: Engine) -> Peak:
        """A token while a layer runs forward without gradients; the model keeps the embedding's output until its last layer is done."""
        highest = max(layer_bytes(block.parts, engine).plain for block in self.anatomy.blocks)
        return Peak(highest.size + self.anatomy.hidden * self.width, highest.unpacked)

    def _sample(self) -> list[Moment]:
        anatomy, recipe, width = self.anatomy, self.recipe, self.width
        longest, length = recipe.max_length, recipe.max_length + recipe.answer_tokens
        answers = answers_at_once(anatomy, length, width)
        per_token, queries = cache_bytes_per_token(anatomy, width), anatomy.heads * anatomy.head_dim * width
        # Prompts of different lengths are padded; with a mask, attention repeats keys and values for every head.
        repeated = 2 * queries if anatomy.heads > anatomy.kv_heads else 0

        def cache(tokens: int) -> Item:
            return Item("key-value cache", float(answers * tokens * per_token), lambda: f"{answers} answers x {tokens:,} tokens x {per_token:,} B")

        def prompts(size: float, what: str) -> Item:
            return Item("layer at work", size * answers * longest, lambda: f"{what}: {size:,.0f} B a token x {answers} prompts x {longest:,} tokens")

        def mask(size: int) -> Item:
            return Item("mask", float(answers * longest * longest * size), lambda: f"{answers} prompts x {longest:,} x {longest:,} tokens x {size} B")

        plain = self._forward(replace(self.engine, masked=True))
        shared = (self.shared.size_bytes - self.placed_bytes) / self.tokens
        tables = Item("inputs and rotary tables", shared * answers * longest, lambda: f"of {answers * longest:,} tokens")
        attention = 3 * anatomy.hidden * width + 2 * queries + repeated
        grows = answers * (length * (repeated + per_token / anatomy.layers / 2) + 4.0 * anatomy.vocabulary)
        growth = Item("cache growing", grows, lambda: "one layer's keys while a token is appended, keys and values for every head, and the next token's logits")
        return [
            Moment("reading the prompts", (cache(longest), prompts(plain.size - plain.unpacked, "one layer forward"), mask(1), tables, *self.unpacked)),
            Moment("attention over the prompts", (cache(longest), prompts(attention, "one layer's attention"), mask(1 + width), tables)),
            Moment("writing the answers", (cache(length), growth, *self.unpacked)),
        ]

    def _save(self) -> list[Moment]:
        count, width = self.trainable, self.trained_width
        copy = 2.0 * count * width if self.box.is_gpu and self.box.unified else 0.0
        why = "tensors leave the device for the file, moments last" if copy else "files are written from where the tensors are"
        return [Moment("checkpoint", (Item("copy to be written", copy, lambda: f"{why}: 2 x {count:,} x {width} B" if copy else why),))]

    def _merge(self) -> list[Moment]:
        largest, width = max(self.adapted, key=lambda linear: linear.inputs * linear.outputs), self.width
        numbers, name = max((largest.inputs * largest.outputs, largest.name), (self.anatomy.largest_stack if self.expert_rank else 0, "a layer's experts"))
        copies, what = (2, "the largest, and its copy for the file") if self.box.is_gpu and self.box.unified else (1, "the largest")
        work = Item("weights at work", float(copies * numbers * width), lambda: f"one at a time, {what}: {name}, {copies} x {numbers:,} x {width} B")
        return [Moment("merge", (work,))]

    # the books

    @cached_property
    def moments(self) -> dict[str, tuple[Moment, ...]]:
        """Phase to its moments, each with everything that is held then."""
        stays = (*self.weights, *self.states, runtime(self.box))
        phases = {"load": self._load(), "train": self._train(), "evaluate": self._evaluate(), "sample": self._sample(), "save": self._save()}
        books = {}
        for phase, candidates in phases.items():
            there, handles = ((*self.weights, runtime(self.box)), 1) if phase == "load" else (stays, 2)  # evaluations and samples come between updates
            shared = (self.shared,) if phase == "train" else ()
            whole = []
            for moment in candidates:
                moving = (*moment.items, *shared)
                whole.append(Moment(moment.name, (*there, *moving, *slack(self.box, sum(item.size_bytes for item in moving), handles))))
            books[phase] = tuple(whole)
        if not self.full:
            there = (*self.states[:1], runtime(self.box))
            books["merge"] = tuple(Moment(moment.name, (*there, *moment.items, *slack(self.box, moment.size_bytes))) for moment in self._merge())
        return books

    def seen_bytes(self, phase: str, unseen: Mapping[str, float]) -> float:
        """The phase's peak as a meter shows it that misses some lines; ``unseen`` maps a line's name to the share of it that is missed."""
        return max(sum(item.size_bytes * (1 - unseen.get(item.name, 0.0)) for item in moment.items) for moment in self.moments[phase])

    @cached_property
    def phases(self) -> dict[str, tuple[str, tuple[Item, ...]]]:
        """Phase to (its highest moment, that moment's lines)."""
        highest = {phase: max(moments, key=lambda moment: moment.size_bytes) for phase, moments in self.moments.items()}
        return {phase: (moment.name, moment.items) for phase, moment in highest.items()}

    @cached_property
    def peaks(self) -> dict[str, float]:
        """Phase to its bytes."""
        return {phase: sum(item.size_bytes for item in items) for phase, (_, items) in self.phases.items()}

    @cached_property
    def peak_phase(self) -> str:
        return max(self.peaks, key=lambda phase: self.peaks[phase])

    @property
    def peak_bytes(self) -> float:
        return self.peaks[self.peak_phase]
