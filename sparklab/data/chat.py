"""One chat, and what makes a JSON line one: the strict half of reading."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from sparklab.data.faults import Fault, Faults, excerpt

Message = dict[str, str]
"""``{"role": ..., "content": ...}``, as chat templates take it."""

ROLES: Final = ("system", "user", "assistant")
_ORDER_FIX: Final = "order the roles as: system (if any), then user and assistant in turn, assistant last"
_SURROGATE: Final = re.compile("[\ud800-\udfff]")
_JSON_FIX: Final = "write each record as one JSON object on one line"
_ALIASES: Final = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "ai": "assistant"}


@dataclass(frozen=True)
class Chat:
    """One record: its messages and where they came from."""

    messages: tuple[Message, ...]
    line: int = 0
    """Line number in ``source``, from 1."""
    source: str = ""
    ignored: tuple[str, ...] = ()
    """Fields of the record that are not used, as ``messages[].name``."""

    @cached_property
    def key(self) -> bytes:
        """Sixteen bytes that two chats share exactly when their roles and contents are the same."""
        said = json.dumps([[message["role"], message["content"]] for message in self.messages])
        return hashlib.blake2b(said.encode(), digest_size=16).digest()

    @property
    def prompt(self) -> list[Message]:
        """The messages before the last answer: what a model is asked with when the chat is held out."""
        return list(self.messages[:-1])

    @property
    def answer(self) -> str:
        """The last answer: what a model should say to :attr:`prompt`."""
        return self.messages[-1]["content"]


def parse_chat(raw: bytes | None, line: int, source: str, faults: Faults) -> Chat | None:
    """One line of JSONL as a chat, or None with everything wrong with it added to ``faults``.

    ``raw`` is None for a line that was too long to read.
    """
    try:
        record = _record(raw)
        found = list(_wrong_with(record))
    except _WrongError as unreadable:
        record, found = {}, [unreadable]
    for wrong in found:
        faults.add(Fault(kind=wrong.kind, source=source, line=line, field=wrong.field, detail=wrong.detail, excerpt=excerpt(wrong.value), fix=wrong.fix))
    if found:
        return None
    messages = tuple({"role": message["role"], "content": message["content"]} for message in record["messages"])
    return Chat(messages, line, source, _ignored(record))


class _WrongError(ValueError):
    """One fault, before anybody knows its file and line."""

    def __init__(self, kind: str, value: object = "", *, field: str = "", detail: str = "", fix: str = "") -> None:
        super().__init__(kind)
        self.kind, self.value, self.field, self.detail, self.fix = kind, value, field, detail, fix


# ---------------------------------------------------------------- the line


class _NotStrictError(ValueError):
    """JSON that Python would take and other readers would not."""


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _NotStrictError(f"key '{excerpt(twice)}' appears twice, and readers disagree on which counts")
    return record


def _no_constant(name: str) -> Any:
    raise _NotStrictError(f"{name} is a Python word")


_DECODER: Final = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_no_constant)


def _record(raw: bytes | None) -> dict[str, Any]:
    """The line as a JSON object; raises :class:`_WrongError`."""
    if raw is None:
        raise _WrongError("line too long", fix="this is no JSONL file, or its line ends are missing")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        shown = raw[max(0, error.start - 20) :].decode("utf-8", "backslashreplace")
        raise _WrongError("not UTF-8", shown, detail=f"byte {error.start} is 0x{raw[error.start]:02x}", fix="save the file as UTF-8") from None
    text = text.strip()
    if "\0" in text:
        raise _WrongError("NUL byte", text, fix="remove the NUL bytes (tr -d '\\000'); they mean that the file was cut or is not text")
    try:
        record = _DECODER.decode(text)
    except _NotStrictError as error:
        raise _WrongError("not strict JSON", text, detail=str(error), fix=_JSON_FIX) from None
    except json.JSONDecodeError as error:
        raise _WrongError("not JSON", text, detail=f"{error.msg} at character {error.pos + 1}", fix=_JSON_FIX) from None
    except RecursionError:
        raise _WrongError("not JSON", text, detail="nested too deep", fix=_JSON_FIX) from None
    except ValueError:  # Python refuses to read an integer of thousands of digits
        raise _WrongError("not JSON", text, detail="a number too long to read", fix=_JSON_FIX) from None
    if not isinstance(record, dict):
        raise _WrongError("not a JSON object", record, detail=_type(record), fix='write each record as {"messages": [...]}')
    return record


# ---------------------------------------------------------------- the record


def _wrong_with(record: dict[str, Any]) -> Iterator[_WrongError]:
    """Everything wrong with a record; the order of roles is judged only where each message is sound."""
    if "messages" not in record:
        has = f"the record has {', '.join(map(excerpt, list(record)[:8])) or 'no field'}"
        yield _WrongError("no messages", record, field="messages", detail=has, fix='write each record as {"messages": [...]}')
        return
    messages = record["messages"]
    if not isinstance(messages, list):
        yield _WrongError(
            "messages is not a list", messages, field="messages", detail=_type(messages), fix='write "messages": [{"role": ..., "content": ...}, ...]'
        )
        return
    if not messages:
        yield _WrongError("empty messages", record, field="messages", fix="remove records that say nothing")
        return
    found = [wrong for index, message in enumerate(messages) for wrong in _wrong_with_message(message, f"messages[{index}]")]
    yield from found or _wrong_order([message["role"] for message in messages])


def _wrong_with_message(message: object, field: str) -> Iterator[_WrongError]:
    if not isinstance(message, dict):
        yield _WrongError("message is not an object", message, field=field, detail=_type(message), fix='write messages as {"role": ..., "content": ...}')
        return
    role = message.get("role")
    if "role" not in message:
        yield _WrongError("message without role", message, field=f"{field}.role", fix='write messages as {"role": ..., "content": ...}')
    elif role not in ROLES:
        alias = _ALIASES.get(role) if isinstance(role, str) else None
        fix = f"write '{alias}' for '{role}'" if alias else f"use the roles {', '.join(ROLES)}"
        yield _WrongError("unknown role", role, field=f"{field}.role", fix=fix)
    content = message.get("content")
    if "content" not in message:
        yield _WrongError("message without content", message, field=f"{field}.content", fix='write messages as {"role": ..., "content": ...}')
    elif not isinstance(content, str):
        yield _WrongError("content is not text", content, field=f"{field}.content", detail=_type(content), fix="give every content as one string")
    elif role == "assistant" and not content.strip():
        yield _WrongError("empty assistant content", content, field=f"{field}.content", fix="remove the records whose answer is empty")
    elif "\0" in content:
        yield _WrongError("NUL byte", content, field=f"{field}.content", fix="remove the \\u0000 from the text")
    elif _SURROGATE.search(content):
        yield _WrongError("half a surrogate pair", content, field=f"{field}.content", fix="mend the text: some tool cut an emoji in half")


def _wrong_order(roles: list[str]) -> Iterator[_WrongError]:
    shown = ", ".join(roles)
    if "assistant" not in roles:
        yield _WrongError("no assistant turn", shown, field="messages", fix="give each record an answer to learn: a last message of the assistant")
        return
    body = roles[1:] if roles[0] == "system" else roles
    expected = ["user" if index % 2 == 0 else "assistant" for index in range(len(body))]
    if body != expected:
        yield _WrongError("roles out of order", shown, field="messages", fix=_ORDER_FIX)
    elif body[-1] != "assistant":
        yield _WrongError("last message is not the assistant's", shown, field="messages", fix="remove what follows the last answer: nothing is learned from it")


def _ignored(record: dict[str, Any]) -> tuple[str, ...]:
    names = {name for name in record if name != "messages"}
    names |= {f"messages[].{name}" for message in record["messages"] for name in message if name not in ("role", "content")}
    return tuple(sorted(names)) if names else ()


def _type(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), type(value).__name__)
