"""What a recipe holds the whole time, and its layers: the base of every ledger."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from sparklab.box import Box
from sparklab.model.anatomy import Anatomy, LinearGroup
from sparklab.model.parts import Linear, Residual
from sparklab.planner import expert_adapters
from sparklab.planner.activations import LayerBytes, layer_bytes
from sparklab.planner.fused import FrozenMlp, with_frozen_mlps
from sparklab.planner.items import LONG_DOCUMENT, Item, filled
from sparklab.planner.kernels import Engine, has_fixed_bytes, kept_with_row
from sparklab.planner.notes import notes_of
from sparklab.planner.recipe import Recipe
from sparklab.planner.sound import too_high


@dataclass(frozen=True)
class Tail:
    """After the last layer: the last norm, bytes a token."""

    kept: float
    backward: float


class Holdings:
    """What one recipe holds on one box all the time. Raises :class:`RecipeError` where recipe and model do not go together."""

    def __init__(self, anatomy: Anatomy, recipe: Recipe, box: Box) -> None:
        self.anatomy, self.recipe, self.box = anatomy, recipe, box
        self.dtype = box.resolve_dtype(recipe.dtype)
        self.width = 2 if self.dtype == "bf16" else 4
        self.adapter_width = self.width if recipe.adapter_dtype == "auto" else 2 if recipe.adapter_dtype == "bf16" else 4
        self.full = recipe.method == "full"
        self.four_bit = recipe.method == "qlora"
        self.adapted: tuple[LinearGroup, ...] = () if self.full else anatomy.targeted(recipe.targets)
        if not self.full and recipe.rank > anatomy.hidden:
            raise too_high(recipe.rank, anatomy.hidden, anatomy.source)
        self.expert_rank = expert_adapters.rank_of(anatomy, recipe)
        self.tokens = filled(recipe.micro_batch_tokens, box.is_gpu)
        layers = recipe.checkpoint_layers
        self.checkpointed = anatomy.layers if layers == "all" else 0 if layers == "none" else min(int(layers), anatomy.layers)
        fixed = any(has_fixed_bytes(block.parts) for block in anatomy.blocks)
        self.engine = Engine(
            compute_bytes=self.width,
            adapter_bytes=self.adapter_width,
            rank=0 if self.full else recipe.rank,
            adapted=frozenset(linear.name for linear in self.adapted),
            train_base=self.full,
            fast=recipe.engine == "fast",
            on_gpu=box.is_gpu,
            expert_rank=self.expert_rank,
            dora=recipe.dora and not self.full,
            unpacked_bytes=self.width if self.four_bit else 0,
            unpacks_into_buffer=self.buffered is not None,
            constant_bytes=4 / 64 if self.four_bit and recipe.double_quantization else 0,
            dropout_mask_bytes=0 if self.full or not recipe.dropout else 1 if box.is_gpu else self.adapter_width,
            tokens=self.tokens if fixed or self.four_bit or not box.is_gpu or (recipe.dora and not self.full) else 1,
            long_apart=box.is_gpu and self.width == 2 and recipe.max_length >= LONG_DOCUMENT,
            longest=recipe.max_length if fixed or not box.is_gpu else 1,
        )

    # what stays the whole time

    @cached_property
    def buffered(self) -> LinearGroup | Linear | None:
        """The largest linear layer of our kernels where they unpack 4-bit weights into one buffer, on a GPU: adapted ones and those of frozen MLPs."""
        if not (self.four_bit and self.box.is_gpu and self.recipe.engine == "fast"):
            return None
        ours: list[LinearGroup | Linear] = [] if self.recipe.dropout or self.recipe.dora else [*self.adapted]
        names = frozenset(linear.name for linear in self.adapted)
        fitted = (part for block in self.anatomy.blocks for part in with_frozen_mlps(block.parts, names))
        ours += [linear for part in fitted if isinstance(part, FrozenMlp) for linear in part.members]
        return max(ours, key=lambda linear: linear.inputs * linear.outputs, default=None)

    @cached_property
    def adapter_parameters(self) -> int:
        """Numbers in all A and B, those of experts too, and in DoRA's magnitudes."""
        experts = sum(numbers * count for numbers, count in expert_adapters.all_matrices(self.anatomy, self.expert_rank))
        return experts + sum(linear.count * self.adapter_numbers(linear) for linear in self.adapted)

    def adapter_numbers(self, linear: Linear | LinearGroup) -> int:
        """Numbers in one layer's A and B, and in DoRA's magnitudes."""
        return self.recipe.rank * (linear.inputs + linear.outputs) + (linear.outputs if self.recipe.dora else 0)

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
        return notes_of(self.anatomy, self.recipe, self.dtype, self.width)

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
        adapters = Item("adapters", float(width * count), lambda: f"rank {rank}: {count:,} parameters x {width} B ({name})")
        if (largest := self.buffered) is None:
            return (adapters, moments)
        buffer = Item("dequantisation buffer", float(largest.inputs * largest.outputs * self.width),
                      lambda: f"4-bit weights are unpacked into it, the largest {largest.name}, {largest.outputs:,} x {largest.inputs:,}")  # fmt: skip
        return (adapters, moments, buffer)

    @cached_property
    def _moments_8bit(self) -> float:
        """bitsandbytes' two moments: 1 B a number each and an fp32 scale for 256; fp32 below 4,096 numbers, and always so for an embedding."""
        size, rank = 0.0, self.recipe.rank
        tensors = [(rank * width, linear.count) for linear in self.adapted for width in (linear.inputs, linear.outputs)]
        tensors += [(linear.outputs, linear.count) for linear in self.adapted if self.recipe.dora]
        tensors += expert_adapters.all_matrices(self.anatomy, self.expert_rank)
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
        return Tail(layer.training.kept, max(peak.size for peak in layer.training.backward))

    @cached_property
    def shared(self) -> Item:
        """What all layers look at."""
        size = self.anatomy.table_bytes(self.width) + 3 * 8
        if self.checkpointed and not self.full and self.anatomy.scaled_embedding == "outside":  # the embedding's output is a leaf that waits for its gradient
            size += self.anatomy.hidden * self.width
        own = f" + {self.placed_bytes:,} B" if self.placed_bytes else ""
        return Item("inputs and rotary tables", float(size * self.tokens + self.placed_bytes), lambda: f"{self.tokens:,} tokens x {size} B{own}")

    @cached_property
    def placed_bytes(self) -> int:
        """Where the documents of a row lie, for attention by products."""
        return kept_with_row(self.anatomy.blocks, self.engine)

    @cached_property
    def unpacked(self) -> tuple[Item, ...]:
        """The largest 4-bit weight while it is unpacked; nothing where there is none."""
        if not self.four_bit or self.buffered is not None:
            return ()
        largest = self.anatomy.largest_linear
        return (Item("dequantisation workspace", float(largest.inputs * largest.outputs * self.width),
                     lambda: f"the largest linear ({largest.name}, {largest.outputs:,} x {largest.inputs:,}) in {self.dtype}"),)  # fmt: skip
