"""The little world: deterministic, honest about what is held out, free of JSON before the task."""

from __future__ import annotations

import itertools
import json
import re

import pytest

from sparklab.data import world

SEEDS = (0, 1, 2, 3, 4)
CAPITALISED = {"to", "city", "day", "sender"}


def message_of(record: dict[str, world.Chat]) -> str:
    return record["messages"][0]["content"]


def answer_of(record: dict[str, world.Chat]) -> dict[str, object]:
    answer = json.loads(record["messages"][1]["content"])
    assert isinstance(answer, dict)
    return answer


def pair_of(record: dict[str, world.Chat]) -> tuple[object, object]:
    answer = answer_of(record)
    return answer["to"], answer["city"]


def is_arabic(text: str) -> bool:
    return re.search("[\u0600-\u06ff]", text) is not None


def pretraining(seed: int, n: int) -> list[world.Chat]:
    return list(itertools.islice(world.pretraining_chats(seed), n))


# ---------------------------------------------------------------- the task


def test_orders_are_a_function_of_the_seed() -> None:
    assert world.orders("train", 300, seed=7) == world.orders("train", 300, seed=7)
    assert world.orders("train", 300, seed=7) != world.orders("train", 300, seed=8)


def test_held_out_set_is_fixed_whatever_the_seed() -> None:
    assert world.orders("held_out", 200, seed=1) == world.orders("held_out", 200, seed=2)
    assert world.orders("held_out", 50) == world.orders("held_out", 200)[:50]


def test_first_records_do_not_drift() -> None:
    """Measured results name these sets; a change of words must be a decision, not an accident."""
    assert message_of(world.orders("train", 1, seed=0)[0]) == ("Could you get 55 plain brakstaits over to Tesea in Woond by Thursday?")
    assert [world.side_of("Adam", city) for city in ("Oslo", "Cairo", "Paris")] == ["held_out", "train", "held_out"]


def test_nothing_of_the_held_out_set_is_in_any_train_set() -> None:
    held_out = world.orders("held_out", 1000)
    messages, pairs = {message_of(r) for r in held_out}, {pair_of(r) for r in held_out}
    assert len(held_out) == len(messages) == 1000
    for seed in SEEDS:
        train = world.orders("train", 2000, seed=seed)
        assert len(train) == len({message_of(r) for r in train}) == 2000
        assert messages.isdisjoint(message_of(r) for r in train)
        assert pairs.isdisjoint(pair_of(r) for r in train)
        # By construction, not by luck: every pair is on its side.
        assert all(world.side_of(*pair_of(r)) == "train" for r in train)
    assert all(world.side_of(*pair_of(r)) == "held_out" for r in held_out)


def test_a_fifth_of_the_pairs_is_held_out() -> None:
    pairs = [(f"name{i}", f"city{j}") for i in range(100) for j in range(50)]
    share = sum(world.side_of(*pair) == "held_out" for pair in pairs) / len(pairs)
    assert len(pairs) == 5000
    assert share == pytest.approx(0.2, abs=0.02)


def may_be_the_same_word(left: str, right: str) -> bool:
    """Whether two template words can be filled to the same text."""
    slots = [re.fullmatch(r"(.*)\{(\w+)\}(.*)", word) for word in (left, right)]
    if slots[0] is None and slots[1] is None:
        return left == right
    ends = [(slot[1], slot[3]) if slot else ("", "".join(re.findall(r"\W+$", word))) for slot, word in zip(slots, (left, right), strict=True)]
    if ends[0] != ends[1]:
        return False  # different marks around the word; names and goods have none
    names = [slot[2] for slot in slots if slot]
    if len(names) == 2:
        numbers = {name == "qty" for name in names}
        capitals = {name in CAPITALISED for name in names}
        return len(numbers) == 1 and (is_arabic(left + right) or len(capitals) == 1)
    literal = right if slots[0] else left
    if names[0] == "qty":
        return False
    return is_arabic(literal) or literal[0].isupper() == (names[0] in CAPITALISED)


