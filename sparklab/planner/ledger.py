"""The memory ledger: what a recipe holds in every phase, line by line, from the model's anatomy alone.

A phase is a list of *moments* (the loss, the backward pass of one layer, the optimizer's step ...). A phase's lines are those of its highest
moment, and the plan's peak is the highest phase; every figure is a sum of lines, and every line carries its formula.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Final

from sparklab.box import Box
from sparklab.errors import RecipeError
from sparklab.model.anatomy import DTYPE_BYTES, Anatomy, LinearGroup
from sparklab.model.parts import Experts, Linear, Part, Residual
from sparklab.planner.activations import LayerBytes, layer_bytes
from sparklab.planner.kernels import Engine, has_fixed_bytes
from sparklab.planner.recipe import Recipe
from sparklab.units import GIB, MIB, is_na

CHUNK_TOKENS: Final = 1024  # tokens whose logits the chunked loss makes at once
ANSWERS_AT_ONCE: Final = 64  # most prompts answered together
CACHE_BYTES: Final = 1.0 * GIB  # most keys and values held while answering, unless a single answer needs more
TENSORS_IN_FLIGHT: Final = 4  # transformers reads so many source tensors at a time while loading
CUBLAS_BYTES: Final = 32.0 * MIB  # its workspace on sm_9x, 10x and 12x, inside the allocator
SLACK_SHARE: Final = 0.03  # reserved but not allocated, of what comes and goes; assumed until a rehearsal measures it
PHASES: Final = ("load", "train", "evaluate", "sample", "save", "merge")


def cache_bytes_per_token(anatomy: Anatomy, width: int) -> int:
    """Bytes of a token's keys and values in all layers, at ``width`` bytes a number."""
    return anatomy.cached_numbers * width


def answers_at_once(anatomy: Anatomy, length: int, width: int) -> int:
    """How many answers of at most ``length`` tokens, prompt included, are generated together: up to 64, while their cache stays within 1 GiB."""
    return max(1, min(ANSWERS_AT_ONCE, int(CACHE_BYTES / (length * cache_bytes_per_token(anatomy, width)))))


@dataclass(frozen=True)
class Item:
    """One line before it is written out: the formula is only put together when somebody reads it."""

    name: str
    size_bytes: float
    explain: Callable[[], str]


def runtime(box: Box) -> Item:
    """What is there before the first tensor."""
    return Item("runtime", box.runtime_bytes, lambda: f"Python, torch, transformers, the device's context ({box.sources.get('runtime_bytes', 'assumed')})")


def slack(box: Box, moving: float) -> tuple[Item, ...]:
    """What libraries take from the allocator, and what it holds beyond what was asked of it; ``moving`` is in bytes, all that comes and goes."""
    measured = not is_na(box.slack_share)
    share = box.slack_share if measured else SLACK_SHARE
    held = Item("allocator slack", share * moving, lambda: f"{share:.1%} of what comes and goes ({'measured' if measured else 'assumed'})")
    if not box.is_gpu:
        return (held,)
    return (Item("library workspace", CUBLAS_BYTES, lambda: f"{CUBLAS_BYTES / MIB:.0f} MiB of cuBLAS, from the allocator"), held)


@dataclass(frozen=True)
class Moment:
    """A point in a phase, with what comes and goes there."""

    name: str
    items: tuple[Item, ...]

    @property
    def size_bytes(self) -> float:
        return sum(item.size_bytes for item in self.items)


@dataclass(frozen=True)
class Tail:
    """After the last layer: the last norm."""

    kept: float
    backward: float


