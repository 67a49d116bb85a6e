"""The formats records come in: which one it is, and the record made of it.

=================== ==============================================================================================
``messages``        ``messages`` (or ``conversations``): a list of ``{"role": ..., "content": ...}``; ``tools`` beside it
``sharegpt``        ``conversations``: a list of ``{"from": "human" | "gpt" | ..., "value": ...}``
``prompt``          ``prompt`` and ``completion``: two texts, or two lists of messages
``instruction``     ``instruction``, ``input`` (or none), ``output``; ``system`` and ``history`` beside them
``text``            ``text``: learned whole (continued pretraining)
``preference``      ``chosen`` and ``rejected``, with or without ``prompt``: texts or lists of messages; read and shown, not trained on
``chosen``          the same, of which the chosen answer is trained on as a chat; never recognised, only named
=================== ==============================================================================================
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, Final

from sparklab.data.faults import Faults, WrongError, excerpt
from sparklab.data.messages import CHAT, SHAREGPT, Checked, Shape, check_messages, check_text, tools_of, wrong_order
from sparklab.data.record import Message, Record
from sparklab.data.strict import type_name
from sparklab.errors import DataError

SNIFFED: Final = 100
"""Records looked at to recognise a format."""


class _Faulty(Exception):
    """Everything wrong with one record."""

    def __init__(self, *wrong: WrongError) -> None:
        super().__init__(*wrong)
        self.wrong = wrong


def recognise(records: Iterable[dict[str, Any]], source: str) -> str | None:
    """The format of most of these records, the first of equals; None where there is none that any of them has.

    Holds one of them at a time. Raises :class:`DataError` where records can be read in two ways.
    """
    votes: Counter[str] = Counter()
    for record in records:
        fits = [name for name, has in _HAS.items() if has(record)]
        if len(fits) > 1:
            how = " or ".join(f"format='{name}'" for name in fits)
            raise DataError(f"{source}: its records can be read as {' and as '.join(fits)} (fields: {_fields(record)})", f"say which: {how}")
        votes.update(fits or (["text"] if "text" in record else []))  # beside other fields a text is mostly what they say, once more
    return votes.most_common(1)[0][0] if votes else None


def parse(record: dict[str, Any], name: str | None, line: int, source: str, faults: Faults) -> Record | None:
    """A record of format ``name`` (None: of none that is known), or None with everything wrong with it added to ``faults``."""
    try:
        return _PARSERS[name](record, Record(line=line, source=source)) if name else _unknown(record)
    except _Faulty as faulty:
        found = faulty.wrong
    except WrongError as one:
        found = (one,)
    for wrong in found:
        faults.add(wrong.at(source, line))
    return None


def _without(name: str, record: dict[str, Any]) -> str:
    return "it is null" if name in record else f"the record has {_fields(record)}"


def _fields(record: dict[str, Any]) -> str:
    return ", ".join(map(excerpt, list(record)[:8])) or "no field"


def _unknown(record: dict[str, Any]) -> Record:
    fix = "rename the fields to messages, prompt and completion, instruction and output, text, or chosen and rejected"
    raise WrongError("no format that is known", record, detail=f"the record has {_fields(record)}", fix=fix)


def _need(record: dict[str, Any], *names: str) -> None:
    """Raise for fields the format must have."""
    lacking = [name for name in names if record.get(name) is None]
    if lacking:
        example = 'write each record as {"messages": [...]}' if names == ("messages",) else f"give each record {' and '.join(names)}"
        wrong = [WrongError(f"no {name}", record, field=name, detail=_without(name, record), fix=example) for name in lacking]
        raise _Faulty(*wrong)


def _made(empty: Record, record: dict[str, Any], used: Iterable[str], checked: Checked | None = None, **fields: Any) -> Record:
    """The record, with the fields nobody used named."""
    ignored = {name for name, value in record.items() if name not in used and value is not None} | (checked.ignored if checked else set())
    return Record(line=empty.line, source=empty.source, ignored=tuple(sorted(ignored)), **fields)


def _text(record: dict[str, Any], name: str, *, may_be_empty: bool = False) -> str:
    """A field's text; raises :class:`WrongError`."""
    value = record.get(name)
    if value is None and may_be_empty:
        return ""
    if not isinstance(value, str):
        raise WrongError(f"{name} is not text", value, field=name, detail=type_name(value), fix=f"give {name} as one string")
    if not may_be_empty and not value.strip():
        raise WrongError(f"empty {name}", value, field=name, fix=f"remove the records whose {name} is empty")
    check_text(value, name)
    return value


