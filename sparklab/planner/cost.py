"""Time and energy from the roofline: what the chip must compute, what the memory must move, and how close training has come to either.

The optimistic end of every range is the roofline itself (no figure can beat it); the other end adds compute and traffic up, each at the share
of its peak that published runs have reached.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from sparklab.box import Box
from sparklab.model.parts import Attention
from sparklab.planner.ledger import Ledger
from sparklab.units import NA, is_na

# GPU: plain loops reach about 0.4 of the peak (published: 0.50 to 0.64 on an A100 with recomputation counted and tuned kernels).
# CPU: 0.05 of two AMX cores' peak in a bare LoRA loop (measured by us): small matrices and bookkeeping take the time.
COMPUTE_SHARE: Final = {True: 0.40, False: 0.05}  # by "a GPU computes"
BANDWIDTH_SHARE: Final = 0.67  # 180 to 218 of 273 GB/s measured on a Spark

Range = tuple[float, float]


@dataclass(frozen=True)
class Cost:
    """What one micro-batch takes on one device."""

    tokens: int
    flops: float
    moved_bytes: float
    seconds: Range
    """(at the roofline, at the shares reached so far)."""


def flops_per_token(ledger: Ledger) -> float:
    """FLOPs of training on one token: forward, backward, recomputation, adapters, causal attention over a longest document, head.

    Of experts only those that a token is sent to are counted; a sliding window shortens the attention.
    """
    anatomy, recipe = ledger.anatomy, ledger.recipe
    again = ledger.checkpointed / anatomy.layers
    base = 2.0 * sum(linear.weights for linear in anatomy.linears)
    base += 2.0 * sum(block.count * part.active_parameters for block in anatomy.blocks for part in block.experts)
    adapters = 2.0 * ledger.adapter_parameters
    attention = sum(block.count * _attention_flops(part, recipe.max_length) for block in anatomy.blocks for part in block.parts if isinstance(part, Attention))
    head = 2.0 * anatomy.vocabulary * anatomy.hidden
    weight_gradients = 1 if ledger.full else 0
    return base * (2 + weight_gradients + again) + adapters * (3 + again) + attention * (1 + 2.5 + again) + head * (2 + weight_gradients)


def _attention_flops(part: Attention, length: int) -> float:
    """Forward FLOPs a token: two products of every query with the keys it sees, on average half a document or nearly the window."""
    window = min(part.window or length, length)
    seen = window - window * window / (2 * length)
    return 2.0 * seen * part.heads * (part.head_dim + (part.value_dim or part.head_dim))


def moved_bytes(ledger: Ledger) -> float:
    """Memory traffic of one micro-batch: weights once a pass (4-bit ones unpacked on the way), activations, and its share of an optimizer step."""
    anatomy = ledger.anatomy
    passes = 2 + (1 if ledger.full else 0) + ledger.checkpointed / anatomy.layers
    linears = sum(linear.weights for linear in anatomy.linears)
    experts = 0.0  # in 16 or 32 bits whatever the linears are; those that nobody is sent to are not read
    for block in anatomy.blocks:
        for part in block.experts:
            experts += block.count * part.parameters * (1 - (1 - part.active / part.experts) ** ledger.tokens)
    # A 4-bit weight is read (half a byte), written unpacked, and read again by the product.
    each = 0.5 + 2 * ledger.width if ledger.four_bit else ledger.width
    head = 2.0 * anatomy.vocabulary * anatomy.hidden * ledger.width * max(1.0, ledger.tokens / 1024)
    layers = 0.0
    for index, layer in enumerate(ledger.layer_list):
        layers += layer.training.moved_forward * (2 if index < ledger.checkpointed else 1) + layer.training.moved_backward
    # AdamW reads and writes the weight and both moments, and reads the gradient.
    moments = sum(item.size_bytes for item in ledger.states if item.name == "optimizer")
    optimizer = (3.0 * ledger.trainable * ledger.trained_width + 2.0 * moments) / ledger.recipe.micro_batches_per_update
    return (linears * each + experts * ledger.width) * passes + head + layers * ledger.tokens + optimizer


def kind_of_work(ledger: Ledger) -> str:
    """What a share of compute that was measured holds for: method and type, as in ``"lora bf16"``."""
    return f"{ledger.recipe.method} {ledger.dtype}"


def cost(ledger: Ledger) -> Cost:
    """What one micro-batch of the ledger's recipe takes; NA where the box's speed is unknown.

    The slow end is what rehearsals on this box have reached with this kind of work, or else the share published runs have.
    """
    box = ledger.box
    share = box.compute_shares.get(kind_of_work(ledger), COMPUTE_SHARE[box.is_gpu])
    flops, moved = flops_per_token(ledger) * ledger.tokens, moved_bytes(ledger)
    compute, traffic = flops / box.compute_flops(ledger.dtype), moved / box.bandwidth_bytes_per_second
    if is_na(compute):
        return Cost(ledger.tokens, flops, moved, (NA, NA))
    if is_na(traffic):  # an unknown bandwidth leaves the compute bound alone
        traffic = 0.0
    return Cost(ledger.tokens, flops, moved, (max(compute, traffic), compute / share + traffic / BANDWIDTH_SHARE))


def reached_share(cost_: Cost, compute_flops: float, bandwidth_bytes_per_second: float, seconds: float) -> float:
    """The share of compute with which the slow end of :func:`cost` would have been ``seconds``; NA where no share from 0 to 1 would do."""
    traffic = cost_.moved_bytes / bandwidth_bytes_per_second / BANDWIDTH_SHARE
    left = seconds if is_na(traffic) else seconds - traffic
    share = cost_.flops / compute_flops / left if left > 0 else NA
    return share if 0 < share <= 1 else NA


def tokens_per_second(cost_: Cost, box: Box) -> Range:
    """(low, high) tokens per second of all devices side by side."""
    quick, slow = cost_.seconds
    return (box.devices * cost_.tokens / slow, box.devices * cost_.tokens / quick)
