"""The moments of a training step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import accumulate
from math import prod

from sparklab.model.parts import Experts, Part
from sparklab.planner import expert_adapters
from sparklab.planner.frozen_experts import FrozenExperts
from sparklab.planner.fused import linears_of
from sparklab.planner.holdings import Holdings
from sparklab.planner.items import BESIDE_RECORDING, Item, Moment, loss_tile
from sparklab.planner.recording import attention_is_recorded, why_not_recorded
from sparklab.planner.tape import Peak


class Step(Holdings):
    """What comes and goes while a recipe trains."""

    logits_bytes = 12.0  # most held for one logit where all are made at once: log-softmax, its gradient and the logits', in fp32

    @cached_property
    def _sums(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Bytes a token of the first n layers' inputs, and of all they keep, for n from 0 on."""
        inputs = accumulate((layer.stream for layer in self.layer_list), initial=0.0)
        return tuple(inputs), tuple(accumulate((layer.training.kept for layer in self.layer_list), initial=0.0))

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
        """For each layer, trained numbers whose gradients come in the backward pass of each of its parts: last part first."""

        def counts(parts: Sequence[Part]) -> list[int]:
            found: list[int] = []
            late = 0
            for part in parts:
                trained = self._trained(part)
                if isinstance(part, Experts) and self._at_once(part):  # while they are made they are counted as the experts' workspace
                    found.append(0)
                    late = trained
                elif isinstance(part, Experts):  # cut where down's comes, and where those of gate and up come
                    inner = sum(prod(shape) for name, shape in part.tensors if name.startswith("experts.gate_up")) if self.full else 0
                    found += [0, trained - inner, inner]
                else:
                    found.append(trained + late)
                    late = 0
            return found

        return self._of_parts(counts)

    @cached_property
    def added_in_layers(self) -> tuple[tuple[int, ...], ...]:
        """The same, of the largest tensor alone: gradients that are added to those of earlier micro-batches come and go one by one."""

        def counts(parts: Sequence[Part]) -> list[int]:
            found: list[int] = []
            for part in parts:
                sizes = [prod(shape) for _, shape in part.tensors] if self.full else [self._trained(part)]
                if isinstance(part, Experts):
                    found += [0] if self._at_once(part) else [0, sorted(sizes)[-2], max(sizes)] if self.full else [0, 0, 0]
                else:
                    found.append(max(sizes, default=0))
            return found

        return self._of_parts(counts)

    def _at_once(self, part: Experts) -> bool:
        """Whether a layer's experts are one function, whose backward pass is one stretch."""
        return bool(self.expert_rank) or isinstance(part, FrozenExperts)

    def _of_parts(self, count: Callable[[Sequence[Part]], list[int]]) -> tuple[tuple[int, ...], ...]:
        """One tuple a layer, counted once for each kind of layer."""
        known = {id(layer): tuple(count(layer.parts[::-1])) for layer in dict.fromkeys(self.layer_list)}
        return tuple(known[id(layer)] for layer in self.layer_list)

    def _trained(self, part: Part) -> int:
        if self.full:
            return part.parameters
        if linears := [linear for linear in linears_of(part) if linear.name in self.engine.adapted]:
            return sum(self.adapter_numbers(linear) for linear in linears)
        return sum(expert_adapters.matrices(part, self.expert_rank)) if isinstance(part, Experts) else 0

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

    def _head(self, copies: int = 1) -> Item:
        """The head's gradient while it is not yet in its place."""
        anatomy, width = self.anatomy, self.width
        size = float(anatomy.vocabulary * anatomy.hidden * width) if self.full else 0.0
        return Item("head gradient at work", copies * size, lambda: f"{copies} x {anatomy.vocabulary:,} x {anatomy.hidden:,} x {width} B")

    @property
    def _waiting_head(self) -> tuple[Item, ...]:
        """A tied head's gradient, which waits for the embedding's, beside those of earlier micro-batches."""
        return (self._head(),) if self.anatomy.tied_embeddings and self.recipe.micro_batches_per_update > 1 else ()

    def _loss(self) -> Moment:
        """The end of the forward pass, where the loss makes its tile of logits."""
        anatomy, tokens, width = self.anatomy, self.tokens, self.width
        hidden, vocabulary = anatomy.hidden, anatomy.vocabulary
        after = self.tail.kept + hidden * width
        items = [*self._kept(anatomy.layers), Item("last norm", after * tokens, lambda: f"{after:,.0f} B a token x {tokens:,} tokens")]
        if self.recipe.loss == "chunked":
            each = 2.0 * hidden * width + 4 * 8  # labels shifted, where they are, those that count, and as many as go through the head
            items.append(Item("loss", each * tokens, lambda: f"supervised states, their gradients: {tokens:,} x (2 x {hidden:,} x {width} B + 4 labels x 8 B)"))
            items += self._loss_tile(anatomy.capped_logits)
        else:
            each = self.logits_bytes + (4.0 if anatomy.capped_logits else 0.0)
            items.append(Item("all logits", each * tokens * vocabulary, lambda: f"{tokens:,} tokens x {vocabulary:,} x {each:.0f} B (with all gradients)"))
        if self.recipe.micro_batches_per_update > 1:
            items.append(self._gradients(-1))
        if self.full:
            # The chunked loss makes it with the logits; after all logits it comes when most of them, 8 B each, are gone.
            left = self._head().size_bytes - (0.0 if self.recipe.loss == "chunked" else 8.0 * tokens * vocabulary)
            items.append(Item("head gradient at work", max(0.0, left), lambda: f"made with the loss: {vocabulary:,} x {hidden:,} x {width} B"))
        return Moment("loss", tuple(items))

    def _beside_recording(self) -> Item:
        """What the loss takes of the allocator where the layers' two passes are CUDA graphs, whose memory nothing else can use in between."""
        width, tokens = self.anatomy.hidden * self.width, self.tokens
        size = sum(item.size_bytes for item in self._loss().items if item.name.startswith(("loss", "all logits"))) + 2.0 * width * tokens
        return Item(BESIDE_RECORDING, size, lambda: f"the loss's memory, and the last states and their gradient: 2 x {tokens:,} x {width:,} B")

    def _loss_tile(self, slope: bool) -> list[Item]:
        """What the chunked loss makes: logits in the head's type, and some of their rows in fp32, where capped ones have a slope beside them."""
        sizes, width, vocabulary = loss_tile(self.box.is_gpu), self.width, self.anatomy.vocabulary
        tokens, rows = min(sizes.tokens, self.tokens), min(sizes.rows, self.tokens)
        each = (4 if width < 4 else 0) + (4 if slope else 0)
        items = [Item("loss tile", float(tokens * vocabulary * width), lambda: f"{tokens:,} tokens x {vocabulary:,} logits x {width} B")]
        work = Item("loss workspace", float(each * rows * vocabulary), lambda: f"of {rows:,} of them in fp32: {vocabulary:,} x {each} B")
        return [*items, work] if each else items

    def _tail_backward(self) -> Moment:
        """The start of the backward pass: the loss's gradient is spread over all tokens, then the last norm."""
        hidden, width, tokens = self.anatomy.hidden, self.width, self.tokens
        work = max(self.tail.kept + 3 * hidden * width, self.tail.backward)
        # The gradient of all logits' head comes transposed, and is copied into its place where nothing is there to add it to.
        turned = self.recipe.loss == "full" and not self.anatomy.tied_embeddings and self.recipe.micro_batches_per_update == 1
        items = (*self._kept(self.anatomy.layers), self._gradients(self.anatomy.layers), self._head(int(turned)), *self._waiting_head,
                 Item("last norm", work * tokens, lambda: f"{work:,.0f} B a token x {tokens:,} tokens in its backward pass"))  # fmt: skip
        return Moment("last norm's backward pass", items)

    def _layer_backward(self, index: int) -> Moment:
        """The highest point in the backward pass of one layer, after the layers above it are done: part by part, memory goes and gradients come."""
        layer, tokens = self.layer_list[index], self.tokens
        again = index < self.checkpointed
        points = layer.recompute if again else (Peak(0.0), *layer.training.backward)
        added = self.recipe.micro_batches_per_update > 1  # to those of earlier micro-batches: one at a time is there twice
        own = (0, *(self.added_in_layers if added else self.gradients_of_layers)[index])
        done, highest, place = 0, -1.0, 0
        for position, (point, gradient) in enumerate(zip(points, own, strict=True)):
            done = gradient if added else done + gradient
            if point.size * tokens + done * self.trained_width > highest:
                highest, place = point.size * tokens + done * self.trained_width, position
        what = "recomputed, then its backward pass" if again else "its activations and its backward pass"
        items = [*self._kept(index), *self._at_work(points[place], f"layer {index + 1}, {what}"), self._gradients(index + 1, parts=place), *self._waiting_head]
        if added and own[place]:
            numbers, width = own[place], self.trained_width
            items.append(Item("gradient at work", float(numbers * width), lambda: f"to be added to the one there is: {numbers:,} x {width} B"))
        return Moment(f"backward pass of layer {index + 1}", tuple(items))

    def _layer_forward(self, index: int) -> Moment:
        layer, tokens = self.layer_list[index], self.tokens
        point = Peak(layer.plain.size + layer.stream, layer.plain.unpacked) if index < self.checkpointed else layer.training.forward
        items = [*self._kept(index), *self._at_work(point, f"layer {index + 1} forward")]
        if index and not self.checkpointed and not self.layer_list[0].training.keeps_input:
            size = self.layer_list[0].stream  # the decoder's own variable holds it until its last layer returns
            items.append(Item("embedding's output", size * tokens, lambda: f"{tokens:,} tokens x {size:,.0f} B"))
        if self.recipe.micro_batches_per_update > 1:
            items.append(self._gradients(-1))
        return Moment(f"forward pass of layer {index + 1}", tuple(items))

    def _at_work(self, point: Peak, what: str) -> tuple[Item, ...]:
        """What a layer holds at its highest point, a 4-bit weight that is unpacked there on a line of its own."""
        tokens, size = self.tokens, point.size - point.unpacked
        work = Item("layer at work", size * tokens, lambda: f"{what}: {size:,.0f} B a token x {tokens:,} tokens")
        if not point.unpacked:
            return (work,)
        numbers = point.unpacked * tokens
        return work, Item("dequantisation workspace", numbers, lambda: f"one linear layer's weight in {self.dtype}, and its constants: {numbers:,.0f} B")

    def _embedding_backward(self) -> Moment:
        """Full fine-tuning ends in the embedding, whose gradient is as large as its weight; a tied one is added to the head's."""
        anatomy, tokens = self.anatomy, self.tokens
        size = anatomy.hidden * self.width
        work = size * (2 if anatomy.scaled_embedding else 1)  # before and after its constant
        extra = int(self.recipe.micro_batches_per_update > 1)
        if anatomy.tied_embeddings:  # all logits' head has a gradient that is a view, to which nothing is added in place
            extra += 1 + int(self.recipe.loss == "full")
        items = (
            self._gradients(-1),
            Item("layer at work", float(work * tokens), lambda: f"the gradient that reaches the embedding: {work:,} B a token x {tokens:,} tokens"),
            Item(
                "embedding gradient at work",
                float(extra * anatomy.vocabulary * size),
                lambda: f"{extra} x {anatomy.vocabulary:,} x {size:,} B, before they are one",
            ),
        )
        return Moment("embedding's backward pass", items)

    def _train(self) -> list[Moment]:
        """The moments that can be highest. Within a run of equal layers the sum changes by the same amount a layer, so its ends suffice."""
        count = self.anatomy.layers
        ends, start = {0, count - 1, max(0, self.checkpointed - 1), min(count - 1, self.checkpointed)}, 0
        for block in self.anatomy.blocks:
            ends |= {start, min(start + 1, count - 1), start + block.count - 1}
            start += block.count
        moments = [self._tail_backward(), self._layer_forward(count - 1), *(self._layer_backward(index) for index in sorted(ends, reverse=True))]
        if not why_not_recorded(self.recipe, self.box.is_gpu) and attention_is_recorded(self.anatomy):
            beside = self._beside_recording()
            moments = [Moment(moment.name, (*moment.items, beside)) for moment in moments]
        moments.insert(0, self._loss())
        if self.full:
            moments.append(self._embedding_backward())
        moments.append(Moment("optimizer step", (self._gradients(-1),)))
        return moments