def _messages(record: dict[str, Any], name: str, shape: Shape) -> Checked:
    """The sound messages of a field, their order judged; raises everything wrong with them."""
    checked = check_messages(record[name], name, shape)
    wrong = checked.wrong or list(wrong_order(checked.messages, name))
    if wrong:
        raise _Faulty(*wrong)
    return checked


# ---------------------------------------------------------------- chats


def _list_name(record: dict[str, Any]) -> str:
    return "messages" if "messages" in record or "conversations" not in record else "conversations"


def _parse_chat(record: dict[str, Any], empty: Record) -> Record:
    return _chat(record, empty, CHAT)


def _parse_sharegpt(record: dict[str, Any], empty: Record) -> Record:
    return _chat(record, empty, SHAREGPT)


def _chat(record: dict[str, Any], empty: Record, shape: Shape) -> Record:
    name = _list_name(record)
    _need(record, name)
    used, system = {name, "tools"}, None
    if shape is SHAREGPT and record.get("system"):
        used.add("system")
        system = _text(record, "system")
    checked = _messages(record, name, shape)
    messages = checked.messages
    if system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return _made(empty, record, used, checked, messages=tuple(messages), tools=tools_of(record.get("tools")))


# ---------------------------------------------------------------- question and answer


def _parse_prompt(record: dict[str, Any], empty: Record) -> Record:
    _need(record, "prompt", "completion")
    if record.get("label") is False:  # KTO's pairs: what should not be said
        raise WrongError("a completion labelled false", record["completion"], field="label", fix="keep the records whose label is true")
    used = ("prompt", "completion", "tools")
    if isinstance(record["prompt"], str) and not record["prompt"].lstrip().startswith("[{"):
        messages = [_says("user", _text(record, "prompt", may_be_empty=True)), _says("assistant", _text(record, "completion"))]
        return _made(empty, record, used, messages=tuple(messages), given=1)
    prompt, completion = (check_messages(record[name], name, CHAT) for name in ("prompt", "completion"))
    checked, given = _joined(prompt, completion, "completion")
    return _made(empty, record, used, checked, messages=tuple(checked.messages), given=given, tools=tools_of(record.get("tools")))


def _joined(prompt: Checked, answer: Checked, name: str) -> tuple[Checked, int]:
    """Prompt and answer as one chat, its order judged, and how many messages the prompt has; raises everything wrong with them."""
    messages = [*prompt.messages, *answer.messages]
    wrong = prompt.wrong + answer.wrong or list(wrong_order(messages, name))
    if not wrong and answer.messages[0]["role"] not in ("assistant", "tool", "user"):
        wrong = [WrongError("roles out of order", messages, field=name, fix="begin the answer with the assistant's message")]
    if wrong:
        raise _Faulty(*wrong)
    return Checked(messages, [], prompt.ignored | answer.ignored), len(prompt.messages)


def _parse_instruction(record: dict[str, Any], empty: Record) -> Record:
    _need(record, "instruction", "output")
    system, instruction, more = _text(record, "system", may_be_empty=True), _text(record, "instruction"), _text(record, "input", may_be_empty=True)
    messages = [_says("system", system)] if system.strip() else []
    history = record.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 and all(isinstance(said, str) for said in pair) for pair in history):
        raise WrongError("history is not a list of pairs of texts", history, field="history", fix='write "history": [["question", "answer"], ...]')
    for index, (asked, said) in enumerate(history):
        check_text(asked + said, f"history[{index}]")
        messages += [_says("user", asked), _says("assistant", said)]
    messages += [_says("user", f"{instruction}\n\n{more}" if more.strip() else instruction), _says("assistant", _text(record, "output"))]
    return _made(empty, record, ("instruction", "input", "output", "system", "history"), messages=tuple(messages))


