"""The held-out split: records kept out of training, so that what is measured was not learned by heart."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from sparklab.data.record import Record
from sparklab.errors import DataError


@dataclass(frozen=True)
class Split:
    """Records to learn from and records to be asked about, each in the order of their file."""

    train: list[Record]
    held_out: list[Record]
    duplicates: int
    """Records to learn from that repeat an earlier one word for word."""
    overlap: int
    """Held-out records that are also among those learned from; more than 0 only with a held-out file of its own."""


def split_share(chats: Sequence[Record], share: float, seed: int) -> Split:
    """Hold out ``share`` (0 to 1) of the records: at least one and never all; none where share is 0.

    The same words always land on the same side, so no held-out record was learned under another line number. Which side is decided by a
    hash of the words and the seed: shuffling the file changes nothing, and adding records moves only a few at the margin.
    Raises :class:`DataError` where there are not two different records to divide.
    """
    if share <= 0:
        return Split(list(chats), [], _duplicates(chats), 0)
    sizes: defaultdict[bytes, int] = defaultdict(int)
    for chat in chats:
        sizes[chat.key] += 1
    if len(sizes) < 2:
        raise DataError(f"{len(chats)} records, {len(sizes)} of them different: none can be held out", "add records, or train without: held_out=0")
    wanted = min(max(round(share * len(chats)), 1), len(chats) - 1)
    by_chance = sorted(sizes, key=lambda key: hashlib.blake2b(key, key=str(seed).encode(), digest_size=8).digest())
    held: set[bytes] = set()
    room = wanted
    for key in by_chance:
        if sizes[key] <= room:
            held.add(key)
            room -= sizes[key]
    if not held:  # every record repeats more often than wanted: the smallest group is the nearest to it
        held.add(min(by_chance, key=sizes.__getitem__))
    train = [chat for chat in chats if chat.key not in held]
    return Split(train, [chat for chat in chats if chat.key in held], _duplicates(train), 0)


def split_file(chats: Sequence[Record], held_out: Sequence[Record]) -> Split:
    """A held-out set from a file of its own; what it shares with the training records is counted, not removed."""
    learned = {chat.key for chat in chats}
    return Split(list(chats), list(held_out), _duplicates(chats), sum(chat.key in learned for chat in held_out))


def _duplicates(chats: Sequence[Record]) -> int:
    return len(chats) - len({chat.key for chat in chats})
