"""From chats to documents: token ids with a loss mask, by the tokenizer's own chat template.

What is learned in a turn is exactly what a model must write when asked: everything from where generation starts to the end-of-turn
token at which it stops, that token included. Where a turn starts comes from the template's generation marks or, where it has none, from
the prompt that generation would be given, compared token by token. Nothing is ever found by searching for text.

Some templates write a turn differently once another follows it (a thought is left out, the end-of-turn is another). Such an earlier turn
becomes a document of its own, which ends with it, so that what is learned is always what is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, NamedTuple

from sparklab.data.faults import Fault, Faults, excerpt
from sparklab.data.probe import Probe
from sparklab.data.record import Message, Record
from sparklab.data.render import Conversation, Renderer, Tokenizer
from sparklab.errors import DataError
from sparklab.planner.recipe import Learn, OnLong

IGNORED: Final = -100
"""The label of a token that is not learned; the value torch's cross-entropy skips."""
_MISMATCH_FIX: Final = (
    "mend the template's add_generation_prompt part; where it is single records, remove white space at the beginning of their answers; "
    "or train all the same: overrule=('mismatch',)"
)


@dataclass(slots=True)
class Document:
    """One chat or text as tokens."""

    input_ids: list[int]
    labels: list[int]
    """As long as ``input_ids`` and not shifted: the token itself where it is learned, -100 elsewhere."""

    @property
    def supervised(self) -> int:
        """Tokens that are learned."""
        return len(self.labels) - self.labels.count(IGNORED)


class _Rendered(NamedTuple):
    """A chat in tokens, and what its turns are found by."""

    ids: list[int]
    marks: list[int]
    """First token of each stretch that the template marks."""
    prompts: dict[int, list[int]]
    """Index of an assistant's message: the tokens it would be asked for with."""
    alone: dict[int, tuple[list[int], list[int]]]
    """Index of an earlier assistant's message: tokens and marks of the chat up to it, where the template writes it otherwise than here."""


