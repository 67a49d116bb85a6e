"""Tokens on disk: the same from one process and from many, found again, rebuilt when damaged, bounded, mapped rather than loaded."""

from __future__ import annotations

import errno
import json
import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy import chat_line, write_chats

from sparklab.data import Encoder, open_source, prepare, signs, store, tokenise
from sparklab.data.corpus import Opened
from sparklab.data.faults import Faults
from sparklab.data.signs import SCRIPTS, script_bits, script_names
from sparklab.errors import DiskFull
from sparklab.model.hub import TINY_PATH
from sparklab.planner.recipe import Recipe


def recipe(data: Path, **fields: Any) -> Recipe:
    return Recipe(model="tiny", data=str(data), **{"micro_batch_tokens": 256, "max_length": 256, **fields})


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own."""
    monkeypatch.setenv(store.SWITCH, str(tmp_path / "cache"))
    return tmp_path / "cache"


def entries(cache: Path) -> list[Path]:
    return sorted(folder for folder in cache.iterdir() if folder.is_dir())


def messy(path: Path, count: int) -> Path:
    """Chats with something of everything: long and short, faults of reading and of encoding, empty turns, repeats, other scripts."""
    rng = random.Random(0)
    lines = []
    for index in range(count):
        kind = index % 50
        if kind == 7:
            lines.append("{broken")
        elif kind == 8:
            lines.append(json.dumps({"messages": [{"role": "user", "content": "a"}]}))
        elif kind == 9:
            lines.append(chat_line("hello", "القط ينام", system=""))
        elif kind == 10:
            lines.append(chat_line("the same", "again"))
        else:
            lines.append(chat_line(f"q {index}", "apples " * rng.randint(1, 40)))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_the_same_from_many_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Part in this process, part in three others without torch: what comes of it is what one process makes."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TINY_PATH)
    data = messy(tmp_path / "chats.jsonl", 3000)
    monkeypatch.setattr(tokenise, "HERE", 2)
    asked = recipe(data)
    encoder = Encoder(tokenizer, asked)
    source = open_source(str(data))
    heard: list[tuple[int, int | None]] = []
    alone = tokenise.tokenised(str(data), source, asked, encoder, processes=1)
    many = tokenise.tokenised(str(data), source, asked, encoder, lambda done, total: heard.append((done, total)), processes=3)
    assert len(alone.records) == 2880
    for table in ("documents", "records"):
        one, other = (np.asarray(getattr(each, table)) for each in (alone, many))
        names = [name for name in one.dtype.names or () if name != "start"]
        assert all((one[name] == other[name]).all() for name in names), table
    for one, other in zip(alone.documents[::37], many.documents[::37], strict=True):
        for name in ("ids", "learned"):
            first, second = (getattr(each, name)[at["start"] : at["start"] + at["length"]] for each, at in ((alone, one), (many, other)))
            assert (first == second).all()
    assert list(alone.faults()) == list(many.faults())
    assert len(list(many.faults())) == 120
    assert alone.notes == many.notes
    assert heard[0] == (512, None) and heard[-1][1] == 3000  # the others tell how far they are, of all lines
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chats.jsonl"]  # nothing is left beside the data


def test_a_tokenizer_that_is_not_the_models_stays_in_this_process(tmp_path: Path, marked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenise, "HERE", 1)
    data = write_chats(tmp_path / "chats.jsonl", 1200)
    asked = recipe(data)
    encoder = Encoder(marked, asked)
    made = tokenise.tokenised(str(data), open_source(str(data)), asked, encoder, processes=2)
    assert len(made.documents) == 1200


def test_the_cache_is_found_again_and_knows_what_it_depends_on(tmp_path: Path, cache: Path, marked: Any, plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_chats(tmp_path / "chats.jsonl", 60)
    first = prepare(recipe(data), marked)
    assert len(entries(cache)) == 1
    with monkeypatch.context() as patched:
        patched.setattr(Encoder, "encode", None)  # whoever encodes now fails
        again = prepare(recipe(data), marked)
        assert list(again.train_rows) == list(first.train_rows)
        assert again.report == first.report
        for changed in ({"seed": 3}, {"max_length": 40}, {"micro_batch_tokens": 512}, {"held_out": 0.5}, {"on_long": "split"}):
            assert prepare(recipe(data, **changed), marked).report.records == 60
    assert len(entries(cache)) == 1
    prepare(recipe(data), plain)
    prepare(recipe(data, learn="all"), marked)
    assert len(entries(cache)) == 3
    moved = tmp_path / "elsewhere.jsonl"
    moved.write_bytes(data.read_bytes()[:-1])  # a byte less
    prepare(recipe(moved), marked)
    assert len(entries(cache)) == 4


@pytest.mark.parametrize("damage", ["short", "flipped", "gone", "seal", "notes", "empty"])
def test_a_damaged_entry_is_made_anew(tmp_path: Path, cache: Path, marked: Any, damage: str) -> None:
    data = write_chats(tmp_path / "chats.jsonl", 60)
    rows = list(prepare(recipe(data), marked).train_rows)
    (entry,) = entries(cache)
    ids = entry / "ids.bin"
    content = bytearray(ids.read_bytes())
    if damage == "short":
        ids.write_bytes(content[:-4])
    elif damage == "flipped":
        content[100] ^= 1
        ids.write_bytes(content)
    elif damage == "gone":
        ids.unlink()
    elif damage == "seal":
        (entry / "seal.json").write_text("[]")
    elif damage == "notes":
        (entry / "notes.json").write_text("{")
    else:
        for file in entry.iterdir():
            file.unlink()
    assert list(prepare(recipe(data), marked).train_rows) == rows
    assert entries(cache) == [entry]
    assert store.open_entry(entry) is not None


def test_what_is_open_stays_readable_when_its_entry_goes(tmp_path: Path, cache: Path, marked: Any) -> None:
    prepared = prepare(recipe(messy(tmp_path / "chats.jsonl", 100), on_bad="skip"), marked)
    before = list(prepared.train_rows)
    (entry,) = entries(cache)
    store.shutil.rmtree(entry)
    assert list(prepared.train_rows) == before
    assert isinstance(prepared.train_rows.slices.store.ids, np.memmap)


def test_the_cache_is_bounded(tmp_path: Path, cache: Path, marked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    for index in range(4):
        data = write_chats(tmp_path / f"{index}.jsonl", 50 + index)
        prepare(recipe(data), marked)
        (new,) = set(entries(cache)) - set(made)
        made.append(new)
        os.utime(new / "seal.json", (1000 + index, 1000 + index))
    dead = cache / "0123.999999999.new"  # what a crash leaves behind
    dead.mkdir()
    size = sum(file.stat().st_size for file in made[3].iterdir())
    os.utime(made[0] / "seal.json", (5000, 5000))  # used last
    store.evict(made[3], limit_bytes=int(2.5 * size))
    assert entries(cache) == sorted([made[0], made[3]])


def test_two_who_want_the_same_wait_for_one(tmp_path: Path, cache: Path, marked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_chats(tmp_path / "chats.jsonl", 60)
    encode, began = Encoder.encode, []

    def slowly(self: Encoder, records: Any) -> Any:
        began.append(threading.get_ident())
        time.sleep(0.3)
        return encode(self, records)

    monkeypatch.setattr(Encoder, "encode", slowly)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: list(prepare(recipe(data), marked).train_rows), range(3)))
    assert found[0] == found[1] == found[2]
    assert len(began) == 1


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path, cache: Path, marked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Any, **columns: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store.Shard, "append", full)
    with pytest.raises(DiskFull, match=r"no room in .* for the tokens of") as caught:
        prepare(recipe(write_chats(tmp_path / "chats.jsonl", 60)), marked)
    assert "SPARKLAB_DATA_CACHE" in caught.value.fix
    assert entries(cache) == []


def test_no_cache_where_none_can_be_kept(tmp_path: Path, marked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_chats(tmp_path / "chats.jsonl", 30)
    blocked = tmp_path / "file"
    blocked.touch()
    monkeypatch.setenv(store.SWITCH, str(blocked / "cache"))
    assert prepare(recipe(data), marked).report.records == 30
    monkeypatch.setenv(store.SWITCH, "off")
    assert prepare(recipe(data), marked).report.records == 30
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chats.jsonl", "file"]


def test_what_is_odd_about_records(tmp_path: Path, marked: Any) -> None:
    data = tmp_path / "chats.jsonl"
    data.write_text("\n".join([chat_line("a", "b"), chat_line("", "b"), chat_line("a", "كتب", system="x"), chat_line("<|end|>", "小猫")]), encoding="utf-8")
    asked = recipe(data)
    opened = Opened.open(str(data), asked, Encoder(marked, asked))
    flags = opened.store.records["flags"].tolist()
    assert [flag & ~signs.ASKS for flag in flags] == [0, signs.EMPTY_TURN, 0, signs.SPELLS]
    assert all(flag & signs.ASKS for flag in flags)
    assert [script_names(bits) for bits in opened.store.records["scripts"].tolist()] == [["Latin"], ["Latin"], ["Latin", "Arabic"], ["Latin", "Han"]]
    assert [record.answer for record in opened.pick([1, 3])] == ["b", "小猫"]
    faults = Faults()
    opened.faults(faults)
    assert faults.total == 0


def test_scripts_are_those_of_the_characters_names() -> None:
    """The standard library knows names, and those of letters begin with their script, all but a few."""
    import unicodedata

    listed = {script.upper() for script in SCRIPTS}
    other_words = {"CJK": "HAN", "IDEOGRAPHIC": "HAN", "HENTAIGANA": "HIRAGANA"}
    seen, wrong = 0, 0
    for point in range(0x110000):
        char = chr(point)
        if not char.isalpha():
            continue
        words = f"{unicodedata.name(char, '')} ?".split()
        first = words[1] if words[0] in ("FULLWIDTH", "HALFWIDTH") else words[0]
        first = other_words.get(first, first)
        seen += 1
        wrong += script_names(script_bits(char)) != [first.capitalize() if first in listed else "Other"]
    assert seen > 130_000
    assert wrong < 400  # modifier letters, Coptic in the Greek block, and what later versions of Unicode added beyond the planes in use
