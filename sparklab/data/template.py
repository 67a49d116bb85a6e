"""From chats to documents: token ids with a loss mask, by the tokenizer's own chat template.

What is learned in a turn is exactly what a model must write when asked: everything from where generation starts to the end-of-turn
token at which it stops, that token included. Where a turn starts comes from the template's generation marks or, where it has none, from
the prompt that generation would be given, compared token by token. Nothing is ever found by searching for text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, Literal

from sparklab.data.chat import Chat, Message
from sparklab.data.faults import Fault, Faults, excerpt
from sparklab.data.render import Renderer, Tokenizer
from sparklab.errors import DataError

IGNORED: Final = -100
"""The label of a token that is not learned; the value torch's cross-entropy skips."""
OnLong = Literal["truncate", "drop", "error"]
_CHUNK: Final = 512
"""Chats rendered and tokenised in one call: enough for the tokenizer's threads, little enough to hold."""
_Rendered = tuple[list[int], list[int], list[list[int]]]
"""Tokens of a chat, where its marked stretches begin, and the tokens of the prompts its answers would be asked with."""
_MISMATCH_FIX: Final = "mend the template's add_generation_prompt part; where it is single records, remove white space at the beginning of their answers"


@dataclass(slots=True)
class Document:
    """One chat as tokens."""

    input_ids: list[int]
    labels: list[int]
    """As long as ``input_ids`` and not shifted: the token itself where it is learned, -100 elsewhere."""

    @property
    def supervised(self) -> int:
        """Tokens that are learned."""
        return len(self.labels) - self.labels.count(IGNORED)


