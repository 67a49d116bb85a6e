"""Held-out records: as many as asked, the same ones every time, and none that was learned."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparklab.data.record import Record
from sparklab.data.split import split_file, split_share
from sparklab.errors import DataError


def chat(words: str, line: int = 0) -> Record:
    return Record(({"role": "user", "content": "Say it."}, {"role": "assistant", "content": words}), line)


def words(chats: list[Record]) -> set[str]:
    return {chat.answer for chat in chats}


@given(st.lists(st.integers(0, 30), min_size=2, max_size=200), st.floats(0.001, 0.999), st.integers(0, 3))
def test_sides_share_no_words_and_lose_nothing(numbers: list[int], share: float, seed: int) -> None:
    chats = [chat(str(number), line) for line, number in enumerate(numbers)]
    if len(set(numbers)) == 1:
        with pytest.raises(DataError, match="1 of them different"):
            split_share(chats, share, seed)
        return
    split = split_share(chats, share, seed)
    assert split.train
    assert split.held_out
    assert not words(split.train) & words(split.held_out)
    assert sorted(chat.line for chat in split.train + split.held_out) == list(range(len(numbers)))
    assert split.duplicates == len(split.train) - len(words(split.train))


@pytest.mark.parametrize(("count", "share", "held_out"), [(1000, 0.1, 100), (10, 0.01, 1), (2, 0.9, 1), (10, 0.99, 9), (3, 0.5, 2)])
def test_share_is_exact_where_all_differ(count: int, share: float, held_out: int) -> None:
    assert len(split_share([chat(str(number)) for number in range(count)], share, 0).held_out) == held_out


def test_no_share_holds_nothing_out() -> None:
    split = split_share([chat("a"), chat("a")], 0, 0)
    assert (len(split.train), split.held_out, split.duplicates) == (2, [], 1)


def test_same_records_whatever_the_order_of_the_file() -> None:
    chats = [chat(str(number)) for number in range(500)]
    first = words(split_share(chats, 0.1, 3).held_out)
    shuffled = random.Random(0).sample(chats, len(chats))
    assert words(split_share(shuffled, 0.1, 3).held_out) == first
    assert words(split_share(chats, 0.1, 4).held_out) != first


def test_more_records_move_few() -> None:
    chats = [chat(str(number)) for number in range(550)]
    before, after = (words(split_share(part, 0.1, 0).held_out) for part in (chats[:500], chats))
    assert len(before - after) <= 10


def test_one_common_record_does_not_flood_the_held_out_side() -> None:
    chats = [chat("same")] * 900 + [chat(str(number)) for number in range(100)]
    for seed in range(8):
        split = split_share(chats, 0.05, seed)
        assert len(split.held_out) == 50
        assert "same" not in words(split.held_out)


def test_held_out_file_reports_what_it_shares() -> None:
    split = split_file([chat("a"), chat("b"), chat("a")], [chat("b"), chat("c"), chat("b")])
    assert (len(split.train), len(split.held_out), split.overlap, split.duplicates) == (3, 3, 2, 1)
