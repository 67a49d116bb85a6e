"""Rotary tables of models that turn at another pace once a text is long (longrope, dynamic NTK): each document has its own.

transformers goes by the highest position that it is given, which in a row, as in a batch, is that of the longest document: a short one would be
turned as if it were long wherever a long one stands beside it. Here documents of one pace go through its code together, and no others with them.
Dynamic NTK also remembers the longest text so far; that is forgotten, so that what a row computes depends on the row alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sparklab.engine.device import is_traced
from sparklab.engine.lora import mixed


class ByDocument:
    """Mixed into the class of a rotary embedding of transformers."""

    def forward(self: Any, x: Tensor, position_ids: Tensor, *layer_type: str, **named: str) -> Any:
        """The tables (cos and sin, or one of both) of a row [1, T] whose positions begin at 0 in every document, or of several texts [B, T]."""
        stock = super().forward  # type: ignore[misc]
        layer = layer_type[0] if layer_type else named.get("layer_type")
        kind = self.rope_type if layer is None else self.rope_type[layer]
        if not _changes(kind) or is_traced():
            return stock(x, position_ids, *layer_type, **named)
        dim = 1 if len(position_ids) == 1 else 0
        parts, places = [], []
        for pace, members in _paces(_documents(position_ids.tolist()), self._longest_short(layer), kind):
            if pace and kind != "longrope":
                setattr(self, "max_seq_len_cached" if layer is None else f"{layer}_max_seq_len_cached", self.original_max_seq_len)
            places.append(torch.tensor(members, device=position_ids.device))
            parts.append(stock(x, position_ids.index_select(dim, places[-1]), *layer_type, **named))
        if len(parts) == 1:
            return parts[0]
        order = torch.cat(places).argsort()
        if isinstance(parts[0], Tensor):
            return torch.cat(parts, dim).index_select(dim, order)
        return tuple(torch.cat(tables, dim).index_select(dim, order) for tables in zip(*parts, strict=True))

    def _longest_short(self: Any, layer: str | None) -> int:
        """Tokens of the longest text that is turned at the model's own pace."""
        asked = self.config.rope_parameters if layer is None else self.config.rope_parameters[layer]
        return int(asked.get("original_max_position_embeddings") or self.original_max_seq_len) if "longrope" in asked.values() else self.original_max_seq_len


def _changes(kind: str) -> bool:
    return kind == "longrope" or "dynamic" in kind


def _documents(positions: list[list[int]]) -> Iterator[tuple[int, Iterable[int]]]:
    """(how long a document is, the tokens of the row that are its) one after the other; of several texts, which of them each is."""
    if len(positions) > 1:
        yield from ((max(row) + 1, [number]) for number, row in enumerate(positions))
        return
    (row,) = positions
    starts = [place for place, position in enumerate(row) if position == 0 or place == 0]
    for start, end in zip(starts, [*starts[1:], len(row)], strict=True):
        yield row[end - 1] + 1, range(start, end)


def _paces(documents: Iterable[tuple[int, Iterable[int]]], longest_short: int, kind: str) -> list[tuple[int, list[int]]]:
    """(0 for the model's own pace, else what sets another apart, what turns at it), the model's own first."""
    found: dict[int, list[int]] = {}
    for length, members in documents:
        found.setdefault(0 if length <= longest_short else 1 if kind == "longrope" else length, []).extend(members)
    return sorted(found.items())


def by_document(model: nn.Module) -> None:
    """Puts it into the rotary embeddings of a model that need it."""
    module: Any
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if any(map(_changes, kinds.values() if isinstance(kinds, dict) else [kinds or ""])):
            module.__class__ = mixed(type(module), ByDocument)  # type: ignore[arg-type]
