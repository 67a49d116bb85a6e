"""From recipe to rows: borders right, books closed, nothing to learn refused."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy import chat_line, write_chats

from sparklab.data import IGNORED, Document, Prepared, encode_chat, prepare, read_records
from sparklab.data.dataset import Row, make_row
from sparklab.data.inspection import look
from sparklab.data.report import few_updates
from sparklab.errors import DataError, DataNotFound
from sparklab.planner.recipe import Recipe


def recipe(data: Path, **fields: Any) -> Recipe:
    return Recipe(model="tiny", data=str(data), **{"micro_batch_tokens": 256, "max_length": 256, **fields})


def documents(rows: Any) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Ids and labels of every document in the rows, sorted."""
    return sorted((tuple(row.input_ids[start:end]), tuple(row.labels[start:end])) for row in rows for start, end in pairwise(row.boundaries))


@pytest.fixture
def prepared(tmp_path: Path, tokenizer: Any) -> Prepared:
    return prepare(recipe(write_chats(tmp_path / "chats.jsonl", 300)), tokenizer)


def test_make_row() -> None:
    row = make_row([Document([5, 6, 7], [IGNORED, 6, 7]), Document([8], [IGNORED]), Document([9, 9], [IGNORED, 9])])
    assert row == Row([5, 6, 7, 8, 9, 9], [IGNORED, 6, 7, IGNORED, IGNORED, 9], [0, 1, 2, 0, 0, 1], [0, 3, 4, 6])
    assert row.documents == 3


def test_every_document_is_in_one_row(tmp_path: Path, tokenizer: Any, prepared: Prepared) -> None:
    expected = [encode_chat(tokenizer, chat, 256, "error") for chat in read_records(tmp_path / "chats.jsonl")]
    assert documents([*prepared.train_rows, *prepared.held_out_rows]) == sorted((tuple(one.input_ids), tuple(one.labels)) for one in expected if one)
    held_out = [encode_chat(tokenizer, chat, 256, "error") for chat in prepared.held_out_chats]
    assert documents(prepared.held_out_rows) == sorted((tuple(one.input_ids), tuple(one.labels)) for one in held_out if one)
    assert len(held_out) == 30


def test_rows_are_well_formed(prepared: Prepared) -> None:
    assert len(prepared.train_rows) > 10
    for row in [*prepared.train_rows, *prepared.held_out_rows]:
        tokens = len(row.input_ids)
        assert tokens == len(row.labels) == len(row.position_ids) == row.boundaries[-1] <= 256
        assert row.boundaries[0] == 0
        for start, end in pairwise(row.boundaries):
            assert row.position_ids[start:end] == list(range(end - start))
            assert row.labels[start] == IGNORED  # so that no loss reaches over the border
        assert all(label in (IGNORED, token) for token, label in zip(row.input_ids, row.labels, strict=True))


def test_rows_behave_as_a_list(prepared: Prepared) -> None:
    rows = prepared.train_rows
    assert list(rows) == [rows[index] for index in range(len(rows))] == rows[:]
    assert rows[-1] == rows[len(rows) - 1]
    assert rows[1:3] == [rows[1], rows[2]]
    with pytest.raises(IndexError):
        rows[len(rows)]


def test_the_books_close(prepared: Prepared) -> None:
    report, rows = prepared.report, prepared.train_rows
    assert report.records == 300 == report.documents + report.held_out
    assert report.documents == sum(row.documents for row in rows)
    assert report.tokens == sum(len(row.input_ids) for row in rows)
    assert report.supervised == sum(label != IGNORED for row in rows for label in row.labels)
    assert report.held_out_tokens == sum(len(row.input_ids) for row in prepared.held_out_rows)
    assert report.held_out_supervised == sum(label != IGNORED for row in prepared.held_out_rows for label in row.labels)
    assert (report.rows, report.fill) == (len(rows), report.tokens / (len(rows) * 256))
    assert report.fill >= 0.9
    assert (report.truncated, report.dropped, report.unsupervised, report.overlap, report.duplicates) == (0, 0, 0, 0, 0)
    assert report.warnings == []
    assert json.loads(json.dumps(report.to_dict()))["fill"] == report.fill
    assert str(report).startswith("300 records: 270 documents to train on, 30 held out\n")


def test_the_same_recipe_gives_the_same_rows(tmp_path: Path, marked: Any) -> None:
    file = write_chats(tmp_path / "chats.jsonl", 100)
    first = prepare(recipe(file), marked)
    assert list(prepare(recipe(file), marked).train_rows) == list(first.train_rows)
    other = prepare(recipe(file, seed=1), marked)
    assert list(other.train_rows) != list(first.train_rows)
    assert list(other.held_out_chats) != list(first.held_out_chats)


LONG = "There are apples. " * 60


