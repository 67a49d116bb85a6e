"""A corpus of nasty files: each is read, or refused with one error that names the place."""

from __future__ import annotations

import gzip
import json
import os
import socket
from pathlib import Path

import pytest

from sparklab.data.faults import Faults, excerpt
from sparklab.data.read import open_source, read_records
from sparklab.data.record import Record
from sparklab.errors import DataError, DataNotFound


def scan(path: Path) -> tuple[list[Record], Faults]:
    faults = Faults()
    return list(open_source(path).records(faults)), faults


GOOD = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'


def record(*messages: object, **more: object) -> bytes:
    return json.dumps({"messages": list(messages), **more}).encode()


def says(role: object, content: object) -> dict[str, object]:
    return {"role": role, "content": content}


def chat(*roles: str) -> bytes:
    return record(*(says(role, f"{role} {index}") for index, role in enumerate(roles)))


READ = {
    "plain": GOOD,
    "newline at the end": GOOD + b"\n",
    "byte order mark": b"\xef\xbb\xbf" + GOOD,
    "CRLF": GOOD + b"\r\n" + GOOD + b"\r\n",
    "blank lines": b"\n  \n" + GOOD + b"\n\n\t\n",
    "spaces around": b"   " + GOOD + b"  ",
    "system": chat("system", "user", "assistant"),
    "many turns": chat("user", "assistant", "user", "assistant"),
    "empty question": record(says("user", ""), says("assistant", "b")),
    "Arabic": record(says("user", "من أنت؟"), says("assistant", "أنا")),
    "raw UTF-8": '{"messages": [{"role": "user", "content": "é😀"}, {"role": "assistant", "content": "ليلى"}]}'.encode(),
    "surrogate pair": rb'{"messages": [{"role": "user", "content": "\ud83d\ude00"}, {"role": "assistant", "content": "b"}]}',
    "nested quotes": record(says("user", 'she said "he said \\"x\\""'), says("assistant", '{"a": "\\""}')),
    "line separators in the text": '{"messages": [{"role": "user", "content": "a\u2028b\u2029c\u0085d"}, {"role": "assistant", "content": "b"}]}'.encode(),
    "bidi controls": record(says("user", "\u202eabc\u2066"), says("assistant", "\u200fb")),
    "HTML": record(says("user", "<script>alert(1)</script>"), says("assistant", "</textarea><img src=x onerror=y>")),
    "special tokens spelled": record(says("user", "<|assistant|><|end|>"), says("assistant", "<|end|>")),
    "more fields": record(says("user", "a") | {"name": "n"}, says("assistant", "b"), id=3),
    "a million emoji": record(says("user", "😀" * 10**6), says("assistant", "b")),
    "a line of 50 MB": record(says("user", "x" * 50 * 10**6), says("assistant", "b")),
}