class ChatEncoder:
    """A tokenizer and its chat template, probed once and then used for many chats.

    Raises :class:`DataError` where there is no chat template, or one from which nobody could learn: without end-of-turn, with two BOS,
    or whose generation prompt is not the beginning of its training text (``overrule`` with ``mismatch``: warned of).
    """

    end_of_turn: int
    """The token that closes an assistant's turn."""
    warnings: list[str]
    """What is odd about the template, in words, for the report."""

    def __init__(self, tokenizer: Tokenizer, learn: Learn = "assistant", overrule: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.learn = learn
        self._may_differ = "mismatch" in overrule
        self._renderer = Renderer(tokenizer)
        self.warnings = []
        ask: list[Message] = [{"role": "user", "content": "Which?"}]
        answers = [Conversation([*ask, {"role": "assistant", "content": content}]) for content in ("7", "green")]
        try:
            (prompt,), ((first, _), (second, _)) = self._renderer.prompts([Conversation(ask)]), self._renderer.texts(answers)
        except Exception as error:  # templates are programs of their own and raise what they like
            raise DataError(f"The chat template fails on a plain question and answer: {error}", "mend tokenizer.chat_template") from error
        if first[: len(prompt)] != prompt:
            fact = f"Training text and generation prompt differ: {self._difference(prompt, first)}"
            if not self._may_differ:
                raise DataError(fact, _MISMATCH_FIX)
            self.warnings.append(f"{fact}; overruled: what is learned begins at the first token that differs")
        bos = tokenizer.bos_token_id
        if bos is not None and first[:2] == [bos, bos]:
            raise DataError(f"The chat template writes BOS twice: {self._renderer.names(first[:4])} ...", "remove one bos_token from tokenizer.chat_template")
        self._find_end(_common_tail(first, second))
        self.probe = Probe(self._renderer, self.end_of_turn)

    def _find_end(self, tail: list[int]) -> None:
        """Set end of turn and stop ids from what the template writes after any answer."""
        eos = self.tokenizer.eos_token_id
        ends = [token for token in tail if token in self._renderer.special or token == eos]
        if not ends:
            wrote = f"only {self._renderer.names(tail)}" if tail else "nothing"
            fix = "use the chat template and tokenizer of the instruct model, whose turns end in a special token"
            raise DataError(f"The chat template writes no end-of-turn token after an answer ({wrote}), so the model would never learn to stop", fix)
        self.end_of_turn = ends[0]
        if eos != ends[0]:
            name, eos_name = self._renderer.names([ends[0]]), "not set" if eos is None else self._renderer.names([eos])
            self.warnings.append(f"turns end in {name} but the tokenizer's EOS is {eos_name}: sparklab stops at either, other programs may not")

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Where generation is to stop: the end of turn, that of a call where there are calls, and the tokenizer's EOS where that is another."""
        eos = self.tokenizer.eos_token_id
        return tuple(dict.fromkeys([*self.probe.ends, *([] if eos is None else [eos])]))

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[dict[str, object]] = ()) -> list[int]:
        """The tokens a model is asked with; training text begins with the same."""
        return self._renderer.prompts([Conversation(messages, tools)])[0]

    def spells(self, record: Record) -> bool:
        """Whether the record's words spell a special token, which stays text."""
        return self._renderer.spells(Conversation(record.messages, record.tools))

    def encode(self, records: Sequence[Record]) -> list[tuple[Document, ...] | Fault]:
        """The documents of each chat, of full length, in order; a fault where the template cannot do it."""
        found: list[tuple[Document, ...] | Fault | None] = [self._dropped(record) for record in records]
        sound = [index for index, fault in enumerate(found) if fault is None]
        rendered: Sequence[_Rendered | Fault]
        try:
            rendered = self._render([records[index] for index in sound])
        except Exception:  # noqa: BLE001  one chat the template refuses fails the whole call: find it by rendering one by one
            rendered = [self._render_one(records[index]) for index in sound]
        for index, one in zip(sound, rendered, strict=True):
            found[index] = one if isinstance(one, Fault) else self._documents(records[index], one)
        return found  # type: ignore[return-value]

    def _dropped(self, record: Record) -> Fault | None:
        """The fault of a record that holds something the template would leave out without a word."""
        what = self.probe.drops(record)
        fix = f"use a chat template that writes {what}, or remove {what}"
        return _fault(record, f"the chat template leaves out {what}", "", fix) if what else None

    # ---------------------------------------------------------------- tokens

    def _render_one(self, record: Record) -> _Rendered | Fault:
        try:
            return self._render([record])[0]
        except Exception as error:  # noqa: BLE001  templates are programs of their own and raise what they like
            said = error.fact if isinstance(error, DataError) else f"{error}"
            return _fault(record, "the chat template refuses the chat", excerpt(said), "remove what the template does not take, such as a system message")

    def _render(self, records: Sequence[Record]) -> list[_Rendered]:
        """Tokens of a chunk of chats in two or three calls: the whole chats, the prompts of their answers, and earlier turns alone where they differ."""
        if not records:
            return []
        wholes = self._renderer.texts([Conversation(record.messages, record.tools) for record in records])
        asked: list[tuple[int, int]] = []
        alone: list[tuple[int, int]] = []
        for index, (record, (_, marks)) in enumerate(zip(records, wholes, strict=True)):
            turns = _turns(record)
            earlier = [turn for turn in self._wanted(record) if turn != turns[-1]]
            rewrites = bool(earlier) and self.learn != "all" and self.probe.rewrites(record)
            asked += [(index, turn) for turn in self._asked(record, marks, rewrites)]
            alone += [(index, turn) for turn in earlier] if rewrites else []
        prompts = self._renderer.prompts([Conversation(records[index].messages[:turn], records[index].tools) for index, turn in asked])
        texts = self._renderer.texts([Conversation(records[index].messages[: turn + 1], records[index].tools) for index, turn in alone]) if alone else []
        made = [_Rendered(ids, marks, {}, {}) for ids, marks in wholes]
        for (index, turn), prompt in zip(asked, prompts, strict=True):
            made[index].prompts[turn] = prompt
        for (index, turn), text in zip(alone, texts, strict=True):
            made[index].alone[turn] = text
        return made

    def _asked(self, record: Record, marks: list[int], rewrites: bool) -> list[int]:
        """Indices of the messages whose prompts are to be compared with the text: of each turn that is learned, and of all that are to be found by them."""
        turns = _turns(record)
        if self.learn == "all" or (self._renderer.marked and not marks and not rewrites):
            return turns[-1:]
        found = self._renderer.marked and not rewrites and len(marks) == len(turns)
        return self._wanted(record) if found else turns

    def _wanted(self, record: Record) -> list[int]:
        """Indices of the messages that are learned."""
        turns = [turn for turn in _turns(record) if turn >= record.given]
        if self.learn == "last":
            return turns[-1:]
        if self.learn == "completion" and not record.given:
            question = max(index for index, message in enumerate(record.messages) if message["role"] == "user")
            return [turn for turn in turns if turn > question]
        return turns

    # ---------------------------------------------------------------- labels

    def _documents(self, record: Record, rendered: _Rendered) -> tuple[Document, ...] | Fault:
        """Check the prompts against the text and copy what is learned into the labels."""
        whole = Document(rendered.ids, [IGNORED] * len(rendered.ids))
        turns, own = _turns(record), []
        last = turns[-1]
        if self.learn == "all":
            fault = self._differs(record, rendered.prompts[last], rendered.ids)
            whole.labels[1:] = rendered.ids[1:]
            return fault or (whole,)
        starts = self._starts(record, rendered)
        if isinstance(starts, Fault):
            return starts
        limits = dict(pairwise([*starts, -1]))
        for turn in self._wanted(record):
            if turn in rendered.alone:
                found = self._turn_alone(record, rendered, turn)
                if isinstance(found, Fault):
                    return found
                document, end = found
                if rendered.ids[:end] != document.input_ids[:end]:
                    own.append(document)
                else:
                    whole.labels[:end] = [new if new != IGNORED else old for old, new in zip(whole.labels, document.labels[:end], strict=False)]
            elif turn in starts:
                limit = starts.get(limits[turn], len(rendered.ids))
                fault = self._learn(record, whole, starts[turn], limit)
                if fault:
                    return fault
        # Whatever the template, the first token has nothing before it from which it could be predicted.
        for document in (whole, *own):
            document.labels[0] = IGNORED
        return (*own, whole)

    def _starts(self, record: Record, rendered: _Rendered) -> dict[int, int] | Fault:
        """Where each turn begins in the whole chat; without those that the template does not mark."""
        turns, ids, prompts = _turns(record), rendered.ids, rendered.prompts
        for turn, prompt in prompts.items():
            fault = None if turn in rendered.alone else self._differs(record, prompt, ids)
            if fault:
                return fault
        if not self._renderer.marked:
            return {turn: _same(prompt, ids) for turn, prompt in prompts.items()}
        marks = rendered.marks
        if len(marks) == len(turns):
            starts = dict(zip(turns, marks, strict=True))
        elif marks:  # the first mark between a turn's prompt and the next one's
            limits = [len(prompts[turn]) for turn in turns[1:]] + [len(ids)]
            bounds = [(turn, _same(prompts[turn], ids), limit) for turn, limit in zip(turns, limits, strict=True)]
            starts = {turn: mark for turn, start, limit in bounds for mark in marks if start <= mark < limit and mark == min(m for m in marks if m >= start)}
        else:
            return {}
        for turn, start in starts.items():
            if turn in prompts and turn not in rendered.alone and start < _same(prompts[turn], ids):
                return self._covered(record, ids[start : len(prompts[turn])])
        return starts

    def _turn_alone(self, record: Record, rendered: _Rendered, turn: int) -> tuple[Document, int] | Fault:
        """A document that ends with an earlier turn, which alone is learned in it, and where that turn ends."""
        ids, marks = rendered.alone[turn]
        prompt = rendered.prompts[turn]
        fault = self._differs(record, prompt, ids)
        if fault:
            return fault
        start = _same(prompt, ids)
        if self._renderer.marked:
            start = next((mark for mark in marks if mark >= start), len(ids))
        document = Document(ids, [IGNORED] * len(ids))
        fault = self._learn(record, document, start, len(ids)) if start < len(ids) else None
        if fault:
            return fault
        end = len(ids) - next((back for back, label in enumerate(reversed(document.labels)) if label != IGNORED), 0)
        return document, end

    def _learn(self, record: Record, document: Document, start: int, limit: int) -> Fault | None:
        """Copy one turn into the labels, to its end-of-turn token."""
        ids = document.input_ids
        # Text cannot spell a special token here, so the first end after the start is where generation would have stopped.
        end = min((ids.index(stop, start, limit) for stop in self.probe.ends if stop in ids[start:limit]), default=None)
        if end is None:
            written = self._renderer.names(ids[max(start, limit - 4) : limit])
            return _fault(record, "an answer without end-of-turn token", f"it ends in {written}", "use a chat template that closes every turn alike")
        document.labels[start : end + 1] = ids[start : end + 1]
        return None

    def _differs(self, record: Record, prompt: list[int], ids: list[int]) -> Fault | None:
        if ids[: len(prompt)] == prompt or self._may_differ:
            return None
        return _fault(record, "training text and generation prompt differ", self._difference(prompt, ids), _MISMATCH_FIX)

    def _covered(self, record: Record, covered: list[int]) -> Fault:
        fix = "move {% generation %} in the template to just before the answer"
        return _fault(record, "the template's generation marks cover part of the prompt", self._renderer.names(covered), fix)

    def _difference(self, prompt: list[int], text: list[int]) -> str:
        same = _same(prompt, text)
        theirs, ours = (self._renderer.names(ids[same : same + 4]) or "nothing" for ids in (prompt, text))
        return f"at token {same} generation is prompted with {theirs} and the text has {ours}"


