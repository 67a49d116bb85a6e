"""What a chat template does with what only some chats hold, found out by asking it once: words it leaves out, turns it writes anew."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from sparklab.data.record import THOUGHTS, Message, Record
from sparklab.data.render import Conversation, Renderer

_WORD: Final = "Zyxwvut"
"""A word that no template writes by itself."""
_TOOL: Final[dict[str, Any]] = {
    "type": "function",
    "function": {"name": _WORD, "description": "d", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}},
}


def _says(role: str, content: str, **more: Any) -> Message:
    return {"role": role, "content": content, **more}


def _call(name: str, value: Any) -> Message:
    return _says("assistant", "", tool_calls=[{"type": "function", "function": {"name": name, "arguments": {"a": value}}, "id": "callabcde"}])


_ASK: Final = _says("user", "Which?")
_SAY: Final = _says("assistant", "green")
_HOLDS: Final[dict[str, Conversation]] = {
    "the system message": Conversation([_says("system", _WORD), _ASK, _SAY]),
    "the functions in tools": Conversation([_ASK, _SAY], [_TOOL]),
    "tool calls": Conversation([_ASK, _call(_WORD, "b"), _says("tool", "c", name=_WORD[:3], tool_call_id="callabcde"), _SAY]),
    "tool results": Conversation([_ASK, _call("f", "b"), _says("tool", _WORD, name="f", tool_call_id="callabcde"), _SAY]),
    "thoughts": Conversation([_ASK, _says("assistant", "green", **{THOUGHTS[0]: _WORD})]),
}


class Probe:
    """A template's ways, each found out when first asked for."""

    def __init__(self, renderer: Renderer, end_of_turn: int) -> None:
        self._renderer = renderer
        self._end = end_of_turn
        self._drops: dict[str, bool] = {}
        self._rewrites: dict[str, bool] = {}
        self.ends: tuple[int, ...] = (end_of_turn,)
        """Tokens at which an assistant's turn ends: more than one where a call ends in another (known once a record with calls was asked about)."""

    def drops(self, record: Record) -> str:
        """What of the record the template would leave out without a word, or ""."""
        roles = {message["role"] for message in record.messages}
        calls = any("tool_calls" in message for message in record.messages)
        if calls and "call" not in self._rewrites:
            self._find_call_end()
        held = {
            "the system message": "system" in roles,
            "the functions in tools": bool(record.tools),
            "tool calls": calls,
            "tool results": "tool" in roles,
            "thoughts": any(name in message for message in record.messages for name in THOUGHTS),
        }
        return next((what for what, holds in held.items() if holds and self._leaves_out(what)), "")

    def _leaves_out(self, what: str) -> bool:
        if what not in self._drops:
            try:
                self._drops[what] = _WORD not in self._renderer.written(_HOLDS[what])
            except Exception:  # noqa: BLE001  it says so itself, for each record, in its own words
                self._drops[what] = False
        return self._drops[what]

    def rewrites(self, record: Record) -> bool:
        """Whether the template may write the record's earlier turns otherwise than if the chat ended with them."""
        kinds = ["plain"]
        said = [message["content"] for message in record.messages if message["role"] == "assistant"]
        kinds += ["thought"] if any(name in message for message in record.messages for name in THOUGHTS) else []
        kinds += ["tag"] if any("<" in content for content in said) else []
        kinds += ["call"] if any("tool_calls" in message for message in record.messages) else []
        return any(self._writes_anew(kind) for kind in kinds)

    def _writes_anew(self, kind: str) -> bool:
        if kind not in self._rewrites:
            first: dict[str, Sequence[Message]] = {
                "plain": [_ASK, _SAY],
                "thought": [_ASK, _says("assistant", "green", **{THOUGHTS[0]: "why"})],
                "tag": [_ASK, _says("assistant", "<think>\nwhy\n</think>\n\ngreen")],
                "call": [_ASK, _call("f", "b"), _says("tool", "c", name="f", tool_call_id="callabcde"), _SAY],
            }
            self._rewrites[kind] = self._changes([*first[kind], _ASK, _SAY])
        return self._rewrites[kind]

    def _changes(self, messages: Sequence[Message]) -> bool:
        """Whether the chat's tokens do not begin with those of the chat up to one of its turns."""
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        try:
            (whole, *_), *rest = self._renderer.texts([Conversation(messages), *(Conversation(messages[: turn + 1]) for turn in turns[:-1])])
            prompts = self._renderer.prompts([Conversation(messages[:turn]) for turn in turns[:-1]])
        except Exception:  # noqa: BLE001  it says so itself, for each record
            return True
        for (text, _), prompt in zip(rest, prompts, strict=True):
            end = next((at + 1 for at in range(len(prompt), len(text)) if text[at] in self.ends), len(text))
            if whole[:end] != text[:end]:
                return True
        return False

    def _find_call_end(self) -> None:
        """A call may end in a token of its own, at which generation is to stop too."""
        try:
            texts = self._renderer.texts([Conversation([_ASK, _call("f", "b")]), Conversation([_ASK, _call("gg", 7)])])
        except Exception:  # noqa: BLE001  it says so itself, for each record
            return
        (one, _), (other, _) = texts
        tail: list[int] = []
        while len(tail) < min(len(one), len(other)) and one[-1 - len(tail)] == other[-1 - len(tail)]:
            tail.insert(0, one[-1 - len(tail)])
        found = next((token for token in tail if token in self._renderer.special), None)
        if found is not None and self._end not in tail:
            self.ends = (*dict.fromkeys([*self.ends, found]),)
        self._writes_anew("call")
