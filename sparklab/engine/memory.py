"""When memory runs out: recognised whatever raised it, and made room for by taking the same update in smaller pieces.

A packed row of documents is a sum over documents: none sees another, and the loss of an update is a mean over all its supervised tokens. So a
row taken in pieces, cut only between documents, gives the same update up to rounding, and holds the activations of one piece at a time.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from sparklab.data.packed import Row

_WORDS: Final = (
    "out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory", "alloc_failed", "nv_err_no_memory",
    "errormemoryallocation", "bad_alloc",
)  # fmt: skip
"""What allocators, drivers and libraries say that have no exception of their own: CUDA's runtime and driver, cuBLAS, bitsandbytes, C++."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error means that memory ran out: torch's, Python's, the system's, or one known by its words alone."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if isinstance(error, OSError) and error.errno == 12:  # ENOMEM
        return True
    return isinstance(error, (RuntimeError, OSError)) and any(words in str(error).lower() for words in _WORDS)


def give_back() -> None:
    """Returns to the system what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def pieces(inputs: dict[str, Tensor], most_tokens: int) -> list[dict[str, Tensor]]:
    """One packed row [1, T] as rows of at most ``most_tokens`` tokens, cut between documents; a longer document stands alone."""
    borders = inputs["cu_seq_lens_q"]
    marks = borders.tolist()
    if marks[-1] <= most_tokens:
        return [inputs]
    found = []
    for first, last in _groups(marks, most_tokens):
        start, end = marks[first], marks[last]
        cut = {name: tensor[:, start:end] for name, tensor in inputs.items() if name != "cu_seq_lens_q"}
        found.append({**cut, "cu_seq_lens_q": borders[first : last + 1] - start})
    return found


def _groups(marks: Sequence[int], most_tokens: int) -> list[tuple[int, int]]:
    """Which documents go together, as (first, one past the last) indices into ``marks``: as many as fit, in their order."""
    groups, first = [], 0
    for last in range(1, len(marks)):
        if last - first > 1 and marks[last] - marks[first] > most_tokens:
            groups.append((first, last - 1))
            first = last - 1
    return [*groups, (first, len(marks) - 1)]


def longest(rows: Sequence[Row]) -> tuple[int, int]:
    """Tokens of the longest row, and of the longest document in any."""
    row = document = 0
    for one in rows:
        row = max(row, one.boundaries[-1])
        document = max(document, *(after - before for before, after in zip(one.boundaries, one.boundaries[1:], strict=False)))
    return row, document