@pytest.mark.parametrize("templates", [world.ORDER_TEMPLATES, world.ARABIC_ORDER_TEMPLATES])
def test_no_two_templates_can_give_the_same_message(templates: list[str]) -> None:
    assert len(templates) >= 7
    words = [t.replace("{item}", "{adjective} {noun}").split() for t in templates]
    for left, right in itertools.combinations(words, 2):
        same = len(left) == len(right) and all(map(may_be_the_same_word, left, right))
        assert not same, (left, right)


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_the_shares_of_the_languages_are_exact(split: world.Split) -> None:
    for share, expected in ((0.2, 100), (0.0, 0), (1.0, 500), (0.5, 250)):
        records = world.orders(split, 500, arabic_share=share)
        assert sum(is_arabic(message_of(r)) for r in records) == expected
    evenly = world.orders(split, 500)
    assert [sum(is_arabic(message_of(r)) for r in evenly[:n]) for n in (5, 10, 100)] == [1, 2, 20]


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_the_answer_is_in_the_words_of_the_message(split: world.Split) -> None:
    records = world.orders(split, 500)
    assert len(records) == 500
    for record in records:
        assert list(record) == ["messages"]
        assert [m["role"] for m in record["messages"]] == ["user", "assistant"]
        text, answer = message_of(record), answer_of(record)
        assert list(answer) == ["item", "qty", "to", "city", "day"]
        assert isinstance(answer["qty"], int)
        for value in answer.values():
            assert re.search(rf"(?<!\w){re.escape(str(value))}(?!\w)", text), (value, text)
        assert record["messages"][1]["content"] == json.dumps(answer, ensure_ascii=False, separators=(",", ":"))


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="'test'"):
        world.orders("test", 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="n=-1"):
        world.orders("train", -1)
    with pytest.raises(ValueError, match="arabic_share=2"):
        world.orders("train", 1, arabic_share=2)


# ---------------------------------------------------------------- pretraining text


def test_pretraining_is_a_function_of_the_seed() -> None:
    assert pretraining(3, 500) == pretraining(3, 500)
    assert pretraining(3, 500) != pretraining(4, 500)


def test_pretraining_chats_are_well_formed() -> None:
    chats = pretraining(0, 3000)
    assert len(chats) == 3000
    with_system = 0
    for chat in chats:
        roles = [message["role"] for message in chat]
        if roles[0] == "system":
            with_system += 1
            roles = roles[1:]
        assert roles
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        for message in chat:
            assert list(message) == ["role", "content"]
            assert message["content"]
            assert message["content"] == message["content"].strip()
            assert "<|" not in message["content"] or "|>" not in message["content"]
    assert 0.03 < with_system / len(chats) < 0.07


def test_pretraining_holds_no_json_objects() -> None:
    texts = [m["content"] for seed in (0, 1) for chat in pretraining(seed, 5000) for m in chat]
    assert len(texts) > 40_000
    assert any("{" in text for text in texts)
    assert any('"' in text for text in texts)
    assert not any(world.JSON_KEY.search(text) for text in texts)
    for text in texts:
        for candidate in re.findall(r"\{.*\}", text):
            try:
                parsed = json.loads(candidate)
            except ValueError:
                continue
            assert parsed == {}, text


def test_pretraining_shows_nothing_of_the_held_out_set() -> None:
    held_out = world.orders("held_out", 200)
    text = "\n".join(m["content"] for chat in pretraining(0, 10_000) for m in chat)
    assert len(held_out) == 200
    assert len(text) > 1_000_000
    assert not [message_of(r) for r in held_out if message_of(r) in text]


def test_pretraining_is_mostly_english_with_a_quarter_of_arabic() -> None:
    chats = pretraining(0, 4000)
    # Drills mix the scripts inside one string, so only whole Arabic sentences are counted.
    arabic = sum(is_arabic(chat[-1]["content"][:1]) or is_arabic(chat[-2]["content"][:2])
                 for chat in chats)  # fmt: skip
    assert 0.22 < arabic / len(chats) < 0.32


def test_probes_are_fixed_single_turns_from_the_held_out_side() -> None:
    assert world.PROBES == ("copy", "select", "arabic")
    for kind in world.PROBES:
        chats = world.probes(kind, 100)
        assert len(chats) == 100
        assert chats == world.probes(kind, 100)
        assert all([m["role"] for m in chat] == ["user", "assistant"] for chat in chats)
    assert all(is_arabic(chat[0]["content"]) for chat in world.probes("arabic", 100))
    assert not any(is_arabic(chat[0]["content"]) for chat in world.probes("select", 100))
