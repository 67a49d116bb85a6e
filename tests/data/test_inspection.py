"""What the inspection refuses is what training refuses, for every way a template can be wrong; what it counts is arithmetic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy import MARKED, build_tokenizer, chat_line, write_chats

from sparklab.data import Document, Encoded, Encoder, Record, prepare, signs
from sparklab.data.corpus import Opened
from sparklab.data.inspection import _histogram, look
from sparklab.data.pages import Decoder, Leaf, Pages
from sparklab.data.tokenise import Part
from sparklab.errors import DataError
from sparklab.planner.recipe import Recipe

END = "{%- generation -%}{{- message['content'] + '<|end|>' -}}{%- endgeneration -%}"
ASKED = "{{- '<|assistant|>' -}}{%- endif -%}"
TURN = "{%- if message['role'] =="
WRONG = {
    "no template": (None, "no chat template"),
    "prompt that training text does not begin with": (MARKED.replace(ASKED, ASKED.replace("|>'", "|> '")), "differ"),
    "no end of turn": (MARKED.replace(" + '<|end|>'", ""), "end-of-turn"),
    "BOS twice": (MARKED.replace("{{- '<|bos|>' -}}", "{{- '<|bos|><|bos|>' -}}", 1), "BOS twice"),
    "nothing marked as the assistant's": (
        MARKED.replace(END, "{%- generation -%}{%- endgeneration -%}{{- message['content'] + '<|end|>' -}}"),
        "not one token to learn",
    ),
    "fails": (MARKED.replace(TURN, "{{ raise_exception('no') }}" + TURN), ""),
}


def recipe(data: Path, **fields: Any) -> Recipe:
    return Recipe(model="tiny", data=str(data), **{"micro_batch_tokens": 256, "max_length": 256, **fields})


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_template_is_refused_by_both(tmp_path: Path, wrong: str) -> None:
    template, words = WRONG[wrong]
    assert template != MARKED
    asked = recipe(write_chats(tmp_path / "chats.jsonl", 10))
    with pytest.raises(DataError) as trained:
        prepare(asked, build_tokenizer(template, end="<|end|>"))
    seen = look(asked, build_tokenizer(template, end="<|end|>"), tmp_path)
    assert seen["verdict"] == "refuse"
    assert trained.value.fact in [one["fact"] for one in seen["refusals"]]
    assert words in trained.value.fact
    assert seen["report"]["records"] == 10
    json.dumps(seen, allow_nan=False)


def test_a_mismatch_can_be_overruled_by_name(tmp_path: Path) -> None:
    template, _ = WRONG["prompt that training text does not begin with"]
    asked = recipe(write_chats(tmp_path / "chats.jsonl", 10), overrule=("mismatch",))
    seen = look(asked, build_tokenizer(template, end="<|end|>"), tmp_path)
    assert seen["verdict"] == "ready with warnings"
    assert any("overruled" in one["words"] for one in seen["findings"])
    prepare(asked, build_tokenizer(template, end="<|end|>"))


@pytest.mark.parametrize(("content", "words"), [("", "holds no records"), ('{"question": "a", "answer": "b"}\n' * 3, "3 of 3 records cannot be used")])
def test_where_no_record_can_be_used_nothing_else_is_blamed(tmp_path: Path, tokenizer: Any, content: str, words: str) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_text(content)
    seen = look(recipe(file), tokenizer, tmp_path)
    (refusal,) = seen["refusals"]
    assert seen["verdict"] == "refuse" and words in refusal["fact"], "no word of held-out records or of the template"


def test_good_data_is_ready(tmp_path: Path, tokenizer: Any) -> None:
    seen = look(recipe(write_chats(tmp_path / "chats.jsonl", 10)), tokenizer, tmp_path)
    assert (seen["verdict"], seen["refusals"], seen["findings"]) == ("ready", [], [])


def test_signs_of_documents_that_no_encoder_should_make(tmp_path: Path, marked: Any) -> None:
    """The encoder promises an end to every turn and one BOS; the inspection looks all the same."""
    encoder = Encoder(marked, recipe(tmp_path / "none"))
    bos, end = marked.bos_token_id, encoder.stop_ids[0]
    record = Record(({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}), 1)
    cases = [
        (Document([bos, 9, end], [-100, 9, end]), 0),
        (Document([bos, 9, 9], [-100, 9, 9]), signs.NO_END),
        (Document([bos, bos, end], [-100, -100, end]), signs.DOUBLE_BOS),
        (Document([bos, 9, end], [-100, -100, -100]), signs.NOTHING_LEARNED),
    ]
    with Part(tmp_path / "part", encoder, reads=True) as part:
        part.take(0, [Encoded(record, (document,)) for document, _ in cases])
    records = np.fromfile(
        tmp_path / "part" / "records.bin", np.dtype([("key", "V16"), ("number", "<i8"), ("line", "<i8"), ("scripts", "<u8"), ("flags", "<u4")])
    )
    assert (records["flags"] & ~np.uint32(signs.ASKS)).tolist() == [flags for _, flags in cases]


@pytest.mark.parametrize("lengths", [[5], [5, 5, 5], [1, 2, 3], list(range(60, 140)), [3, 10, 100, 5000], [1] * 50 + [100_000]])
def test_the_histogram_counts_every_length(lengths: list[int]) -> None:
    found = _histogram(np.array(lengths))
    assert sum(found["counts"]) == len(lengths)
    assert len(found["edges"]) == len(found["counts"]) + 1 <= 34
    assert found["edges"] == sorted(set(found["edges"]))
    assert found["edges"][0] <= min(lengths) and max(lengths) < found["edges"][-1]
    ordered = sorted(lengths)
    assert found["p50"] == ordered[-(-len(lengths) // 2) - 1]
    assert (found["p95"], found["max"]) == (ordered[-(-len(lengths) * 95 // 100) - 1], ordered[-1])


@pytest.mark.parametrize("template", ["marked", "plain"])
def test_pieces_laid_together_are_the_text(tmp_path: Path, template: str, request: pytest.FixtureRequest) -> None:
    """Whatever a document says, its pieces say, and what is marked learned is what is learned."""
    tokenizer = request.getfixturevalue(template)
    tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    decoder = Decoder(tmp_path)
    for words in ("plain", "القط ينام", "two\nlines\n", "😀 and 小猫", "  spaces  "):
        line = json.loads(chat_line(words, words[::-1] if words.isascii() else words))
        record = Record(tuple(line["messages"]), 1)
        (encoded,) = Encoder(tokenizer, recipe(tmp_path / "none")).encode([record])
        (document,) = encoded.documents
        learned = [label != -100 for label in document.labels]
        pieces = decoder.pieces(document.input_ids, learned, len(learned))
        shown = [piece["t"] if piece["k"] != "break" else "\n" for piece in pieces]
        assert "".join(shown) == tokenizer.decode(document.input_ids)
        taught = "".join(text for text, piece in zip(shown, pieces, strict=True) if piece.get("l"))
        assert taught == tokenizer.decode([token for token, one in zip(document.input_ids, learned, strict=True) if one])


def test_texts_are_told_apart(tmp_path: Path, marked: Any) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in "abc":
        (folder / f"{name}.txt").write_text(f"Text {name}.\nIt has two lines.", encoding="utf-8")
    seen = look(recipe(folder, held_out=0), marked, tmp_path)
    (entry,) = seen["entries"]
    opened = Opened.open(str(folder), recipe(folder, held_out=0), Encoder(marked, recipe(folder)))
    pages = Pages([Leaf(opened.store, np.zeros(3, bool), entry["name"], entry["kind"])], Decoder(tmp_path), 256, "truncate")
    assert [row["where"] for row in pages.page("all", 0, 5)] == ["texts, text 1", "texts, text 2", "texts, text 3"]
    assert pages.page("all", 1, 1)[0]["learned"] > 5


def test_tokenizers_without_a_file_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "pieces.json").write_text(json.dumps({"pieces": ["<s>", "\u2581a", "b", "</s>"], "special": {"0": "<s>", "3": "</s>"}}), encoding="utf-8")
    pieces = Decoder(tmp_path).pieces([0, 1, 2, 3], [0, 0, 1, 1], 3)
    assert pieces == [{"t": "<s>", "k": "special"}, {"t": " a", "k": "text"}, {"t": "b", "k": "text", "l": 1}, {"t": "</s>", "k": "special", "l": 1, "x": 1}]