class ChatEncoder:
    """A tokenizer and its chat template, probed once and then used for many chats.

    Raises :class:`DataError` where there is no chat template, or one from which nobody could learn: without end-of-turn, with two BOS,
    or whose generation prompt is not the beginning of its training text.
    """

    end_of_turn: int
    """The token that closes an assistant's turn."""
    stop_ids: tuple[int, ...]
    """Where generation is to stop: the end of turn, and the tokenizer's EOS where that is another."""
    warnings: list[str]
    """What is odd about the template, in words, for the report."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._renderer = Renderer(tokenizer)
        self.warnings = []
        ask: list[Message] = [{"role": "user", "content": "Which?"}]
        answers = [[*ask, {"role": "assistant", "content": content}] for content in ("7", "green")]
        try:
            (prompt,), ((first, _), (second, _)) = self._renderer.prompts([ask]), self._renderer.texts(answers)
        except Exception as error:  # templates are programs of their own and raise what they like
            raise DataError(f"The chat template fails on a plain question and answer: {error}", "mend tokenizer.chat_template") from error
        if first[: len(prompt)] != prompt:
            raise DataError(f"Training text and generation prompt differ: {self._difference(prompt, first)}", _MISMATCH_FIX)
        bos = tokenizer.bos_token_id
        if bos is not None and first[:2] == [bos, bos]:
            raise DataError(f"The chat template writes BOS twice: {self._renderer.names(first[:4])} ...", "remove one bos_token from tokenizer.chat_template")
        self._find_end(_common_tail(first, second))

    def _find_end(self, tail: list[int]) -> None:
        """Set end of turn and stop ids from what the template writes after any answer."""
        eos = self.tokenizer.eos_token_id
        ends = [token for token in tail if token in self._renderer.special or token == eos]
        if not ends:
            wrote = f"only {self._renderer.names(tail)}" if tail else "nothing"
            fix = "use the chat template and tokenizer of the instruct model, whose turns end in a special token"
            raise DataError(f"The chat template writes no end-of-turn token after an answer ({wrote}), so the model would never learn to stop", fix)
        self.end_of_turn = ends[0]
        self.stop_ids = (ends[0],) if eos in (None, ends[0]) else (ends[0], eos)
        if eos != ends[0]:
            name, eos_name = self._renderer.names([ends[0]]), "not set" if eos is None else self._renderer.names([eos])
            self.warnings.append(f"turns end in {name} but the tokenizer's EOS is {eos_name}: sparklab stops at either, other programs may not")

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """The tokens a model is asked with; training text begins with the same."""
        return self._renderer.prompts([messages])[0]

    def encode(self, chats: Sequence[Chat], faults: Faults) -> Iterator[Document | None]:
        """A document of full length for each chat, in order; None where the template cannot do it, with the reason added to ``faults``."""
        for first in range(0, len(chats), _CHUNK):
            chunk = chats[first : first + _CHUNK]
            rendered: Sequence[_Rendered | Fault]
            try:
                rendered = self._render(chunk)
            except Exception:  # noqa: BLE001  one chat the template refuses fails the whole call: find it by rendering one by one
                rendered = [self._render_one(chat) for chat in chunk]
            for chat, one in zip(chunk, rendered, strict=True):
                found = one if isinstance(one, Fault) else self._document(chat, *one)
                if isinstance(found, Fault):
                    faults.add(found)
                yield found if isinstance(found, Document) else None

    def _render_one(self, chat: Chat) -> _Rendered | Fault:
        try:
            return self._render([chat])[0]
        except Exception as error:  # noqa: BLE001  templates are programs of their own and raise what they like
            said = error.fact if isinstance(error, DataError) else f"{error}"
            return _fault(chat, "the chat template refuses the chat", excerpt(said), "remove what the template does not take, such as a system message")

    def _render(self, chats: Sequence[Chat]) -> list[_Rendered]:
        """Tokens of a chunk of chats in two calls: the whole chats, and the prompts their answers would be asked with."""
        wholes = self._renderer.texts([chat.messages for chat in chats])
        asked: list[tuple[Message, ...]] = []
        counts = []
        for chat in chats:
            turns = [index for index, message in enumerate(chat.messages) if message["role"] == "assistant"]
            # With marks the prompt of the last answer is check enough: it repeats all that stands before.
            turns = turns[-1:] if self._renderer.marked else turns
            asked += [chat.messages[:turn] for turn in turns]
            counts.append(len(turns))
        prompts = iter(self._renderer.prompts(asked))
        return [(ids, starts, [next(prompts) for _ in range(count)]) for (ids, starts), count in zip(wholes, counts, strict=True)]

    def _document(self, chat: Chat, ids: list[int], starts: list[int], prompts: list[list[int]]) -> Document | Fault:
        """Check the prompts against the text and copy what is learned into the labels."""
        for prompt in prompts:
            if ids[: len(prompt)] != prompt:
                return _fault(chat, "training text and generation prompt differ", self._difference(prompt, ids), _MISMATCH_FIX)
        if self._renderer.marked:
            if starts and starts[-1] < len(prompts[-1]):
                fix = "move {% generation %} in the template to just before the answer"
                return _fault(chat, "the template's generation marks cover part of the prompt", self._renderer.names(ids[starts[-1] : len(prompts[-1])]), fix)
        else:
            starts = [len(prompt) for prompt in prompts]
        labels = [IGNORED] * len(ids)
        for start, limit in pairwise([*starts, len(ids)]):
            # Text cannot spell a special token here, so the first stop after the start is where generation would have stopped.
            end = min((ids.index(stop, start, limit) for stop in self.stop_ids if stop in ids[start:limit]), default=None)
            if end is None:
                written = self._renderer.names(ids[max(start, limit - 4) : limit])
                return _fault(chat, "an answer without end-of-turn token", f"it ends in {written}", "use a chat template that closes every turn alike")
            labels[start : end + 1] = ids[start : end + 1]
        # Whatever the template, the first token has nothing before it from which it could be predicted.
        labels[0] = IGNORED
        return Document(ids, labels)

    def _difference(self, prompt: list[int], text: list[int]) -> str:
        same = next((index for index, (one, other) in enumerate(zip(prompt, text, strict=False)) if one != other), min(len(prompt), len(text)))
        theirs, ours = (self._renderer.names(ids[same : same + 4]) or "nothing" for ids in (prompt, text))
        return f"at token {same} generation is prompted with {theirs} and the text has {ours}"


def encode_chat(tokenizer: Tokenizer, chat: Chat, max_length: int, on_long: OnLong) -> Document | None:
    """One chat as a document of at most ``max_length`` tokens; None for a longer one under ``on_long="drop"``.

    For many chats make one :class:`ChatEncoder`. Raises :class:`DataError` where the template cannot do it, or for a longer chat under ``"error"``.
    """
    faults = Faults()
    document = next(ChatEncoder(tokenizer).encode([chat], faults))
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
    return Renderer(tokenizer).prompts([messages])[0]


def stop_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens at which generation is to stop: the template's end-of-turn first, then the tokenizer's EOS where that is another."""
    return ChatEncoder(tokenizer).stop_ids


def truncated(document: Document, max_length: int) -> Document:
    """The document's first ``max_length`` tokens."""
    return Document(document.input_ids[:max_length], document.labels[:max_length])


def too_long(chat: Chat, length: int, max_length: int) -> Fault:
    """The fault of a chat of ``length`` tokens where longer than ``max_length`` is an error."""
    return _fault(chat, f"longer than max_length {max_length:,}", f"{length:,} tokens", "raise max_length, or set on_long to 'truncate' or 'drop'")


def _fault(chat: Chat, kind: str, detail: str, fix: str) -> Fault:
    return Fault(kind=kind, source=chat.source, line=chat.line, field="messages", detail=detail, excerpt=excerpt(chat.answer), fix=fix)


def _common_tail(one: list[int], other: list[int]) -> list[int]:
    """The longest list that both end in."""
    length = 0
    while length < min(len(one), len(other)) and one[-1 - length] == other[-1 - length]:
        length += 1
    return one[len(one) - length :]