# name: (bytes, faulty line or None for a fault of the whole file, what the error says)
REFUSED: dict[str, tuple[bytes, int | None, str]] = {
    "empty": (b"", None, "holds no records"),
    "only white space": (b" \n\r\n\t", None, "holds no records"),
    "only a byte order mark": (b"\xef\xbb\xbf", None, "holds no records"),
    "broken UTF-8": (GOOD + b'\n{"messages": "\xff\xfe"}', 2, "not UTF-8 (byte 14 is 0xff)"),
    "Latin-1": ('{"messages": [{"role": "user", "content": "caf\xe9"}]}'.encode("latin-1"), 1, "not UTF-8"),
    "UTF-16": (GOOD.decode().encode("utf-16"), 1, "save it as UTF-8: iconv"),
    "cut character": (GOOD[:60] + "é".encode()[:1], 1, "not UTF-8"),
    "NUL": (GOOD + b"\n" + b"\0" * 30, 2, "NUL byte"),
    "NUL inside": (GOOD.replace(b'"a"', b'"a\0"'), 1, "NUL byte"),
    "NUL escaped": (GOOD.replace(b'"a"', rb'"a\u0000"'), 1, "messages[0].content: NUL byte"),
    "not JSON": (GOOD + b"\nhello\n" + GOOD, 2, "not JSON (Expecting value at character 1): hello"),
    "cut line": (GOOD[:-9], 1, "not JSON"),
    "two records in a line": (GOOD + GOOD, 1, "not JSON (Extra data"),
    "raw tab in a string": (GOOD.replace(b'"a"', b'"\t"'), 1, "Invalid control character"),
    "single quotes": (GOOD.replace(b'"', b"'"), 1, "not JSON"),
    "trailing comma": (GOOD.replace(b"]}", b"],}"), 1, "not JSON"),
    "old Mac line ends": (GOOD + b"\r" + GOOD, 1, "bare carriage returns"),
    "gzip": (gzip.compress(GOOD), 1, "unpack it first: gunzip"),
    "Parquet": (b"PAR1\x15\x04\xff" + GOOD, None, "cannot be read as Parquet"),
    "a string": (b'"hello"', 1, "not a JSON object (a string)"),
    "null": (b"null", 1, "not a JSON object (null)"),
    "nested too deep": (b'{"a": ' + b"[" * 200_000, 1, "not JSON"),
    "endless integer": (b'{"messages": ' + b"9" * 5000 + b"}", 1, "a number too long"),
    "duplicate keys": (GOOD.replace(b'{"role": "user"', b'{"role": "user", "role": "system"'), 1, "key 'role' appears twice"),
    "NaN": (GOOD[:-1] + b', "score": NaN}', 1, "NaN is a Python word"),
    "infinity": (GOOD[:-1] + b', "score": -Infinity}', 1, "-Infinity is a Python word"),
    "empty object": (b"{}", 1, "no format that is known (the record has no field)"),
    "messages a string": (b'{"messages": "a"}', 1, "messages is not a list (a string)"),
    "messages an object": (b'{"messages": {"role": "user"}}', 1, "messages is not a list (an object)"),
    "empty messages": (b'{"messages": []}', 1, "empty messages"),
    "message a string": (record("a"), 1, "messages[0]: message is not an object (a string)"),
    "no role": (record({"content": "a"}, says("assistant", "b")), 1, "messages[0].role: message without role"),
    "no content": (record({"role": "user"}, says("assistant", "b")), 1, "messages[0].content: message without content"),
    "role a list": (record(says(["user"], "a"), says("assistant", "b")), 1, "unknown role"),
    "role of ShareGPT": (record(says("human", "a"), says("assistant", "b")), 1, "write 'user' for 'human'"),
    "role tool": (record(says("user", "a"), says("tool", "x"), says("assistant", "b")), 1, "roles out of order: user, tool, assistant"),
    "content null": (record(says("user", "a"), says("assistant", None)), 1, "messages[1].content: content is not text (null)"),
    "content a number": (record(says("user", 3), says("assistant", "b")), 1, "content is not text (a number)"),
    "empty answer": (record(says("user", "a"), says("assistant", "")), 1, "messages[1].content: empty assistant content"),
    "blank answer": (record(says("user", "a"), says("assistant", " \n\t")), 1, "empty assistant content"),
    "half a surrogate pair": (GOOD.replace(b'"a"', rb'"a\ud83d"'), 1, "half a surrogate pair"),
    "no assistant": (chat("user"), 1, "no assistant turn"),
    "only system": (chat("system"), 1, "no assistant turn"),
    "assistant first": (chat("assistant", "user", "assistant"), 1, "roles out of order: assistant, user, assistant"),
    "user twice": (chat("user", "user", "assistant"), 1, "roles out of order"),
    "assistant twice": (chat("user", "assistant", "assistant"), 1, "roles out of order"),
    "system late": (chat("user", "system", "assistant"), 1, "roles out of order"),
    "system and answer": (chat("system", "assistant"), 1, "roles out of order"),
    "user last": (chat("user", "assistant", "user"), 1, "last message is not the assistant's"),
}


def test_corpus_size() -> None:
    assert (len(READ), len(REFUSED)) == (20, 49)


@pytest.mark.parametrize("name", READ)
def test_read(tmp_path: Path, name: str) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_bytes(READ[name])
    chats = read_records(file)
    lines = [line for line in READ[name].removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip()]
    assert [list(chat.messages) for chat in chats] == [
        [{"role": message["role"], "content": message["content"]} for message in json.loads(line)["messages"]] for line in lines
    ]


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path: Path, name: str) -> None:
    data, line, expected = REFUSED[name]
    file = tmp_path / "chats.jsonl"
    file.write_bytes(data)
    with pytest.raises(DataError) as caught:
        read_records(file)
    assert expected in str(caught.value)
    assert (f"{file}:{line}" if line else str(file)) in caught.value.fact
    assert caught.value.fix
    assert len(str(caught.value)) < 4000
    assert all(char.isprintable() or char == "\n" for char in str(caught.value))


JSON = {
    "one array": b"[" + GOOD + b",\n" + GOOD + b"]",
    "pretty-printed": json.dumps(json.loads(GOOD), indent=1).encode() + b"\n" + json.dumps(json.loads(GOOD), indent=1).encode(),
    "splits": b'{"test": [], "train": [' + GOOD + b", " + GOOD + b"]}",
    "pretty-printed array": json.dumps([json.loads(GOOD)] * 2, indent=4).encode(),
}


@pytest.mark.parametrize("name", JSON)
def test_json(tmp_path: Path, name: str) -> None:
    file = tmp_path / "chats.json"
    file.write_bytes(JSON[name])
    assert [record.messages for record in read_records(file)] == [tuple(json.loads(GOOD)["messages"])] * 2


