"""The same recipe on stock transformers and PEFT, without this package: what it would need elsewhere.

What differs: all logits at once, adapters in fp32 (PEFT's default) under autocast or without, rows of a batch padded to one length instead of
packed, and with a padding mask keys and values repeated for every query head.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

from sparklab.box import Box
from sparklab.errors import RecipeError
from sparklab.model.anatomy import Anatomy
from sparklab.planner.items import Item
from sparklab.planner.ledger import Ledger
from sparklab.planner.recipe import DType, Recipe

# Most bytes held for one logit, by transformers version. Traced on 5.23 (10 forward, 12 backward); derived for the older ones: logits in fp32, a shifted
# copy of them, log-softmax and the logits' gradient in bf16; a fused loss writes its gradient over the copy.
LOGITS_BYTES: Final = {"4.45": 14.0, "4.45 with a fused loss": 8.0, "4.48": 14.0, "5.23": 12.0}


@dataclass(frozen=True, kw_only=True)
class Stack:
    """A way to train without this package."""

    version: str = "5.23"
    """Of transformers; the loss's memory depends on it."""
    autocast: bool = True
    """``bf16=True`` of its Trainer; without it every adapter sees an fp32 copy of its input."""
    adapter_dtype: DType = "fp32"
    """Of the adapters' weights; PEFT's default is fp32."""
    masked: bool = False
    """Rows are padded, so attention gets a mask."""
    copies_attention: bool = False
    """The attention's output is copied into another order before its projection."""
    keeps_unpacked_inputs: bool = False
    """The bitsandbytes of the day keeps the input of every product with a 4-bit weight (until 0.46)."""


class StockLedger(Ledger):
    """The bytes of a recipe on a stock stack: ``micro_batch_tokens`` are batch times padded length.

    Raises :class:`RecipeError` for a version whose loss is not known.
    """

    def __init__(self, anatomy: Anatomy, recipe: Recipe, box: Box, stack: Stack | None = None) -> None:
        stack = stack or Stack()
        if stack.version not in LOGITS_BYTES:
            raise RecipeError(f"what the loss of transformers {stack.version} holds is not known", f"use one of {', '.join(LOGITS_BYTES)}")
        changes = {"loss": "full", "engine": "stock", **({} if recipe.method == "full" else {"adapter_dtype": stack.adapter_dtype})}
        super().__init__(anatomy, recipe.replace(**changes), box)
        self.stack = stack
        self.logits_bytes = LOGITS_BYTES[stack.version]
        low = stack.autocast and not self.full and stack.adapter_dtype == "fp32"
        self.engine = replace(
            self.engine,
            adapter_bytes=self.width if low else self.engine.adapter_bytes,
            autocast=low,
            repeats_heads=stack.masked,
            joins_documents=stack.copies_attention,
            keeps_unpacked_inputs=stack.keeps_unpacked_inputs,
        )

    @cached_property
    def states(self) -> tuple[Item, ...]:
        """Beside adapters and moments what autocast keeps: the adapters once more, in bf16."""
        count = self.adapter_parameters if self.engine.autocast else 0
        copy = Item("adapters under autocast", float(count * self.width), lambda: f"{count:,} parameters x {self.width} B ({self.dtype})")
        return (*super().states, copy)
