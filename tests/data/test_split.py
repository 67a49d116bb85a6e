"""Held-out records: as many as asked, the same ones every time, and none that was learned."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparklab.data.record import Record
from sparklab.data.split import duplicates, group, overlap, split_share
from sparklab.errors import DataError


def chat(words: str, line: int = 0) -> Record:
    return Record(({"role": "user", "content": "Say it."}, {"role": "assistant", "content": words}), line)


def words(chats: list[Record]) -> set[str]:
    return {chat.answer for chat in chats}


def keys_of(chats: list[Record]) -> np.ndarray[Any, Any]:
    return np.array([chat.key for chat in chats], "V16")


def divided(chats: list[Record], share: float, seed: int) -> tuple[list[Record], list[Record]]:
    """Records to learn from and held-out ones."""
    held = split_share(keys_of(chats), share, seed).tolist()
    return [chat for chat, out in zip(chats, held, strict=True) if not out], [chat for chat, out in zip(chats, held, strict=True) if out]


@given(st.lists(st.integers(0, 30), min_size=2, max_size=200), st.floats(0.001, 0.999), st.integers(0, 3))
def test_sides_share_no_words_and_lose_nothing(numbers: list[int], share: float, seed: int) -> None:
    chats = [chat(str(number), line) for line, number in enumerate(numbers)]
    if len(set(numbers)) == 1:
        with pytest.raises(DataError, match=r"one record|all the same"):
            divided(chats, share, seed)
        return
    train, held_out = divided(chats, share, seed)
    assert train
    assert held_out
    assert not words(train) & words(held_out)
    assert sorted(chat.line for chat in train + held_out) == list(range(len(numbers)))
    assert duplicates(keys_of(train)) == len(train) - len(words(train))
    assert overlap(keys_of(train), keys_of(held_out)) == 0


@pytest.mark.parametrize(("count", "share", "held_out"), [(1000, 0.1, 100), (10, 0.01, 1), (2, 0.9, 1), (10, 0.99, 9), (3, 0.5, 2)])
def test_share_is_exact_where_all_differ(count: int, share: float, held_out: int) -> None:
    assert len(divided([chat(str(number)) for number in range(count)], share, 0)[1]) == held_out


def test_no_share_holds_nothing_out() -> None:
    chats = [chat("a"), chat("a")]
    assert divided(chats, 0, 0) == (chats, [])
    assert duplicates(keys_of(chats)) == 1
    assert duplicates(keys_of([])) == 0


def test_same_records_whatever_the_order_of_the_file() -> None:
    chats = [chat(str(number)) for number in range(500)]
    first = words(divided(chats, 0.1, 3)[1])
    shuffled = random.Random(0).sample(chats, len(chats))
    assert words(divided(shuffled, 0.1, 3)[1]) == first
    assert words(divided(chats, 0.1, 4)[1]) != first


def test_more_records_move_few() -> None:
    chats = [chat(str(number)) for number in range(550)]
    before, after = (words(divided(part, 0.1, 0)[1]) for part in (chats[:500], chats))
    assert len(before - after) <= 10


def test_one_common_record_does_not_flood_the_held_out_side() -> None:
    chats = [chat("same")] * 900 + [chat(str(number)) for number in range(100)]
    for seed in range(8):
        _, held_out = divided(chats, 0.05, seed)
        assert len(held_out) == 50
        assert "same" not in words(held_out)


def test_what_two_files_share_is_counted() -> None:
    train, held_out = keys_of([chat("a"), chat("b"), chat("a")]), keys_of([chat("b"), chat("c"), chat("b")])
    assert overlap(train, held_out) == 2
    assert duplicates(train) == 1


def test_groups_are_numbered_as_they_appear() -> None:
    groups, first = group(keys_of([chat("b"), chat("a"), chat("b"), chat("c"), chat("a")]))
    assert groups.tolist() == [0, 1, 0, 2, 1]
    assert first.tolist() == [0, 1, 3]


def test_the_side_of_a_record_is_pinned() -> None:
    """A run that is resumed under a later version must find its sides again."""
    assert sorted(words(divided([chat(str(number)) for number in range(30)], 0.2, 5)[1])) == PINNED


PINNED = ["0", "11", "18", "24", "26", "3"]
