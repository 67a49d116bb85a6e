"""Reads the fields of a config and collects every fault instead of stopping at the first; what all families share, as one value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

MOST: Final = 10**9  # no number in a config that shapes a model is larger; more is a typing error
MOST_LAYERS: Final = 10_000


class Fields:
    """A config's values, with a family's defaults where it is silent (null is not silence). ``faults`` grows as they are read."""

    def __init__(self, values: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self.values = {**defaults, **values}
        self.faults: list[str] = []

    def count(self, name: str, default: int | None = None, least: int = 1, most: int = MOST) -> int:
        """A whole number from ``least`` to ``most``; ``least`` stands in for a faulty one, so that later checks can go on."""
        value = self.values.get(name)
        if value is None:
            value = default
        if value is None:
            self.faults.append(f"{name} is missing")
        elif not isinstance(value, int) or isinstance(value, bool) or value < least:
            self.faults.append(f"{name} is {_short(value)}; it must be a whole number of at least {least}")
        elif value > most:
            self.faults.append(f"{name} is {_short(value)}; no model has more than {most:,}")
        else:
            return value
        return least

    def flag(self, name: str, default: bool) -> bool:
        value = self.values.get(name, default)
        if not isinstance(value, bool):
            self.faults.append(f"{name} is {_short(value)}; it must be true or false")
            return default
        return value

    def number(self, name: str) -> bool:
        """Whether a number above 0 stands there; null and absence mean none."""
        value = self.values.get(name)
        if value is None:
            return False
        if not isinstance(value, (int, float)) or isinstance(value, bool) or value <= 0:
            self.faults.append(f"{name} is {_short(value)}; it must be null or a number above 0")
            return False
        return True

    def listed(self, name: str, length: int) -> list[Any] | None:
        """A list with one entry a layer; None where there is none."""
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) < length:
            self.faults.append(f"{name} is {_short(value)}; it must be a list with an entry for each of the {length} layers")
            return None
        return value[:length]


def _short(value: Any) -> str:
    """The value as written, cut where nobody reads on."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to write out whole numbers of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= 60 else text[:57] + "..."


@dataclass(frozen=True)
class Mixture:
    """The experts of a layer."""

    experts: int
    active: int
    inner: int
    shared: int = 0
    """Width inside the MLP that every token goes through beside the chosen experts; 0: none."""
    router: str = "softmax"
    """As in :class:`~sparklab.model.parts.Router`."""
    normed: bool = False


@dataclass(frozen=True)
class LatentHeads:
    """The widths of DeepSeek's latent attention."""

    query_rank: int
    """0: queries are not compressed."""
    rank: int
    plain: int
    turned: int
    value: int
    kind: str


@dataclass(frozen=True)
class Shape:
    """The numbers that decoder families share."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    turned: int
    """Numbers of a head that rotary positions turn."""
    attention_bias: bool
    mlp_bias: bool
    capped: bool = False
    """Attention scores are soft-capped."""
    parallel: bool = False
    """The MLP stands beside the attention and not after it."""
    mixture: Mixture | None = None
    latent: LatentHeads | None = None


@dataclass(frozen=True)
class Kind:
    """What sets one layer of a model apart from another."""

    window: int = 0
    turns: bool = True
    """It has rotary positions."""
    sparse: bool = False
    """Experts stand in place of its MLP."""
