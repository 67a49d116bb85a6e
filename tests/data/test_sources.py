"""Every kind of source gives the same records; what is nasty is read, skipped with its place, or refused in one error, in time and in little memory."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sparklab.data import prepare, tables
from sparklab.data.faults import Faults, Skipped
from sparklab.data.read import check, open_source, read_records, resolved
from sparklab.data.record import Record
from sparklab.errors import DataError, DataNotFound, RecipeError
from sparklab.planner import recipes
from sparklab.planner.kept import kept

SECONDS = 20


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    """No input may hang: after so many seconds the test fails, whatever it waits for."""

    def late(*_: object) -> None:
        raise TimeoutError(f"still reading after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def says(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


CHATS = [{"messages": [says("user", f"question {index}؟"), says("assistant", f'answer "{index}", 😀\nsecond line')]} for index in range(5)]
PAIRS = [{"prompt": record["messages"][0]["content"], "completion": record["messages"][1]["content"]} for record in CHATS]


def lines(records: list[Any]) -> bytes:
    return "\n".join(json.dumps(record, ensure_ascii=False) for record in records).encode()


def table(records: list[dict[str, str]], delimiter: str = ",", **options: Any) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(records[0]), delimiter=delimiter, **options)
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue().encode()


def parquet(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(CHATS), path, row_group_size=2)


def arrow(path: Path) -> None:
    data = pa.Table.from_pylist(CHATS)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, data.schema) as writer:
        writer.write_table(data, max_chunksize=2)


def arrow_stream(path: Path) -> None:
    data = pa.Table.from_pylist(CHATS)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, data.schema) as writer:
        writer.write_table(data)


def arrow_packed(path: Path) -> None:
    data = pa.Table.from_pylist(CHATS)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, data.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(data, max_chunksize=2)


def written(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def saved(path: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    datasets.DatasetDict({"train": datasets.Dataset.from_list(CHATS), "test": datasets.Dataset.from_list(CHATS[:1])}).save_to_disk(path)


def shards(path: Path) -> None:
    path.mkdir()
    for index in range(2):
        pq.write_table(pa.Table.from_pylist(CHATS[:3] if index == 0 else CHATS[3:]), path / f"train-{index:05}-of-00002.parquet")
    pq.write_table(pa.Table.from_pylist(CHATS[:1]), path / "test-00000-of-00001.parquet")


# name: (what makes it, kind, format)
SAME: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "a.jsonl": (written(lines(CHATS)), "jsonl", "messages"),
    "jsonl-in.json": (written(lines(CHATS)), "jsonl", "messages"),
    "array.json": (written(json.dumps(CHATS).encode()), "json", "messages"),
    "array-in.jsonl": (written(json.dumps(CHATS, indent=1).encode()), "json", "messages"),
    "splits.json": (written(json.dumps({"validation": CHATS[:2], "train": CHATS}).encode()), "json", "messages"),
    "one-split.json": (written(json.dumps({"data": CHATS}, indent=2).encode()), "json", "messages"),
    "objects.json": (written("\n".join(json.dumps(record, indent=2) for record in CHATS).encode()), "json", "messages"),
    "pairs.csv": (written(table(PAIRS)), "csv", "prompt"),
    "excel.csv": (written(b"\xef\xbb\xbf" + table(PAIRS, ";", lineterminator="\r\n")), "csv", "prompt"),
    "pairs.tsv": (written(table(PAIRS, "\t")), "tsv", "prompt"),
    "chats.csv": (written(table([{"messages": json.dumps(record["messages"])} for record in CHATS])), "csv", "messages"),
    "chats.parquet": (parquet, "parquet", "messages"),
    "parquet-without-a-name": (parquet, "parquet", "messages"),
    "chats.arrow": (arrow, "arrow", "messages"),
    "packed.feather": (arrow_packed, "arrow", "messages"),
    "stream.arrow": (arrow_stream, "arrow", "messages"),
    "saved": (saved, "arrow", "messages"),
    "shards": (shards, "parquet", "messages"),
}


@pytest.mark.parametrize("name", SAME)
def test_every_kind_of_file_gives_the_same_records(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a local file reached for the network"))
    make, kind, form = SAME[name]
    make(tmp_path / name)
    source = open_source(tmp_path / name)
    assert (source.kind, source.format) == (kind, form)
    faults = Faults()
    for _ in range(2):  # a source is opened anew each time
        records = list(source.records(faults))
        assert [list(record.messages) for record in records] == [record["messages"] for record in CHATS]
        assert all(record.source.startswith(str(tmp_path / name)) for record in records)
    assert faults.total == 0


def test_enough_kinds() -> None:
    assert len(SAME) == 18
    assert {kind for _, kind, _ in SAME.values()} == {"jsonl", "json", "csv", "tsv", "parquet", "arrow"}


def test_rows_are_numbered_as_a_person_counts_them(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_bytes(table(PAIRS))
    (tmp_path / "a.json").write_bytes(b"[\n" + lines(CHATS).replace(b"\n", b",\n\n") + b"]")
    found = {name: [record.line for record in read_records(tmp_path / name)] for name in ("a.parquet", "a.csv", "a.json")}
    assert found == {"a.parquet": [1, 2, 3, 4, 5], "a.csv": [2, 3, 4, 5, 6], "a.json": [2, 4, 6, 8, 10]}


def test_splits_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"validation": CHATS[:2], "train": CHATS}))
    assert len(read_records(f"{tmp_path}/a.json#validation")) == 2
    shards(tmp_path / "shards")
    assert len(read_records(f"{tmp_path}/shards#test")) == 1
    with pytest.raises(DataError, match="no split tset") as caught:
        read_records(f"{tmp_path}/a.json#tset")
    assert caught.value.fix == "it has validation, train"
    (tmp_path / "b.json").write_text(json.dumps({"a": CHATS, "b": CHATS}))
    with pytest.raises(DataError, match="has the splits a, b") as caught:
        read_records(tmp_path / "b.json")
    assert caught.value.fix == f"say which: {tmp_path}/b.json#a"
    (tmp_path / "c#d.jsonl").write_bytes(lines(CHATS))  # a file of that very name comes first
    assert len(read_records(f"{tmp_path}/c#d.jsonl")) == 5
    with pytest.raises(DataError, match="has no splits"):
        read_records(f"{tmp_path}/c#d.jsonl#train")


def test_a_directory_of_texts(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("first\n", encoding="utf-8")
    (tmp_path / "sub" / "b.md").write_text("ثانية", encoding="utf-8")
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / "loop").symlink_to(tmp_path)
    source, faults = open_source(tmp_path), Faults()
    assert [(record.text, Path(record.source).name) for record in source.records(faults)] == [("first\n", "a.txt"), ("ثانية", "b.md")]
    assert (source.kind, source.format, faults.total) == ("text", "text", 0)
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "self.txt").symlink_to(tmp_path / "self.txt")
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9")
    (tmp_path / "blank.txt").write_bytes(b" \n")
    assert len(list(open_source(tmp_path).records(faults))) == 2
    assert faults.by_kind == {"not a regular file": 2, "not UTF-8": 1, "empty text": 1}
    (tmp_path / "also.jsonl").write_bytes(lines(CHATS))
    with pytest.raises(DataError, match=r"neither of text files nor of Parquet files alone") as caught:
        open_source(tmp_path)
    assert caught.value.fix == "name the file in it: also.jsonl"


def test_the_fingerprint_is_that_of_the_content(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_bytes(lines(CHATS))
    one = open_source(tmp_path / "a.jsonl").fingerprint
    assert one == open_source(tmp_path / "a.jsonl").fingerprint and len(one) == 32
    assert one != open_source(tmp_path / "a.jsonl", "text").fingerprint
    (tmp_path / "a.jsonl").write_bytes(lines(CHATS[:4]))
    assert one != open_source(tmp_path / "a.jsonl").fingerprint


# ---------------------------------------------------------------- the hub


def test_a_hub_name_goes_through_datasets_and_a_path_never(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load_dataset(path: str, config: str | None, split: str) -> Any:
        asked.append((path, config, split))
        if path == "org/gone":
            raise FileNotFoundError("no such data set")
        return datasets.Dataset.from_list(CHATS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    source = open_source("org/chats:small#test")
    assert (source.kind, source.format) == ("hub", "messages")
    assert [list(record.messages) for record in source.records(Faults())] == [record["messages"] for record in CHATS]
    assert asked == [("org/chats", "small", "test")]
    assert resolved("org/chats:small#test") == "org/chats:small#test"
    with pytest.raises(DataNotFound, match="org/gone, and no data set") as caught:
        open_source("org/gone")
    assert "no such data set" in caught.value.fix
    for path in ("org/chats.jsonl", "./org", "nowhere", "/org/chats"):
        with pytest.raises(DataNotFound, match="No data file"):
            open_source(path)
    (tmp_path / "org").mkdir()  # now it is a path that is missing
    with pytest.raises(DataNotFound, match="No data file"):
        open_source("org/chats")
    (tmp_path / "org" / "chats").write_bytes(lines(CHATS))
    assert open_source("org/chats").kind == "jsonl"
    assert resolved("org/chats") == str(tmp_path / "org" / "chats")
    assert len(asked) == 2


# ---------------------------------------------------------------- memory


def test_records_from_memory_are_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import pandas

    monkeypatch.chdir(tmp_path)
    frame = pandas.DataFrame(PAIRS)
    files = {kept(data, tmp_path) for data in (PAIRS, frame, datasets.Dataset.from_list(PAIRS), tuple(PAIRS), iter(PAIRS))}
    (file,) = files
    assert read_records(file)[0].answer == PAIRS[0]["completion"]
    assert kept("chats.jsonl") == "chats.jsonl" and kept(tmp_path) == str(tmp_path)
    made = recipes.lora("tiny", frame, held_out=PAIRS[:2])
    assert eval(repr(made), {"Recipe": type(made)}) == made
    assert made.data.startswith("runs/data/records-") and len(read_records(made.data)) == 5
    assert isinstance(made.held_out, str) and len(read_records(made.held_out)) == 2
    assert not list(tmp_path.rglob(".records*"))


def test_a_frame_with_gaps_and_arrays(tmp_path: Path) -> None:
    import numpy
    import pandas

    frame = pandas.DataFrame(
        {
            "instruction": ["a", "b"], "input": ["c", None], "output": ["d", "e"], "score": [1.5, float("nan")], "n": numpy.array([1, 2]),
            "day": pandas.to_datetime(["2020-01-01", None]), "vector": [numpy.array([1, 2]), None],
        }
    )  # fmt: skip
    file = Path(kept(frame, tmp_path))
    first, second = map(json.loads, file.read_text().splitlines())
    assert first == {
        "instruction": "a", "input": "c", "output": "d", "score": 1.5, "n": 1, "day": "2020-01-01T00:00:00", "vector": [1, 2],
    }  # fmt: skip
    assert (second["input"], second["score"], second["day"], second["vector"]) == (None, None, None, None)
    assert [record.messages[0]["content"] for record in read_records(file)] == ["a\n\nc", "b"]


@pytest.mark.parametrize(
    ("data", "words"),
    [(CHATS[0], "one record or a set of splits"), (b"abc", "data is a bytes"), (3, "data is a int"), (["a"], "record 0 of data is a str"),
     ([{"text": object()}], "cannot be written as JSON"), ([{"text": "\ud800"}], "half a surrogate"), ([{"a": float("inf")}], "cannot be written as JSON")],
)  # fmt: skip
def test_what_are_no_records(tmp_path: Path, data: Any, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        kept(data, tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- formats

A, B = says("user", "a"), says("assistant", "b")
CALL = [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
# name: (record, format, what is read)
FORMATS: dict[str, tuple[dict[str, Any], str, Record]] = {
    "sharegpt": (
        {"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        "sharegpt", Record((says("system", "s"), A, B)),
    ),
    "sharegpt with system beside": ({"system": "s", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
                                    "sharegpt", Record((says("system", "s"), A, B))),
    "sharegpt with calls": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                           {"from": "observation", "value": "1"}, {"from": "gpt", "value": "b"}], "tools": '[{"name": "f"}]'},
        "sharegpt",
        Record((A, says("assistant", "", tool_calls=[{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]), says("tool", "1"), B),
               tools=({"name": "f"},)),
    ),
    "sharegpt's list with OpenAI's messages": ({"conversations": [A, B]}, "messages", Record((A, B))),
    "OpenAI's calls": (
        {"messages": [A, {"role": "assistant", "content": None, "tool_calls": [{**CALL[0], "function": {"name": "f", "arguments": '{"x": 1}'}}]},
                      {"role": "tool", "content": "1", "tool_call_id": "c1"}, B], "tools": [{"type": "function", "function": {"name": "f", "strict": None}}]},
        "messages",
        Record((A, says("assistant", "", tool_calls=CALL), says("tool", "1", tool_call_id="c1"), B), tools=({"type": "function", "function": {"name": "f"}},)),
    ),
    "thoughts": ({"messages": [A, {**B, "reasoning_content": "why"}]}, "messages", Record((A, {**B, "reasoning_content": "why"}))),
    "nulls that tables fill in": ({"messages": [{**A, "tool_calls": None, "name": None}, {**B, "tool_calls": []}], "tools": None}, "messages", Record((A, B))),
    "prompt and completion": ({"prompt": "a", "completion": "b"}, "prompt", Record((A, B), given=1)),
    "prompt and completion as messages": (
        {"prompt": [A, B, A], "completion": [B]}, "prompt", Record((A, B, A, B), given=3),
    ),
    "alpaca": ({"instruction": "a", "input": "i", "output": "b"}, "instruction", Record((says("user", "a\n\ni"), B))),
    "alpaca without input, with its text": ({"instruction": "a", "input": "", "output": "b", "text": "Below is ..."}, "instruction",
                                            Record((A, B), ignored=("text",))),
    "alpaca with history": ({"instruction": "a", "output": "b", "system": "s", "history": [["a", "b"]]}, "instruction",
                            Record((says("system", "s"), A, B, A, B))),
    "text": ({"text": "abc", "url": "u"}, "text", Record(text="abc", ignored=("url",))),
    "preference": ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference", Record((A, B), given=1, rejected=(says("assistant", "c"),))),
    "preference, prompt within": ({"chosen": [A, B], "rejected": [A, says("assistant", "c")]}, "preference",
                                  Record((A, B), given=1, rejected=(says("assistant", "c"),))),
    "preference, prompt twice": ({"prompt": "a", "chosen": [A, B], "rejected": [A, says("assistant", "c")]}, "preference",
                                 Record((A, B), given=1, rejected=(says("assistant", "c"),))),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_formats(tmp_path: Path, name: str) -> None:
    record, form, expected = FORMATS[name]
    file = tmp_path / "a.jsonl"
    file.write_bytes(lines([record]))
    source = open_source(file)
    assert source.format == form
    (read,) = source.records(Faults())
    assert read == Record(**{**{field: getattr(expected, field) for field in Record.__dataclass_fields__}, "line": 1, "source": str(file)})
    parquet_file = tmp_path / "a.parquet"
    if "calls" not in name and "history" not in name:  # Arrow has one type a column: their rows would hold other fields
        pq.write_table(pa.Table.from_pylist([record, record]), parquet_file)
        assert [one.key for one in read_records(parquet_file)] == [read.key] * 2


def test_two_ways_to_read_are_refused_until_one_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(lines([{"messages": [A, B], "prompt": "x", "chosen": "y", "rejected": "z"}]))
    with pytest.raises(DataError, match="can be read as messages and as preference") as caught:
        open_source(file)
    assert caught.value.fix == "say which: format='messages' or format='preference'"
    assert read_records(file, "messages")[0].messages == (A, B)
    with pytest.raises(DataError, match="training on pairs is not there yet") as caught:
        check(str(file), "preference", "error")
    assert caught.value.fix == "train on the chosen answers alone: format='chosen'"
    (chosen,) = read_records(file, "chosen")
    assert (chosen.answer, chosen.rejected, chosen.given) == ("y", (), 1)
    assert "rejected" in chosen.ignored


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "sharegpt role": ({"conversations": [{"from": "human", "value": "a"}, {"from": "robot", "value": "b"}]}, "conversations[1].from: unknown role: robot"),
    "sharegpt value": ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt"}]}, "conversations[1].value: message without value"),
    "sharegpt order": ({"conversations": [{"from": "gpt", "value": "a"}]}, "conversations: roles out of order: assistant"),
    "image": ({"messages": [says("user", [{"type": "image_url", "image_url": "u"}]), B]},
              "messages[0].content[0]: content is not text (a part of type image_url)"),
    "call without a name": ({"messages": [A, says("assistant", "", tool_calls=[{"function": {}}])]}, "tool call without a function's name"),
    "arguments not JSON": ({"messages": [A, says("assistant", "", tool_calls=[{"name": "f", "arguments": "{x"}])]},
                           "messages[1].tool_calls.arguments: not JSON"),
    "arguments a list": ({"messages": [A, says("assistant", "", tool_calls=[{"name": "f", "arguments": [1]}])]}, "arguments are not an object (a list)"),
    "NUL in a call": ({"messages": [A, says("assistant", "", tool_calls=[{"name": "f", "arguments": {"x": "\0"}}])]}, "messages[1].tool_calls: NUL byte"),
    "tools a number": ({"messages": [A, B], "tools": 3}, "tools: tools is not a list of objects (a number)"),
    "a thought that is none": ({"messages": [A, {**B, "thinking": 3}]}, "messages[1].thinking: a thought is not text"),
    "tool before the assistant": ({"messages": [A, says("tool", "x"), B]}, "roles out of order: user, tool, assistant"),
    "completion a number": ({"prompt": "a", "completion": 3}, "completion: completion is not text (a number)"),
    "completion labelled false": ({"prompt": "a", "completion": "b", "label": False}, "label: a completion labelled false: b"),
    "completion blank": ({"prompt": "a", "completion": " "}, "completion: empty completion"),
    "prompt a list, completion a text": ({"prompt": [A], "completion": "b"}, "completion: completion is not a list (a string)"),
    "output a list": ({"instruction": "a", "output": ["b"]}, "output: output is not text (a list)"),
    "history": ({"instruction": "a", "output": "b", "history": ["x"]}, "history is not a list of pairs"),
    "text a number": ({"text": 3}, "text: text is not text (a number)"),
    "text blank": ({"text": "\n"}, "text: empty text"),
    "chosen without prompt": ({"chosen": "a", "rejected": "b"}, "no prompt (the record has chosen, rejected)"),
    "rejected empty": ({"prompt": "a", "chosen": [B], "rejected": []}, "rejected: empty rejected"),
    "nothing known": ({"question": "a", "answer": "b"}, "no format that is known (the record has question, answer)"),
    "messages a broken string": ({"messages": "[{'role': 'user'}]"}, "messages: not JSON"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_located(tmp_path: Path, name: str) -> None:
    record, words = WRONG[name]
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\n" + lines([record]))
    with pytest.raises(DataError) as caught:
        read_records(file)
    assert f"{file}:2" in caught.value.fact and words in caught.value.fact
    assert caught.value.fix


def test_a_few_of_another_format_are_faults(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(lines([*CHATS, {"text": "x"}, CHATS[0]]))
    faults = Faults()
    assert len(list(open_source(file).records(faults))) == 6
    assert [str(fault) for fault in faults.first] == [f'{file}:6, messages: no messages (the record has text): {{"text": "x"}}']


def test_records_of_one_line_are_told_apart_and_counted(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text('[{"q": 1}, {"q": 2}, {"prompt": "a", "completion": null},\n {"prompt": "c", "completion": "d"}]')
    faults = Faults()
    (good,) = open_source(file, "prompt").records(faults)
    assert (good.line, faults.lines) == (4, 3)
    assert str(faults.first[2]) == f'{file}:2, prompt: no prompt (the record has q): {{"q": 2}}'
    assert str(faults.first[4]) == f'{file}:3, completion: no completion (it is null): {{"prompt": "a", "completion": null}}'
    with pytest.raises(DataError, match="3 of 4 records"):
        check(str(file), "prompt", "error")


def test_what_is_skipped_is_written_down(tmp_path: Path) -> None:
    file, skipped = tmp_path / "a.jsonl", tmp_path / "skipped.jsonl"
    file.write_bytes(lines(CHATS) + b"\noops\n" + lines([{"messages": [A]}]))
    with Skipped(skipped) as leave_out:
        assert len(list(open_source(file).records(Faults(leave_out)))) == 5
    assert [json.loads(line) for line in skipped.read_text().splitlines()] == [
        {"source": str(file), "line": 6, "field": "", "reason": "not JSON", "detail": "Expecting value at character 1", "excerpt": "oops"},
        {"source": str(file), "line": 7, "field": "messages", "reason": "no assistant turn", "detail": "", "excerpt": "user"},
    ]
    check(str(file), "auto", "skip")
    with pytest.raises(DataError, match="2 of 7 records"):
        check(str(file), "auto", "error")
    with Skipped(skipped):
        pass
    assert not skipped.exists()


# ---------------------------------------------------------------- nasty tables


def bad_utf8(path: Path) -> None:
    content = pa.array([b"good", b"caf\xe9", b"good"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": content}), path)


def bomb_declared(path: Path) -> None:
    """Kilobytes that declare and hold 96 MiB."""
    value = pa.array(["x" * 2**24] * 6)
    pq.write_table(pa.table({"text": value}), path, compression="zstd", use_dictionary=False, write_statistics=False)


def bomb_pointing(path: Path) -> None:
    """One text of 16 MiB and eighty rows that point to it: a batch would be 1.25 GiB."""
    once = pa.DictionaryArray.from_arrays(pa.array([0] * 80, pa.int32()), pa.array(["x" * 2**24]))
    pq.write_table(pa.table({"text": once}), path, compression="zstd", store_schema=False)


def bomb_of_messages(path: Path) -> None:
    """Two rows of a hundred messages, each of which points to one text of 16 MiB."""
    content = pa.DictionaryArray.from_arrays(pa.array([0] * 200, pa.int32()), pa.array(["x" * 2**24]))
    messages = pa.StructArray.from_arrays([pa.array(["user", "assistant"] * 100), content], ["role", "content"])
    pq.write_table(pa.table({"messages": pa.ListArray.from_arrays([0, 100, 200], messages)}), path, compression="zstd", store_schema=False)


def bomb_arrow(path: Path) -> None:
    """Kilobytes whose one batch unpacks to 96 MiB."""
    data = pa.table({"text": pa.array(["x" * 2**24] * 6)})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, data.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(data)


def packed(path: Path) -> None:
    """Packed, as Feather is."""
    data = pa.Table.from_pylist(CHATS * 100)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, data.schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) as writer:
        writer.write_table(data, max_chunksize=70)


def packed_dictionary(path: Path) -> None:
    data = pa.table({"text": pa.array(["a", "b", "a"] * 100).dictionary_encode()})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, data.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(data)


def mixed(path: Path) -> None:
    """A row group whose dictionary is full after a while: its pages point to texts first and hold them later."""
    records = [{"messages": [says("user", f"{index} " * 300), says("assistant", "b")]} for index in range(2000)]
    pq.write_table(pa.Table.from_pylist(records), path, dictionary_pagesize_limit=2**16, data_page_size=2**14)


def bomb_of_nothing(path: Path) -> None:
    """Half a kilobyte: one row, a list of four million nulls."""
    nothing = pa.ListArray.from_arrays([0, 2**22], pa.nulls(2**22, pa.string()))
    pq.write_table(pa.table({"text": nothing}), path, compression="zstd")


def cut(make: Callable[[Path], object], share: float) -> Callable[[Path], None]:
    def made(path: Path) -> None:
        make(path)
        os.truncate(path, int(path.stat().st_size * share))

    return made


def flipped(path: Path) -> None:
    """Offsets of an Arrow file that point beyond its texts."""
    data = pa.table({"text": pa.array(["a" * 50] * 100)})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, data.schema) as writer:
        writer.write_table(data)
    content = path.read_bytes()
    offsets = b"".join((50 * index).to_bytes(4, "little") for index in range(60, 70))
    assert content.count(offsets) == 1
    path.write_bytes(content.replace(offsets, (2**30).to_bytes(4, "little") * 10))


def sparse(size: int, head: bytes = b"") -> Callable[[Path], None]:
    def made(path: Path) -> None:
        path.write_bytes(head)
        os.truncate(path, size)

    return made


# name: (what makes it, records that are read, what the one error or the located fault says)
NASTY: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "ragged.csv": (written(b"prompt,completion\na,b\nc\nd,e,f\ng,h\n"), 2, "3: a row of another width (1 cells, the header has 2)"),
    "open-quote.csv": (written(b'prompt,completion\na,b\n"c,d\ne,f\n'), 0, "not CSV (unexpected end of data)"),
    "quote-inside.csv": (written(b'prompt,completion\na,b\n"c"d,e\n'), 0, "not CSV"),
    "twice.csv": (written(b"prompt,prompt\na,b\n"), 0, "the header names prompt twice"),
    "nameless.csv": (written(b"prompt,\na,b\n"), 0, "columns without a name"),
    "latin1.csv": (written("prompt,completion\na,caf\xe9\nb,c\n".encode("latin-1")), 1, "2, completion: not UTF-8 (byte 0xe9)"),
    "nul.csv": (written(b"prompt,completion\na,b\0c\nd,e\n"), 1, "2, completion: NUL byte"),
    "empty.csv": (written(b""), 0, "holds no records"),
    "header.csv": (written(b"prompt,completion\n"), 0, "holds no records"),
    "gap.csv": (written(b"prompt,completion\na,\nb,c\n"), 1, "2, completion: no completion"),
    "python-list.csv": (written(b"messages\n\"[{'role': 'user'}]\"\n"), 0, "messages: not JSON"),
    "utf8.parquet": (bad_utf8, 2, "2: not UTF-8 (byte 0xe9)"),
    "cut.parquet": (cut(parquet, 0.7), 0, "cannot be read as Parquet"),
    "head.parquet": (written(b"PAR1"), 0, "cannot be read as Parquet"),
    "text.parquet": (written(lines(CHATS)), 0, "cannot be read as Parquet"),
    "numbers.parquet": (lambda path: pq.write_table(pa.table({"text": [1, 2]}), path), 0, "1, text: text is not text (a number)"),
    "empty.parquet": (lambda path: pq.write_table(pa.table({"text": pa.array([], pa.string())}), path), 0, "holds no records"),
    "null.parquet": (lambda path: pq.write_table(pa.table({"text": ["a", None]}), path), 1, "2, text: no text"),
    "bomb-declared.parquet": (bomb_declared, 0, "row group 1 packs 100,"),
    "bomb-pointing.parquet": (bomb_pointing, 80, ""),
    "bomb-of-nothing.parquet": (bomb_of_nothing, 0, "1: row too large (201,3"),
    "bomb.arrow": (bomb_arrow, 0, "a batch packs 100,66"),
    "packed.feather": (packed, 500, ""),
    "packed-dictionary.arrow": (packed_dictionary, 300, ""),
    "bomb-messages.parquet": (bomb_of_messages, 0, "1: row too large"),
    "mixed.parquet": (mixed, 2000, ""),
    "cut.arrow": (cut(arrow, 0.6), 0, "cannot be read as Arrow"),
    "offsets.arrow": (flipped, 0, "cannot be read as Arrow"),
    "text.arrow": (written(b"hello, this is no Arrow"), 0, "cannot be read as Arrow"),
    "cut.json": (written(b"[" + lines(CHATS).replace(b"\n", b",")[:-30]), 0, "not JSON (Unterminated string"),
    "comma.json": (written(b"[" + lines(CHATS).replace(b"\n", b"\n,,")), 0, "not JSON (Expecting value)"),
    "number.json": (written(b"42"), 0, "1: not a JSON object (a number)"),
    "two-arrays.json": (written(b"[" + lines(CHATS[:1]) + b"]\n[" + lines(CHATS[:2]).replace(b"\n", b",") + b"]"), 3, ""),
    "column-wise.json": (written(b'{"messages": {"0": [], "1": []}}'), 0, "messages is not a list (an object)"),
    "deep.json": (written(b"[" * 100_000), 0, "nested too deep"),
    "nan.json": (written(b'[{"text": NaN}]'), 0, "NaN is a Python word"),
    "twice.json": (written(b'{"train": [{"text": "a"}], "train": []}'), 0, "key 'train' appears twice"),
    "nul.json": (written(b'[{"text": "a\0"}]'), 0, "NUL byte"),
    "latin1.json": (written('[{"text": "caf\xe9"}]'.encode("latin-1")), 0, "not UTF-8"),
    "unclosed.json": (lambda path: path.write_bytes(b'[{"text": "' + b"x" * 80 * 2**20), 0, "value too long"),
    "zeros.jsonl": (sparse(2**28), 0, "1: line too long"),
    "zeros.csv": (sparse(2**28, b"prompt,completion\n"), 0, "a line of more than 64 MiB"),
    "zeros.txt": (sparse(2**28), 0, "1: text too long"),
    "zeros.json": (sparse(2**28, b"["), 0, "NUL byte"),
    "emoji.json": (written(('[{"text": "' + "😀" * 10**6 + '"}]').encode()), 1, ""),
    "million-cells.csv": (written(b"prompt,completion\n" + b"," * 10**6 + b"\na,b\n"), 1, "1,000,001 cells, the header has 2"),
}  # fmt: skip


def test_where_pyarrow_cannot_point_it_reads_fewer_rows_at_a_time(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([{"text": str(index)} for index in range(100)]), tmp_path / "a.parquet")

    class Pointing:
        def iter_batches(self, batch_size: int, row_groups: list[int], use_threads: bool) -> Iterator[Any]:
            yield pa.record_batch({"text": [str(index) for index in range(40)]})
            raise pa.ArrowException("Nested data conversions not implemented for chunked array outputs")

    batches = list(tables._group_batches(pq.ParquetFile(tmp_path / "a.parquet"), Pointing(), 0))
    assert [row["text"] for batch in batches for row in batch.to_pylist()] == [str(index) for index in range(100)]
    assert [len(batch) for batch in batches] == [40, 8, 16, 16, 16, 4]


def outcome(path: Path) -> tuple[int, str]:
    """Records that are read, and what is said of the others: all in one error."""
    faults, count = Faults(), 0
    try:
        source = open_source(path)
        for record in source.records(faults):
            assert isinstance(record, Record)
            count += 1
        source.refuse(faults, count + faults.lines)
    except DataError as error:
        said = str(error)
        harmless = error.fix and len(said) < 4000 and all(char.isprintable() or char == "\n" for char in said)
        return count, error.fact if harmless else f"harmful: {said!r}"
    return count, ""


LARGE = tuple(name for name in NASTY if name.startswith(("bomb", "zeros", "unclosed", "emoji", "deep")))


@pytest.mark.parametrize("name", [name for name in NASTY if name not in LARGE])
def test_nasty(tmp_path: Path, name: str) -> None:
    make, records, words = NASTY[name]
    make(tmp_path / name)
    count, said = outcome(tmp_path / name)
    assert count == records, said
    assert words in said and bool(said) == bool(words)
    assert not said or str(tmp_path / name) in said


def test_large_ones_take_little_memory(tmp_path: Path) -> None:
    """All in one process that may take 6 GiB of addresses, whose peak is measured after each."""
    signal.alarm(6 * SECONDS)
    for name in LARGE:
        NASTY[name][0](tmp_path / name)
    script = (
        "import json, re, resource, sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); import pyarrow.parquet\n"
        "from test_sources import LARGE, outcome\n"
        "resource.setrlimit(resource.RLIMIT_AS, (6 * 2**30, 6 * 2**30))\n"
        "def peak(): return int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])\n"
        "for name in LARGE: print(json.dumps([name, *outcome(Path(sys.argv[2]) / name), peak()]))\n"
    )
    command = [sys.executable, "-c", script, str(Path(__file__).parent), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=5 * SECONDS, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    found = {name: (count, said, peak) for name, count, said, peak in map(json.loads, result.stdout.splitlines())}
    assert set(found) == set(LARGE) and len(LARGE) == 12
    for name, (count, said, peak) in found.items():
        _, records, words = NASTY[name]
        assert count == records and words in said and bool(said) == bool(words), (name, count, said[:300])
        assert peak < 2**20, f"{name}: {peak / 2**10:.0f} MiB"


def broken(content: bytes, rng: random.Random) -> bytes:
    """The content with a few bytes changed, taken out, put in or repeated."""
    made = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 5, 30])):
        at, how = rng.randrange(len(made) or 1), rng.randrange(4)
        if how == 0:
            made[at : at + 1] = bytes([rng.randrange(256)])
        elif how == 1:
            del made[at : at + rng.randrange(1, 20)]
        elif how == 2:
            made[at:at] = rng.randbytes(rng.randrange(1, 8))
        else:
            made[at:at] = made[max(0, at - 40) : at]
    return bytes(made)


def break_and_read(folder: Path, times: int) -> list[str]:
    """What is said of as many broken files, drawn over every kind of file."""
    rng, said = random.Random(0), []
    makers = {name: make for name, (make, _, _) in SAME.items() if name not in ("saved", "shards")}  # files alone
    whole: dict[str, bytes] = {}
    for name, make in makers.items():
        make(folder / name)
        whole[name] = (folder / name).read_bytes()
    for index in range(times):
        name = sorted(makers)[index % len(makers)]
        (folder / name).write_bytes(broken(whole[name], rng))
        said.append(outcome(folder / name)[1])
    return said


def test_broken_files_of_every_kind_meet_one_error(tmp_path: Path) -> None:
    """In a process of its own: a library that trusts a broken file would take this one down with it."""
    signal.alarm(6 * SECONDS)
    script = (
        "import json, sys; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        "from test_sources import break_and_read\n"
        "print(json.dumps(break_and_read(Path(sys.argv[2]), 900)))\n"
    )
    command = [sys.executable, "-c", script, str(Path(__file__).parent), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=5 * SECONDS, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    said = json.loads(result.stdout)
    assert len(said) == 900 and 600 < sum(map(bool, said)) < 900
    assert not [fact for fact in said if fact.startswith("harmful")]


def test_enough_nasty_ones() -> None:
    from test_read import READ, REFUSED

    assert len(NASTY) == 46
    assert len(NASTY) + len(WRONG) + len(READ) + len(REFUSED) >= 130


# ---------------------------------------------------------------- from the source to the rows


def test_rows_from_a_table_with_what_is_left_out_written_down(tmp_path: Path, marked: Any) -> None:
    (tmp_path / "a.csv").write_bytes(table(PAIRS * 4) + b"one cell\n")
    made = recipes.lora("tiny", tmp_path / "a.csv", on_bad="skip", held_out=0.2)
    prepared = prepare(made, marked, tmp_path / "skipped.jsonl")
    assert (prepared.report.records, prepared.report.skipped) == (20, 1)
    assert json.loads((tmp_path / "skipped.jsonl").read_text())["line"] == 22
    assert all(record.prompt[0]["content"].startswith("question") for record in prepared.held_out_chats)
    with pytest.raises(DataError, match="a row of another width"):
        prepare(made.replace(on_bad="error"), marked)


def test_texts_are_learned_and_not_asked_about(tmp_path: Path, marked: Any) -> None:
    for index in range(10):
        (tmp_path / f"{index}.txt").write_text(f"The lamp {index} on the table is warm.")
    prepared = prepare(recipes.lora("tiny", tmp_path, held_out=0.2), marked)
    assert (prepared.report.documents, prepared.report.held_out, list(prepared.held_out_chats)) == (8, 2, [])
    assert prepared.report.supervised == prepared.report.tokens - 8  # all but each text's first token


def test_training_takes_records_from_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sparklab as sl
    from sparklab.run import launch

    monkeypatch.setattr(launch, "start", lambda directory, **_: None)
    with pytest.raises(DataError, match="training on pairs is not there yet"):
        sl.train(recipes.lora("tiny", [{"prompt": "a", "chosen": "b", "rejected": "c"}]), tmp_path / "run", panel=False)
    run = sl.train(recipes.lora("tiny", "elsewhere.jsonl"), tmp_path / "run", data=PAIRS, panel=False)
    assert Path(run.recipe.data).parent == tmp_path / "data"
    assert [record.answer for record in read_records(run.recipe.data)] == [pair["completion"] for pair in PAIRS]
