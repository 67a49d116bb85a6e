"""The held-out split: records kept out of training, so that what is measured was not learned by heart."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from sparklab.errors import DataError

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]


def split_share(keys: Array, share: float, seed: int) -> Array:
    """Which records are held out, as booleans: ``share`` (0 to 1) of them, at least one and never all; none where share is 0.

    ``keys`` are sixteen bytes a record, the same for the same words: those always land on the same side, so no held-out record was learned
    under another line number. Which side is decided by a hash of the words and the seed: shuffling the file changes nothing, and adding
    records moves only a few at the margin. Raises :class:`DataError` where there are not two different records to divide.
    """
    import numpy as np  # noqa: PLC0415

    count = len(keys)
    if share <= 0:
        return np.zeros(count, bool)
    groups, first = group(keys)
    refuse_undivided(count, len(first))
    wanted = min(max(round(share * count), 1), count - 1)
    secret = str(seed).encode()
    digests = b"".join(hashlib.blake2b(key.tobytes(), key=secret, digest_size=8).digest() for key in keys[first])
    by_chance = np.argsort(np.frombuffer(digests, ">u8"), kind="stable")
    sizes = np.bincount(groups)
    held = np.zeros(len(first), bool)
    room = wanted
    for at, size in zip(by_chance.tolist(), sizes[by_chance].tolist(), strict=True):
        if size <= room:
            held[at] = True
            room -= size
            if not room:
                break
    if not held.any():  # every record repeats more often than wanted: the smallest group is the nearest to it
        held[by_chance[np.argmin(sizes[by_chance])]] = True
    chosen: Array = held[groups]
    return chosen


def refuse_undivided(count: int, different: int) -> None:
    """Raises :class:`DataError` where of ``count`` records, so many of them ``different``, none can be held out."""
    if different < 2:
        there = "is one record" if count == 1 else f"are {count:,} records, all the same" if count else "is no record"
        raise DataError(f"there {there}: none can be held out", "add records, or train without: held_out=0")


def group(keys: Array) -> tuple[Array, Array]:
    """For each key the number of its group of equal ones, and where the first of each group stands; groups are numbered as they appear."""
    import numpy as np  # noqa: PLC0415

    halves = np.ascontiguousarray(keys).view(np.uint64).reshape(-1, 2)
    order = np.lexsort((halves[:, 1], halves[:, 0]))  # stable: equal keys stay in the order of the file
    ordered = halves[order]
    starts = np.ones(len(keys), bool)
    starts[1:] = (ordered[1:] != ordered[:-1]).any(1)
    sorted_groups = np.cumsum(starts) - 1
    first = order[starts]  # of each group as sorted, the place of its first member
    by_appearance = np.argsort(first, kind="stable")
    renumbered = np.empty(len(first), np.int64)
    renumbered[by_appearance] = np.arange(len(first))
    groups = np.empty(len(keys), np.int64)
    groups[order] = renumbered[sorted_groups]
    return groups, first[by_appearance]


def duplicates(keys: Array) -> int:
    """How many records repeat an earlier one word for word."""
    return len(keys) - len(group(keys)[1])


def overlap(keys: Array, others: Array) -> int:
    """How many of ``others`` are word for word among ``keys``."""
    import numpy as np  # noqa: PLC0415

    groups, _ = group(np.concatenate([keys, others]))
    return int(np.isin(groups[len(keys) :], groups[: len(keys)]).sum())
