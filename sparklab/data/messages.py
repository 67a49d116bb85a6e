"""A list of messages, made what chat templates take, with everything wrong with it located: the strict half of every chat format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from sparklab.data.faults import WrongError
from sparklab.data.record import ROLES, THOUGHTS, Message
from sparklab.data.strict import type_name, value_of

_ORDER_FIX: Final = "order the roles as: system (if any), then user and assistant in turn (tool results after the assistant's call), assistant last"
_ALIASES: Final = {
    "human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "ai": "assistant", "developer": "system", "function": "tool",
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """How a format spells a message."""

    role: str = "role"
    content: str = "content"
    roles: Mapping[str, str] = field(default_factory=lambda: {role: role for role in ROLES})
    """The format's roles, and ours."""

    @property
    def example(self) -> str:
        """A message of the format, for a fix."""
        return f'{{"{self.role}": ..., "{self.content}": ...}}'


CHAT: Final = Shape()
SHAREGPT: Final = Shape(
    "from", "value",
    {
        "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system", "tool": "tool", "observation": "tool",
        "function_call": "assistant",
    },
)  # fmt: skip


@dataclass
class Checked:
    """Messages as templates take them, what is wrong with them, and the fields that nothing uses."""

    messages: list[Message]
    wrong: list[WrongError]
    ignored: set[str]


def check_messages(value: Any, name: str, shape: Shape) -> Checked:
    """The messages of the field ``name``; their order is not judged here. A JSON string of a list, as tables keep it, is read."""
    checked = Checked([], [], set())
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = value_of(value)
        except WrongError as wrong:
            wrong.field = name
            checked.wrong.append(wrong)
            return checked
    if not isinstance(value, list):
        kind = f"{name} is not a list"
        checked.wrong.append(WrongError(kind, value, field=name, detail=type_name(value), fix=f'write "{name}": [{shape.example}, ...]'))
    elif not value:
        checked.wrong.append(WrongError(f"empty {name}", value, field=name, fix="remove records that say nothing"))
    else:
        for index, message in enumerate(value):
            _check_message(message, f"{name}[{index}]", name, shape, checked)
    return checked


def _check_message(message: object, at: str, name: str, shape: Shape, checked: Checked) -> None:
    if not isinstance(message, dict):
        fix = f"write messages as {shape.example}"
        checked.wrong.append(WrongError("message is not an object", message, field=at, detail=type_name(message), fix=fix))
        return
    role = message.get(shape.role)
    ours = shape.roles.get(role) if isinstance(role, str) else None
    wrong = list(_wrong_role(message, role, ours, at, shape))
    made: Message = {"role": ours or role, "content": ""}
    try:
        if role == "function_call":
            made["tool_calls"] = _calls(message.get(shape.content), f"{at}.{shape.content}")
        else:
            made["content"] = _content(message, ours, f"{at}.{shape.content}", shape)
        if ours == "assistant":
            _take_beside(message, made, at)
    except WrongError as found:
        wrong.append(found)
    if ours == "tool":
        made |= {key: message[key] for key in ("name", "tool_call_id") if isinstance(message.get(key), str)}
    if ours == "assistant" and not wrong and not made["content"].strip() and "tool_calls" not in made:
        fix = "remove the records whose answer is empty"
        wrong.append(WrongError(f"empty assistant {shape.content}", message.get(shape.content), field=f"{at}.{shape.content}", fix=fix))
    checked.ignored |= {f"{name}[].{key}" for key, kept in message.items() if key not in (shape.role, shape.content, *made) and kept not in (None, [], {})}
    checked.wrong += wrong
    checked.messages.append(made)


def _wrong_role(message: dict[str, Any], role: object, ours: str | None, at: str, shape: Shape) -> Iterator[WrongError]:
    if shape.role not in message:
        yield WrongError(f"message without {shape.role}", message, field=f"{at}.{shape.role}", fix=f"write messages as {shape.example}")
    elif ours is None:
        alias = _ALIASES.get(role) if isinstance(role, str) else None
        fix = f"write '{alias}' for '{role}'" if alias else f"use the roles {', '.join(shape.roles)}"
        yield WrongError("unknown role", role, field=f"{at}.{shape.role}", fix=fix)


def _content(message: dict[str, Any], role: str | None, at: str, shape: Shape) -> str:
    """The text of a message; raises :class:`WrongError`."""
    content = message.get(shape.content)
    if content is None and role == "assistant" and message.get("tool_calls"):
        return ""
    if shape.content not in message:
        raise WrongError(f"message without {shape.content}", message, field=at, fix=f"write messages as {shape.example}")
    if isinstance(content, list):
        content = "".join(_part(part, f"{at}[{index}]") for index, part in enumerate(content))
    if not isinstance(content, str):
        fix = 'give every content as one string, or as a list of {"type": "text", "text": ...}'
        raise WrongError(f"{shape.content} is not text", content, field=at, detail=type_name(content), fix=fix)
    check_text(content, at)
    return content