def encode_chat(tokenizer: Tokenizer, chat: Record, max_length: int, on_long: OnLong) -> Document | None:
    """One chat as a document of at most ``max_length`` tokens; None for a longer one under ``on_long="drop"``.

    For many chats make one :class:`ChatEncoder`. Raises :class:`DataError` where the template cannot do it, or for a longer chat under ``"error"``.
    """
    faults = Faults()
    found = ChatEncoder(tokenizer).encode([chat])[0]
    document = None if isinstance(found, Fault) else found[-1]
    if isinstance(found, Fault):
        faults.add(found)
    if document is not None and len(document.input_ids) > max_length:
        if on_long == "drop":
            return None
        if on_long == "error":
            faults.add(too_long(chat, len(document.input_ids), max_length))
        else:
            document = truncated(document, max_length)
    faults.raise_any(chat.source or "chat", 1)
    return document


def prompt_ids(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """The tokens with which generation is asked to go on after ``messages``: the template's, with the opening of the assistant's turn."""
    return Renderer(tokenizer).prompts([Conversation(messages)])[0]


def stop_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens at which generation is to stop: the template's end-of-turn first, then the tokenizer's EOS where that is another."""
    return ChatEncoder(tokenizer).stop_ids


def truncated(document: Document, max_length: int) -> Document:
    """The document's first ``max_length`` tokens."""
    return Document(document.input_ids[:max_length], document.labels[:max_length])


def too_long(chat: Record, length: int, max_length: int) -> Fault:
    """The fault of a chat of ``length`` tokens where longer than ``max_length`` is an error."""
    fix = "raise max_length, or set on_long to 'truncate', 'split' or 'drop'"
    return _fault(chat, f"longer than max_length {max_length:,}", f"{length:,} tokens", fix)


def _fault(chat: Record, kind: str, detail: str, fix: str) -> Fault:
    field = "text" if chat.text is not None else "messages"
    return Fault(kind=kind, source=chat.source, line=chat.line, field=field, detail=detail, excerpt=excerpt(chat.answer), fix=fix)


def _turns(record: Record) -> list[int]:
    return [index for index, message in enumerate(record.messages) if message["role"] == "assistant"]


def _same(one: list[int], other: list[int]) -> int:
    """How many tokens two lists begin with in common."""
    if other[: len(one)] == one:
        return len(one)
    return next((index for index, (this, that) in enumerate(zip(one, other, strict=False)) if this != that), min(len(one), len(other)))


def _common_tail(one: list[int], other: list[int]) -> list[int]:
    """The longest list that both end in."""
    length = 0
    while length < min(len(one), len(other)) and one[-1 - length] == other[-1 - length]:
        length += 1
    return one[len(one) - length :]