def test_content_in_parts(tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_bytes(record(says("user", [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]), says("assistant", "c")))
    assert read_records(file)[0].messages[0] == says("user", "ab")


def test_all_faults_are_counted_and_few_shown(tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_bytes(b"\n".join([GOOD, b"oops"] * 1000 + [b'{"messages": []}']))
    with pytest.raises(DataError) as caught:
        read_records(file)
    fact = caught.value.fact
    assert "1,001 of 2,001 records cannot be used (1,000 not JSON, 1 empty messages)" in fact
    assert [f"{file}:{line}:" in fact for line in (2, 4, 6, 8, 10, 12)] == [True] * 5 + [False]
    assert "... and 996 more" in fact
    chats, faults = scan(file)
    assert (len(chats), faults.total, faults.lines) == (1000, 1001, 1001)


def test_all_faults_of_one_record(tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_bytes(record(says("bot", 1), says("assistant", "")))
    with pytest.raises(DataError, match="1 of 1 records") as caught:
        read_records(file)
    for expected in ("messages[0].role: unknown role", "messages[0].content: content is not text", "messages[1].content: empty assistant"):
        assert expected in caught.value.fact


def test_line_numbers_count_blank_lines(tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_bytes(b"\r\n\n" + GOOD + b"\n\n" + GOOD)
    assert [(chat.line, chat.source) for chat in read_records(file)] == [(3, str(file)), (5, str(file))]


def test_a_line_beyond_the_limit_is_one_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparklab.data.strict.LINE_LIMIT", 200)
    file = tmp_path / "chats.jsonl"
    file.write_bytes(GOOD + b"\n" + b"x" * 1000 + b"\n" + GOOD + b"\nhello")
    chats, faults = scan(file)
    assert [chat.line for chat in chats] == [1, 3]
    assert [(fault.line, fault.kind) for fault in faults.first] == [(2, "line too long"), (4, "not JSON")]


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "Chats.jsonl").write_bytes(GOOD)
    with pytest.raises(DataNotFound, match=r"did you mean .*Chats\.jsonl") as caught:
        read_records(tmp_path / "chat.jsonl")
    assert isinstance(caught.value, FileNotFoundError)
    with pytest.raises(DataNotFound, match=r"there is Chats\.jsonl"):
        read_records(tmp_path / "something-else-altogether")
    with pytest.raises(DataNotFound, match="no folder"):
        read_records(tmp_path / "nowhere" / "chats.jsonl")
    with pytest.raises(DataNotFound):
        read_records(tmp_path / "Chats.jsonl" / "chats.jsonl")
    with pytest.raises(DataNotFound):
        read_records("chats\0.jsonl")


def test_directory_lists_what_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    with pytest.raises(DataError, match=r"(?s)is a directory.*a\.jsonl"):
        read_records(tmp_path)


def test_what_is_no_regular_file_is_refused_unopened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        for path, sort in ((tmp_path / "fifo", "pipe"), (tmp_path / "socket", "socket"), (Path("/dev/zero"), "character device")):
            with pytest.raises(DataError, match=f"not a regular file but a {sort}"):
                read_records(path)


def test_unreadable_paths(tmp_path: Path) -> None:
    loop = tmp_path / "loop.jsonl"
    loop.symlink_to(loop)
    with pytest.raises(DataError, match="cannot be read"):
        read_records(loop)
    with pytest.raises(DataError, match="cannot be read"):
        read_records(tmp_path / ("n" * 5000))
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    with pytest.raises(DataNotFound):
        read_records(tmp_path / "dangling")


def test_link_to_a_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "chats.jsonl").write_bytes(GOOD)
    (tmp_path / "link").symlink_to(tmp_path / "chats.jsonl")
    assert len(read_records(tmp_path / "link")) == 1


def test_unused_fields_are_remembered(tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_bytes(READ["more fields"])
    assert read_records(file)[0].ignored == ("id", "messages[].name")


def test_chat_key_and_parts() -> None:
    one = Record((says("user", "a"), says("assistant", "b")), line=1)  # type: ignore[arg-type]
    other = Record((says("user", "a"), says("assistant", "b")), line=9, source="elsewhere")  # type: ignore[arg-type]
    third = Record((says("user", "ab"), says("assistant", "")), line=1)  # type: ignore[arg-type]
    assert one.key == other.key != third.key
    assert (one.prompt, one.answer) == ([says("user", "a")], "b")


def test_excerpt_is_harmless() -> None:
    assert excerpt("a\x1b[31m\u202eb\ud800\n") == "a\\x1b[31m\\u202eb\\ud800\\n"
    assert excerpt("x" * 100) == "x" * 80 + "…"
    assert excerpt({"ك": 1}) == '{"ك": 1}'