def _part(part: object, at: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else None
    detail = f"a part of type {kind}" if isinstance(kind, str) else type_name(part)
    raise WrongError("content is not text", part, field=at, detail=detail, fix="sparklab trains on text: give text parts alone, or remove the record")


def _take_beside(message: dict[str, Any], made: Message, at: str) -> None:
    """An assistant's tool calls and thought; raises :class:`WrongError`."""
    if message.get("tool_calls"):
        made["tool_calls"] = _calls(message["tool_calls"], f"{at}.tool_calls")
    for name in THOUGHTS:
        thought = message.get(name)
        if thought:
            if not isinstance(thought, str):
                raise WrongError("a thought is not text", thought, field=f"{at}.{name}", detail=type_name(thought), fix="give it as one string")
            check_text(thought, f"{at}.{name}")
            made[name] = thought


def _calls(value: Any, at: str) -> list[dict[str, Any]]:
    """Tool calls as templates take them, arguments as objects; raises :class:`WrongError`."""
    fix = 'write [{"type": "function", "function": {"name": ..., "arguments": {...}}}]'
    calls = parsed(value, at)
    made = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise WrongError("a tool call without a function's name", call, field=at, fix=fix)
        arguments = parsed(function.get("arguments") or {}, f"{at}.arguments")
        if not isinstance(arguments, dict):
            raise WrongError("a tool call's arguments are not an object", arguments, field=at, detail=type_name(arguments), fix=fix)
        more = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        made.append({**more, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    check_text_within(made, at)
    return made


def tools_of(value: Any) -> tuple[dict[str, Any], ...]:
    """The functions of a record's ``tools``; raises :class:`WrongError`."""
    tools = parsed(value, "tools") if value else []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise WrongError("tools is not a list of objects", tools, field="tools", detail=type_name(tools), fix="give each function's JSON schema as an object")
    check_text_within(tools, "tools")
    return tuple(without_nulls(tool) for tool in tools)


def without_nulls(value: Any) -> Any:
    """The value without the null fields that tables fill up rows with."""
    if isinstance(value, dict):
        return {key: without_nulls(kept) for key, kept in value.items() if kept is not None}
    return [without_nulls(one) for one in value] if isinstance(value, list) else value


def parsed(value: Any, at: str) -> Any:
    """A JSON string's value, as tables keep lists and objects; other values as they are. Raises :class:`WrongError`."""
    if not isinstance(value, str):
        return value
    try:
        return value_of(value)
    except WrongError as wrong:
        wrong.field = at
        raise


def check_text(text: str, at: str) -> None:
    """Raises :class:`WrongError` for text that no tokenizer should see."""
    if "\0" in text:
        raise WrongError("NUL byte", text, field=at, fix="remove the \\u0000 from the text")
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        byte = ord(text[error.start]) - 0xDC00
        if 0x80 <= byte <= 0xFF:  # how a CSV's undecodable bytes arrive
            shown = text[max(0, error.start - 20) : error.start + 200]
            raise WrongError("not UTF-8", shown, field=at, detail=f"byte 0x{byte:02x}", fix="save the file as UTF-8") from None
        raise WrongError("half a surrogate pair", text, field=at, fix="mend the text: some tool cut an emoji in half") from None


def check_text_within(value: Any, at: str) -> None:
    """:func:`check_text` for every text in a JSON value."""
    if isinstance(value, str):
        check_text(value, at)
    elif isinstance(value, dict):
        for key, inner in value.items():
            check_text(key, at)
            check_text_within(inner, at)
    elif isinstance(value, list):
        for inner in value:
            check_text_within(inner, at)


def wrong_order(messages: Sequence[Message], at: str) -> Iterator[WrongError]:
    """What is wrong with the order of roles, at most one fault."""
    roles = [message["role"] for message in messages]
    shown = ", ".join(roles)
    if "assistant" not in roles:
        yield WrongError("no assistant turn", shown, field=at, fix="give each record an answer to learn: a last message of the assistant")
        return
    may_follow = {"": ("system", "user"), "system": ("user",), "user": ("assistant",), "assistant": ("user", "tool"), "tool": ("tool", "assistant")}
    before = ""
    for role in roles:
        if role not in may_follow[before]:
            yield WrongError("roles out of order", shown, field=at, fix=_ORDER_FIX)
            return
        before = role
    if before != "assistant":
        yield WrongError("last message is not the assistant's", shown, field=at, fix="remove what follows the last answer: nothing is learned from it")