class Ledger:
    """The bytes of one recipe on one box. Raises :class:`RecipeError` where recipe and model do not go together."""

    logits_bytes = 12.0  # most held for one logit where all are made at once: log-softmax, its gradient and the logits', in fp32

    def __init__(self, anatomy: Anatomy, recipe: Recipe, box: Box) -> None:
        self.anatomy, self.recipe, self.box = anatomy, recipe, box
        self.dtype = box.resolve_dtype(recipe.dtype)
        self.width = 2 if self.dtype == "bf16" else 4
        self.adapter_width = self.width if recipe.adapter_dtype == "auto" else 2 if recipe.adapter_dtype == "bf16" else 4
        self.full = recipe.method == "full"
        self.four_bit = recipe.method == "qlora"
        self.adapted: tuple[LinearGroup, ...] = () if self.full else anatomy.targeted(recipe.targets)
        if not self.full and recipe.rank > anatomy.hidden:
            raise RecipeError(f"rank is {recipe.rank}, above the width {anatomy.hidden} of {anatomy.source}", "use a rank of 8 to 256")
        self.tokens = recipe.micro_batch_tokens
        layers = recipe.checkpoint_layers
        self.checkpointed = anatomy.layers if layers == "all" else 0 if layers == "none" else min(int(layers), anatomy.layers)
        fixed = any(has_fixed_bytes(block.parts) for block in anatomy.blocks)
        self.engine = Engine(
            compute_bytes=self.width,
            adapter_bytes=self.adapter_width,
            rank=0 if self.full else recipe.rank,
            adapted=frozenset(linear.name for linear in self.adapted),
            train_base=self.full,
            dropout_mask_bytes=0 if self.full or not recipe.dropout else 1 if box.is_gpu else self.adapter_width,
            tokens=self.tokens if fixed else 1,
            longest=recipe.max_length if fixed else 1,
        )

    # what stays the whole time

    @cached_property
    def adapter_parameters(self) -> int:
        """Numbers in all A and B."""
        return sum(linear.count * self.recipe.rank * (linear.inputs + linear.outputs) for linear in self.adapted)

    @property
    def trainable(self) -> int:
        return self.anatomy.parameters if self.full else self.adapter_parameters

    @property
    def trained_width(self) -> int:
        """Bytes of a trained number, of its gradient and of each of its moments."""
        return self.width if self.full else self.adapter_width

    @cached_property
    def weights(self) -> tuple[Item, ...]:
        """The base as it stands in memory."""
        parameters = self.anatomy.parameters
        if not self.four_bit:
            return (Item("weights", parameters * self.width, lambda: f"{parameters:,} parameters x {self.width} B ({self.dtype})"),)
        packed, experts = sum(linear.weights for linear in self.anatomy.linears), self.anatomy.expert_parameters
        rest = parameters - packed - experts
        constants = sum(linear.count * self._constants(linear.inputs * linear.outputs) for linear in self.anatomy.linears)
        how = "8-bit, themselves quantised in blocks of 256" if self.recipe.double_quantization else "fp32"
        unpacked = Item("experts", float(experts * self.width), lambda: f"{experts:,} parameters x {self.width} B: 4-bit loading leaves them in {self.dtype}")
        return (
            Item("weights", packed / 2 + rest * self.width,
                 lambda: f"{packed:,} in NF4 x 0.5 B + {rest:,} in embedding, head, norms x {self.width} B ({self.dtype})"),
            Item("quantisation constants", constants, lambda: f"one scale a block of 64, {how}: {constants / packed:.4f} B a 4-bit parameter"),
            *([unpacked] if experts else []),
        )  # fmt: skip

    @property
    def notes(self) -> tuple[str, ...]:
        """What the reader must know of the model beside the figures."""
        experts, notes = self.anatomy.expert_parameters, list(self.anatomy.notes)
        if experts and self.four_bit:
            notes.append(f"the experts ({experts * self.width / GIB:.3g} GiB) stay in {self.dtype}: they are 3-D parameters, only linear layers become 4-bit")
        if experts and not self.full:
            notes.append("adapters go on the attention's linear layers; the experts, which are no linear layers, are not adapted")
        return tuple(notes)

    def _constants(self, weights: int) -> float:
        blocks = -(-weights // 64)
        code = 16 * 4
        if not self.recipe.double_quantization:
            return blocks * 4 + code
        return blocks + -(-blocks // 256) * 4 + 256 * 4 + 4 + code

    @cached_property
    def states(self) -> tuple[Item, ...]:
        """Adapters and the optimizer's moments."""
        width, count, rank = self.trained_width, self.trainable, self.recipe.rank
        name = "fp32" if width == 4 else "bf16"
        if self.recipe.optimizer == "adamw_8bit":
            moments = Item("optimizer", self._moments_8bit, lambda: f"AdamW in 8 bits: {self._moments_8bit / count:.4g} B x {count:,} parameters")
        else:
            moments = Item("optimizer", 2.0 * width * count, lambda: f"AdamW: 2 moments x {count:,} x {width} B ({name}, as the weights)")
        if self.full:
            return (moments,)
        return (Item("adapters", float(width * count), lambda: f"rank {rank}: {count:,} parameters x {width} B ({name})"), moments)

    @cached_property
    def _moments_8bit(self) -> float:
        """bitsandbytes' two moments: 1 B a number each and an fp32 scale for 256; fp32 below 4,096 numbers, and always so for an embedding."""
        size, rank = 0.0, self.recipe.rank
        tensors = [(rank * width, linear.count) for linear in self.adapted for width in (linear.inputs, linear.outputs)]
        if self.full:
            size = 8.0 * self.anatomy.embedding_parameters
            tensors = [(self.anatomy.head_parameters, 1), (self.anatomy.hidden, 1)]
            for block in self.anatomy.blocks:
                matrices = [linear.inputs * linear.outputs for linear in block.linears]
                tensors += [(numbers, block.count) for numbers in matrices]
                tensors += [(part.parameters - (part.inputs * part.outputs if isinstance(part, Linear) else 0), block.count) for part in block.parts]
        return size + sum(count * (2.0 * numbers + 8.0 * -(-numbers // 256) if numbers >= 4096 else 8.0 * numbers) for numbers, count in tensors)

    # the layers

    @cached_property
    def layer_list(self) -> tuple[LayerBytes, ...]:
        """One entry a layer. The first layer's input carries no gradient while the embedding is frozen, unless layers recompute: then it is made to."""
        found: list[LayerBytes] = []
        known: dict[int, LayerBytes] = {}  # layers of one kind share their parts
        for block in self.anatomy.blocks:
            layer = known.get(id(block.parts)) or layer_bytes(block.parts, self.engine)
            known[id(block.parts)] = layer
            found += [layer if found or self.full or self.checkpointed else layer_bytes(block.parts, self.engine, False)] + [layer] * (block.count - 1)
        return tuple(found)

    @cached_property
    def tail(self) -> Tail:
        """The last norm, as a layer of one part."""
        layer = layer_bytes((self.anatomy.last_norm, Residual("normed", "normed", "y", self.anatomy.hidden)), self.engine)
        return Tail(layer.kept, max(layer.backward))

    @cached_property
    def shared(self) -> Item:
        """What all layers look at."""
        size = self.anatomy.table_bytes(self.width) + 3 * 8
        if self.checkpointed and not self.full and self.anatomy.scaled_embedding == "outside":  # the embedding's output is a leaf that waits for its gradient
            size += self.anatomy.hidden * self.width
        return Item("inputs and rotary tables", float(size * self.tokens), lambda: f"{self.tokens:,} tokens x {size} B")

    @cached_property
    def dequantised(self) -> Item | None:
        if not self.four_bit:
            return None
        largest = self.anatomy.largest_linear
        return Item("dequantisation workspace", float(largest.inputs * largest.outputs * self.width),
                    lambda: f"the largest linear ({largest.name}, {largest.outputs:,} x {largest.inputs:,}) in {self.dtype}")  # fmt: skip

    # the moments of a training step

    @cached_property
    def _sums(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Bytes a token of the first n layers' inputs, and of all they keep, for n from 0 on."""
        inputs = accumulate((layer.stream for layer in self.layer_list), initial=0.0)
        return tuple(inputs), tuple(accumulate((layer.kept for layer in self.layer_list), initial=0.0))

    def _kept(self, layers: int) -> tuple[Item, ...]:
        """What the first ``layers`` layers keep for their backward pass."""
        marked = min(self.checkpointed, layers)
        tokens = self.tokens
        inputs = self._sums[0][marked]
        whole = self._sums[1][layers] - self._sums[1][marked]
        items = []
        if marked:
            items.append(Item("checkpoints kept", inputs * tokens, lambda: f"{marked} layers x {inputs / marked:,.0f} B a token x {tokens:,} tokens"))
        if layers > marked:
            count = layers - marked
            items.append(Item("activations kept", whole * tokens, lambda: f"{count} layers x {whole / count:,.0f} B a token x {tokens:,} tokens"))
        return tuple(items)

    @cached_property
    def gradients_of_layers(self) -> tuple[tuple[int, ...], ...]:
        """For each layer, trained numbers of each of its parts, in the order of the backward pass: last part first."""
        found: list[tuple[int, ...]] = []
        known: dict[int, tuple[int, ...]] = {}
        for block in self.anatomy.blocks:
            if id(block.parts) not in known:
                counts = [self._trained(part) for part in reversed(block.parts)]
                for place in (place for place, part in enumerate(reversed(block.parts)) if isinstance(part, Experts)):
                    counts[place : place + 2] = 0, sum(counts[place : place + 2])  # theirs come last, when what they held most of is gone
                known[id(block.parts)] = tuple(counts)
            found += [known[id(block.parts)]] * block.count
        return tuple(found)

    def _trained(self, part: Part) -> int:
        if self.full:
            return part.parameters
        if isinstance(part, Linear) and part.name in self.engine.adapted:
            return self.recipe.rank * (part.inputs + part.outputs)
        return 0

    def _gradients(self, layers: int, parts: int = 0) -> Item:
        """Gradients there when the backward pass has done all but the first ``layers`` layers, and ``parts`` parts of the last of those.

        With ``layers`` at -1 it has done everything, the embedding too.
        """
        if layers < 0 or self.recipe.micro_batches_per_update > 1:
            done = self.trainable
        else:
            done = self._gradients_above[layers] + (sum(self.gradients_of_layers[layers - 1][:parts]) if parts else 0)
        return Item("gradients", float(done * self.trained_width), lambda: f"{done:,} of {self.trainable:,} x {self.trained_width} B")

    @cached_property
    def _gradients_above(self) -> tuple[int, ...]:
        """Trained numbers above the first n layers, for n from 0 on: head and last norm with full fine-tuning, then layer by layer."""
        done = self.anatomy.vocabulary * self.anatomy.hidden + self.anatomy.last_norm.parameters if self.full else 0
        sums = [done]
        for counts in reversed(self.gradients_of_layers):
            done += sum(counts)
            sums.append(done)
        return tuple(reversed(sums))

    def _head(self) -> float:
        """Bytes of the head's gradient while it is not yet in its place."""
        return float(self.anatomy.vocabulary * self.anatomy.hidden * self.width) if self.full else 0.0

    def _loss(self) -> Moment:
        """The end of the forward pass, where the loss makes its tile of logits."""
        anatomy, tokens, width = self.anatomy, self.tokens, self.width
        hidden, vocabulary = anatomy.hidden, anatomy.vocabulary
        after = self.tail.kept + hidden * width
        items = [*self._kept(anatomy.layers), Item("last norm", after * tokens, lambda: f"{after:,.0f} B a token x {tokens:,} tokens")]
        if self.recipe.loss == "chunked":
            rows = min(CHUNK_TOKENS, tokens)
            # logsumexp makes a copy of the logits inside; the copies in the head's type, before and after it, are smaller.
            items.append(Item("loss", 2.0 * hidden * width * tokens, lambda: f"supervised states, their gradients: {tokens:,} x 2 x {hidden:,} x {width} B"))
            items.append(Item("loss tile", 4.0 * rows * vocabulary, lambda: f"{rows:,} tokens x {vocabulary:,} logits x 4 B"))
            what = "logsumexp's copy of the tile, then the slope of the capped logits" if anatomy.capped_logits else "logsumexp's copy of the tile"
            items.append(Item("loss workspace", 4.0 * rows * vocabulary, lambda: f"{what}, {rows:,} x {vocabulary:,} x 4 B"))
        else:
            each = self.logits_bytes + (4.0 if anatomy.capped_logits else 0.0)
            items.append(Item("all logits", each * tokens * vocabulary, lambda: f"{tokens:,} tokens x {vocabulary:,} x {each:.0f} B (with all gradients)"))
        if self.recipe.micro_batches_per_update > 1:
            items.append(self._gradients(-1))
        if self.full:
            # The chunked loss makes it with the logits; after all logits it comes when most of them, 8 B each, are gone.
            left = self._head() if self.recipe.loss == "chunked" else max(0.0, self._head() - 8.0 * tokens * vocabulary)
            items.append(Item("head gradient at work", left, lambda: f"made with the loss: {vocabulary:,} x {hidden:,} x {width} B"))
        return Moment("loss", tuple(items))

    def _tail_backward(self) -> Moment:
        """The start of the backward pass: the loss's gradient is spread over all tokens, then the last norm."""
        hidden, width, tokens = self.anatomy.hidden, self.width, self.tokens
        work = max(self.tail.kept + 3 * hidden * width, self.tail.backward)
        items = (*self._kept(self.anatomy.layers), self._gradients(self.anatomy.layers),
                 Item("last norm", work * tokens, lambda: f"{work:,.0f} B a token x {tokens:,} tokens in its backward pass"))  # fmt: skip
        return Moment("last norm's backward pass", items)

    def _layer_backward(self, index: int) -> Moment:
        """The highest point in the backward pass of one layer, after the layers above it are done: part by part, memory goes and gradients come."""
        layer, tokens = self.layer_list[index], self.tokens
        again = index < self.checkpointed
        points = layer.recompute if again else (0.0, *layer.backward)
        own = (0, *self.gradients_of_layers[index])
        done, highest, place = 0, -1.0, 0
        for position, (size, gradient) in enumerate(zip(points, own, strict=True)):
            done += gradient
            if size * tokens + done * self.trained_width > highest:
                highest, place = size * tokens + done * self.trained_width, position
        what = "recomputed, then its backward pass" if again else "its activations and its backward pass"
        size = points[place]
        items = [*self._kept(index), Item("layer at work", size * tokens, lambda: f"layer {index + 1}, {what}: {size:,.0f} B a token x {tokens:,} tokens")]
        items.append(self._gradients(index + 1, parts=place))
        return Moment(f"backward pass of layer {index + 1}", (*items, *self._workspace))

    def _layer_forward(self, index: int) -> Moment:
        layer, tokens = self.layer_list[index], self.tokens
        size = layer.plain + layer.stream if index < self.checkpointed else layer.forward
        items = [*self._kept(index), Item("layer at work", size * tokens, lambda: f"layer {index + 1} forward: {size:,.0f} B a token x {tokens:,} tokens")]
        if self.recipe.micro_batches_per_update > 1:
            items.append(self._gradients(-1))
        return Moment(f"forward pass of layer {index + 1}", (*items, *self._workspace))

    def _embedding_backward(self) -> Moment:
        """Full fine-tuning ends in the embedding, whose gradient is as large as its weight; a tied one is added to the head's."""
        anatomy, tokens = self.anatomy, self.tokens
        size = anatomy.hidden * self.width
        work = size * (2 if anatomy.scaled_embedding else 1)  # before and after its constant
        extra = self._head() if anatomy.tied_embeddings or self.recipe.micro_batches_per_update > 1 else 0.0
        items = (
            self._gradients(-1),
            Item("layer at work", float(work * tokens), lambda: f"the gradient that reaches the embedding: {work:,} B a token x {tokens:,} tokens"),
            Item("embedding gradient at work", extra, lambda: f"added to the one there is: {anatomy.vocabulary:,} x {size:,} B"),
        )
        return Moment("embedding's backward pass", items)

    def _train(self) -> list[Moment]:
        """The moments that can be highest. Within a run of equal layers the sum changes by the same amount a layer, so its ends suffice."""
        count = self.anatomy.layers
        ends, start = {0, count - 1, max(0, self.checkpointed - 1), min(count - 1, self.checkpointed)}, 0
        for block in self.anatomy.blocks:
            ends |= {start, min(start + 1, count - 1), start + block.count - 1}
            start += block.count
        moments = [self._loss(), self._tail_backward(), self._layer_forward(count - 1), *(self._layer_backward(index) for index in sorted(ends, reverse=True))]
        if self.full:
            moments.append(self._embedding_backward())
        moments.append(Moment("optimizer step", (self._gradients(-1),)))
        return moments

    # the other phases

    def _load(self) -> list[Moment]:
        largest, stack = (
            max(self.anatomy.embedding_parameters, self.anatomy.largest_linear.inputs * self.anatomy.largest_linear.outputs),
            self.anatomy.largest_stack,
        )
        width = DTYPE_BYTES.get(self.anatomy.dtype, 2)
        stream = Item("source tensors", float(TENSORS_IN_FLIGHT * largest * width),
                      lambda: f"{TENSORS_IN_FLIGHT} in flight, none above {largest:,} x {width} B; the page cache behind them can go")  # fmt: skip
        stacked = Item("experts being stacked", float(stack * width), lambda: f"one layer's, {stack:,} x {width} B, as separate tensors before they are one")
        return [Moment("streaming the weights", (stream, stacked)), *([] if self.full else [Moment("making the adapters", self.states[:1])])]

    def _evaluate(self) -> list[Moment]:
        tokens, hidden, width = self.tokens, self.anatomy.hidden, self.width
        vocabulary, plain = self.anatomy.vocabulary, self._plain
        work = Item("layer at work", plain * tokens, lambda: f"one layer forward, nothing kept: {plain:,.0f} B a token x {tokens:,} tokens")
        if self.recipe.loss == "chunked":
            rows = min(CHUNK_TOKENS, tokens)
            tile: tuple[Item, ...] = (
                    Item("loss", 2.0 * hidden * width * tokens, lambda: f"hidden states, all and supervised: {tokens:,} x 2 x {hidden:,} x {width} B"),
                    Item("loss tile", 4.0 * rows * vocabulary, lambda: f"{rows:,} tokens x {vocabulary:,} logits x 4 B"),
                    Item("loss workspace", 4.0 * rows * vocabulary, lambda: f"logsumexp's copy of the tile, {rows:,} x {vocabulary:,} x 4 B"))  # fmt: skip
        else:
            tile = (Item("loss", 1.0 * hidden * width * tokens, lambda: f"hidden states: {tokens:,} x {hidden:,} x {width} B"),
                    Item("all logits", 8.0 * tokens * vocabulary, lambda: f"{tokens:,} tokens x {vocabulary:,} x 8 B (in fp32, and log-softmax)"))  # fmt: skip
        return [Moment("forward pass", (self.shared, work, *self._workspace)), Moment("loss", (self.shared, *tile))]

    @property
    def _plain(self) -> float:
        """Bytes of a token while a layer runs forward without gradients; the model keeps the embedding's output until its last layer is done."""
        return max(layer.plain for layer in self.layer_list) + self.anatomy.hidden * self.width

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

        tables = Item("inputs and rotary tables", self.shared.size_bytes / self.tokens * answers * longest, lambda: f"of {answers * longest:,} tokens")
        attention = 3 * anatomy.hidden * width + 2 * queries + repeated
        grows = answers * (length * (repeated + per_token / anatomy.layers / 2) + 4.0 * anatomy.vocabulary)
        growth = Item("cache growing", grows, lambda: "one layer's keys while a token is appended, keys and values for every head, and the next token's logits")
        return [
            Moment("reading the prompts", (cache(longest), prompts(self._plain, "one layer forward"), mask(1), tables, *self._workspace)),
            Moment("attention over the prompts", (cache(longest), prompts(attention, "one layer's attention"), mask(1 + width), tables)),
            Moment("writing the answers", (cache(length), growth, *self._workspace)),
        ]

    def _save(self) -> list[Moment]:
        count, width = self.trainable, self.trained_width
        copy = 2.0 * count * width if self.box.is_gpu and self.box.unified else 0.0
        why = "tensors leave the device for the file, moments last" if copy else "files are written from where the tensors are"
        return [Moment("checkpoint", (Item("copy to be written", copy, lambda: f"{why}: 2 x {count:,} x {width} B" if copy else why),))]

    def _merge(self) -> list[Moment]:
        largest, width = max(self.adapted, key=lambda linear: linear.inputs * linear.outputs), self.width
        numbers = largest.inputs * largest.outputs
        copies = 2 if self.box.is_gpu and self.box.unified else 1
        what = "the largest, and its copy for the file" if copies == 2 else "the largest"
        work = Item("weights at work", float(copies * numbers * width), lambda: f"one at a time, {what}: {largest.name}, {copies} x {numbers:,} x {width} B")
        return [Moment("merge", (work,))]

    @property
    def _workspace(self) -> tuple[Item, ...]:
        return () if self.dequantised is None else (self.dequantised,)

    # the books

    @cached_property
    def moments(self) -> dict[str, tuple[Moment, ...]]:
        """Phase to its moments, each with everything that is held then."""
        stays = (*self.weights, *self.states, runtime(self.box))
        phases = {"load": self._load(), "train": self._train(), "evaluate": self._evaluate(), "sample": self._sample(), "save": self._save()}
        books = {}
        for phase, candidates in phases.items():
            there = (*self.weights, runtime(self.box)) if phase == "load" else stays
            shared = (self.shared,) if phase == "train" else ()
            whole = []
            for moment in candidates:
                moving = (*moment.items, *shared)
                whole.append(Moment(moment.name, (*there, *moving, *slack(self.box, sum(item.size_bytes for item in moving)))))
            books[phase] = tuple(whole)
        if not self.full:
            books["merge"] = tuple(Moment(moment.name, (*self.states[:1], runtime(self.box), *moment.items)) for moment in self._merge())
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