def test_long_records(tmp_path: Path, marked: Any) -> None:
    file = tmp_path / "chats.jsonl"
    lines = [chat_line(f"q{index}", f"a{index}") for index in range(8)] + [chat_line("q", LONG), chat_line(LONG, "a")]
    file.write_text("\n".join(lines), encoding="utf-8")
    cut = prepare(recipe(file, max_length=64, held_out=0), marked).report
    assert (cut.documents, cut.truncated, cut.unsupervised, cut.dropped) == (9, 1, 1, 0)  # the question alone is longer than 64: nothing to learn
    assert any("1 documents were cut" in warning for warning in cut.warnings)
    assert any("no token to learn" in warning for warning in cut.warnings)
    dropped = prepare(recipe(file, max_length=64, held_out=0, on_long="drop"), marked).report
    assert (dropped.documents, dropped.truncated, dropped.unsupervised, dropped.dropped) == (8, 0, 0, 2)
    assert dropped.longest == cut.longest > 64
    with pytest.raises(DataError, match=r"2 of 10 records cannot be used \(2 longer than max_length 64\)") as caught:
        prepare(recipe(file, max_length=64, held_out=0, on_long="error"), marked)
    assert f"{file}:9" in caught.value.fact


@given(st.lists(st.integers(1, 60), min_size=1, max_size=8), st.integers(2, 40), st.integers(0, 2))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_split_documents_are_learned_as_often_as_whole_ones(marked: Any, words: list[int], max_length: int, seed: int) -> None:
    """Every learned token once, from what stood before it in its piece; pieces are never longer than max_length, and laid together the whole."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "chats.jsonl"
        file.write_text("\n".join(chat_line(f"q{index}", "apples " * count) for index, count in enumerate(words)), encoding="utf-8")
        whole = prepare(recipe(file, held_out=0, max_length=2048, micro_batch_tokens=2048), marked)
        asked = recipe(file, held_out=0, max_length=max_length, micro_batch_tokens=max(max_length, 64), on_long="split", seed=seed)
        cut = prepare(asked, marked)
    assert cut.report.supervised == whole.report.supervised
    assert max(map(len, (ids for ids, _ in documents(cut.train_rows)))) <= max_length
    long = [ids for ids, _ in documents(whole.train_rows) if len(ids) > max_length]
    assert cut.report.split == len(long)
    learned = Counter(label for row in cut.train_rows for label in row.labels if label != IGNORED)
    assert learned == Counter(label for row in whole.train_rows for label in row.labels if label != IGNORED)
    wholes = [" ".join(map(str, ids)) for ids, _ in documents(whole.train_rows)]
    assert all(any(" ".join(map(str, ids)) in text for text in wholes) for ids, _ in documents(cut.train_rows))


def test_pieces_overlap_by_the_token_that_is_read_again(tmp_path: Path, marked: Any) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_text(chat_line("q", "apples " * 40), encoding="utf-8")
    (whole,) = prepare(recipe(file, held_out=0), marked).train_rows
    cut = prepare(recipe(file, held_out=0, max_length=10, micro_batch_tokens=10, on_long="split"), marked)
    total, pieces = len(whole.input_ids), cut.train_rows.slices
    assert pieces.starts.tolist() == list(range(0, total - 1, 9))
    assert pieces.lengths.tolist() == [10] * (len(pieces) - 1) + [total - 9 * (len(pieces) - 1)]
    assert cut.report.tokens == len(whole.input_ids) + len(pieces) - 1
    assert any("were split" in warning for warning in cut.report.warnings)


def test_rows_know_their_lines(tmp_path: Path, marked: Any) -> None:
    rows = prepare(recipe(write_chats(tmp_path / "chats.jsonl", 40), held_out=0), marked).train_rows
    lines = [rows.lines(index) for index in range(len(rows))]
    assert sorted(line for each in lines for line in each) == list(range(1, 41))
    assert [len(each) for each in lines] == [row.documents for row in rows]


@pytest.mark.parametrize("on_long", ["truncate", "drop"])
def test_nothing_to_learn_is_refused(tmp_path: Path, marked: Any, on_long: str) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_text("\n".join(chat_line(f"{LONG} {index}", "a") for index in range(5)), encoding="utf-8")
    with pytest.raises(DataError, match="not one token to learn") as caught:
        prepare(recipe(file, max_length=64, on_long=on_long), marked)
    assert caught.value.fix.startswith("raise max_length: it is 64 and the longest record has ")


def test_marks_that_leave_out_every_answer_are_refused(tmp_path: Path) -> None:
    from toy import MARKED, build_tokenizer

    unmarked = MARKED.replace("{%- generation -%}{{- message['content'] + '<|end|>' -}}{%- endgeneration -%}",
                              "{%- generation -%}{%- endgeneration -%}{{- message['content'] + '<|end|>' -}}")  # fmt: skip
    assert unmarked != MARKED
    with pytest.raises(DataError, match="generation"):
        prepare(recipe(write_chats(tmp_path / "chats.jsonl", 10)), build_tokenizer(unmarked, end="<|end|>"))


def test_held_out_file(tmp_path: Path, marked: Any) -> None:
    train, held_out = write_chats(tmp_path / "train.jsonl", 50), write_chats(tmp_path / "held.jsonl", 60)
    prepared = prepare(recipe(train, held_out=str(held_out)), marked)
    assert (prepared.report.documents, prepared.report.held_out, prepared.report.overlap, prepared.report.records) == (50, 60, 50, 110)
    assert any("learned by heart" in warning for warning in prepared.report.warnings)
    assert [chat.source for chat in prepared.held_out_chats] == [str(held_out)] * 60
    with pytest.raises(DataNotFound, match="did you mean"):
        prepare(recipe(train, held_out=str(tmp_path / "heldd.jsonl")), marked)


@pytest.mark.parametrize(
    ("rows", "documents", "changes", "said"),
    [
        (1, 6, {"max_steps": 2}, "max_steps is 2, and the run ends after 1 update: 6 documents fill 1 row of 256 tokens; epochs=2 makes 2"),
        (1, 1, {}, "the run ends after 1 update: 1 document fills 1 row of 256 tokens; epochs=10 makes 10"),
        (7, 90, {"micro_batches_per_update": 2}, "the run ends after 4 updates: 90 documents fill 7 rows of 256 tokens, 2 an update; epochs=3 makes 12"),
        (3, 9, {"max_steps": 8, "epochs": 2.5}, ""),
        (3, 9, {"max_steps": 1}, ""),
        (5, 9, {"epochs": 2.0}, ""),
        (0, 0, {"max_steps": 5}, ""),
    ],
)
def test_a_run_that_is_over_sooner_than_meant_says_so(rows: int, documents: int, changes: dict[str, Any], said: str) -> None:
    asked = recipe(Path("chats.jsonl"), **changes)
    assert few_updates(asked, rows, documents) == said


def test_few_updates_are_said_before_training_and_by_it(tmp_path: Path, marked: Any) -> None:
    file = write_chats(tmp_path / "chats.jsonl", 6)
    asked = recipe(file, held_out=0, max_steps=4, micro_batch_tokens=8192)
    (said,) = prepare(asked, marked).report.warnings
    assert said == "max_steps is 4, and the run ends after 1 update: 6 documents fill 1 row of 8,192 tokens; epochs=4 makes 4"
    assert [one["words"] for one in look(asked, marked, tmp_path)["findings"]] == [said]
    assert look(asked.replace(max_steps=None), marked, tmp_path)["verdict"] == "ready", "no recipe said how long its rows are to be"


def test_nothing_held_out(tmp_path: Path, marked: Any) -> None:
    prepared = prepare(recipe(write_chats(tmp_path / "chats.jsonl", 20), held_out=0), marked)
    assert (len(prepared.held_out_rows), list(prepared.held_out_chats), prepared.report.documents) == (0, [], 20)


def test_what_the_report_warns_of(tmp_path: Path, marked: Any) -> None:
    file = tmp_path / "chats.jsonl"
    record = {"id": 1, **json.loads(chat_line("a", "b"))}
    file.write_text("\n".join([json.dumps(record)] * 3 + [chat_line("c", "d")] * 2), encoding="utf-8")
    report = prepare(recipe(file, held_out=0, epochs=10.0), marked).report
    assert report.duplicates == 3
    assert report.ignored_fields == {"id": 3}
    assert report.warnings == ["3 training records repeat an earlier one", "not used: id (3 records)"]


def test_no_torch_is_needed() -> None:
    script = "import sys, sparklab.data; print(sorted({'torch', 'transformers', 'numpy', 'datasets'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_tokens_that_the_model_does_not_know_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    """Tokens were added to the tokenizer, and the embeddings stayed as they were."""
    model, plain = tmp_path / "config.json", recipe(write_chats(tmp_path / "chats.jsonl", 30))
    highest = max(max(row.input_ids) for row in prepare(plain.replace(held_out=0.0), tokenizer).train_rows)
    model.write_text(json.dumps({"model_type": "llama", "vocab_size": highest + 1}))
    prepare(plain.replace(model=str(model)), tokenizer)
    model.write_text(json.dumps({"model_type": "llama", "vocab_size": highest}))
    with pytest.raises(DataError, match=rf"\({highest}\) of the data, and the model's tokens are 0 to {highest - 1}"):
        prepare(plain.replace(model=str(model)), tokenizer)
    (said,) = look(plain.replace(model=str(model)), tokenizer, tmp_path)["refusals"]
    assert str(highest - 1) in said["fact"]