def _says(role: str, content: str) -> Message:
    return {"role": role, "content": content}


# ---------------------------------------------------------------- text, pairs


def _parse_text(record: dict[str, Any], empty: Record) -> Record:
    _need(record, "text")
    return _made(empty, record, ("text",), text=_text(record, "text"))


def _parse_preference(record: dict[str, Any], empty: Record) -> Record:
    _need(record, "chosen", "rejected")
    used = ("prompt", "chosen", "rejected", "tools")
    if isinstance(record["chosen"], str) and not record["chosen"].lstrip().startswith("[{"):
        _need(record, "prompt")
        prompt = [_says("user", _text(record, "prompt"))]
        chosen, rejected = (_says("assistant", _text(record, name)) for name in ("chosen", "rejected"))
        return _made(empty, record, used, messages=(*prompt, chosen), given=1, rejected=(rejected,))
    before = record.get("prompt")
    if isinstance(before, str) and isinstance(record["chosen"], list) and record["chosen"][:1] and _role(record["chosen"][0]) != "assistant":
        before = None  # said again at the beginning of both lists, as a question's text
    elif isinstance(before, str) and not before.lstrip().startswith("[{"):
        before = [_says("user", before)]
    prompt_checked = check_messages(before, "prompt", CHAT) if before is not None else Checked([], [], set())
    chosen_checked, rejected_checked = (check_messages(record[name], name, CHAT) for name in ("chosen", "rejected"))
    checked, given = _joined(prompt_checked, chosen_checked, "chosen")
    other, _ = _joined(prompt_checked, rejected_checked, "rejected")
    if before is None:
        both = zip(checked.messages[:-1], other.messages[:-1], strict=False)
        given = next((index for index, (one, two) in enumerate(both) if one != two), min(len(checked.messages), len(other.messages)) - 1)
    more = {"given": given, "rejected": tuple(other.messages[given:]), "tools": tools_of(record.get("tools"))}
    return _made(empty, record, used, checked, messages=tuple(checked.messages), **more)


def _parse_chosen(record: dict[str, Any], empty: Record) -> Record:
    pair = _parse_preference(record, empty)
    ignored = tuple(sorted({*pair.ignored, "rejected"}))
    return Record(pair.messages, pair.line, pair.source, ignored, given=pair.given, tools=pair.tools)


def _role(message: object) -> object:
    return message.get("role") if isinstance(message, dict) else None


def _first(record: dict[str, Any]) -> dict[str, Any]:
    """The first message of a chat; an empty one where it has none."""
    messages = record.get(_list_name(record))
    return messages[0] if isinstance(messages, list) and messages and isinstance(messages[0], dict) else {}


def _has_chat(record: dict[str, Any]) -> bool:
    return record.get(_list_name(record)) is not None


_HAS: Final[dict[str, Callable[[dict[str, Any]], bool]]] = {
    "messages": lambda record: _has_chat(record) and "from" not in _first(record),
    "sharegpt": lambda record: _has_chat(record) and "from" in _first(record),
    "prompt": lambda record: record.get("prompt") is not None and record.get("completion") is not None,
    "instruction": lambda record: record.get("instruction") is not None and record.get("output") is not None,
    "preference": lambda record: record.get("chosen") is not None and record.get("rejected") is not None,
}
_PARSERS: Final[dict[str, Callable[[dict[str, Any], Record], Record]]] = {
    "messages": _parse_chat,
    "sharegpt": _parse_sharegpt,
    "prompt": _parse_prompt,
    "instruction": _parse_instruction,
    "text": _parse_text,
    "preference": _parse_preference,
    "chosen": _parse_chosen,
}
