"""From records of any kind to documents: chats by the chat template, texts whole, prompt and completion end to end where there is no template."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from sparklab.data.faults import Fault, excerpt
from sparklab.data.record import Message, Record
from sparklab.data.render import Speller, Tokenizer, names
from sparklab.data.template import IGNORED, ChatEncoder, Document
from sparklab.data.templates import dress
from sparklab.errors import DataError

if TYPE_CHECKING:
    from sparklab.planner.recipe import Recipe

CHUNK: Final = 512
"""Records rendered and tokenised in one call: enough for the tokenizer's threads, little enough to hold."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A record and what became of it."""

    record: Record
    documents: tuple[Document, ...] = ()
    """Of full length. Mostly one; more where the template writes earlier turns otherwise than last ones; none where there is a fault."""
    fault: Fault | None = None
    spells: bool = False
    """The record's words spell special tokens; they stayed text, unless that was overruled."""


class Encoder:
    """A tokenizer and what a recipe says of templates and of what is learned.

    A chat template that the recipe names is put on the tokenizer. Raises :class:`DataError` where that cannot be; what is wrong with the
    tokenizer's own template is raised when the first chat is encoded.
    """

    def __init__(self, tokenizer: Tokenizer, recipe: Recipe) -> None:
        self.tokenizer = dress(tokenizer, recipe.template)
        self._recipe = recipe
        self._spelled_tokens = "special_text" in recipe.overrule
        self._may_differ = "mismatch" in recipe.overrule

    @cached_property
    def chats(self) -> ChatEncoder:
        """The encoder of chats. Raises :class:`DataError` where the template cannot be learned from."""
        return ChatEncoder(self.tokenizer, self._recipe.learn, self._recipe.overrule)

    @cached_property
    def _speller(self) -> Speller:
        return Speller(self.tokenizer, "")

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Where generation is to stop."""
        eos = self.tokenizer.eos_token_id
        return () if self._bare and eos is None else (eos,) if self._bare else self.chats.stop_ids

    @property
    def warnings(self) -> list[str]:
        """What is odd about the template, in words, for the report: known once a chat was encoded."""
        return list(self.chats.warnings) if "chats" in self.__dict__ else []

    @property
    def _bare(self) -> bool:
        """No chat template is used."""
        return self._recipe.template == "none" or not self.tokenizer.chat_template

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        """The tokens a model is asked with: the chat template's or, without one, the last message as it stands."""
        return self._text_ids([str(messages[-1]["content"])])[0] if self._bare else self.chats.prompt_ids(messages, tools)

    def encode(self, records: Iterable[Record]) -> Iterator[Encoded]:
        """What became of each record, in order."""
        upcoming = iter(records)
        while chunk := list(islice(upcoming, CHUNK)):
            yield from self._encode(chunk)

    def _encode(self, chunk: list[Record]) -> list[Encoded]:
        chats = [record for record in chunk if self._is_chat(record)]
        made = iter(self.chats.encode(chats)) if chats else iter(())
        texts = [record for record in chunk if record.text is not None]
        ids = iter(self._text_ids([str(record.text) for record in texts], literal=self._spelled_tokens))
        return [self._encoded(record, next(made) if self._is_chat(record) else self._plain(record, ids)) for record in chunk]

    def _is_chat(self, record: Record) -> bool:
        return record.text is None and self._recipe.template != "none"

    def _encoded(self, record: Record, found: tuple[Document, ...] | Fault) -> Encoded:
        if isinstance(found, Fault):
            return Encoded(record, fault=found)
        said = record.text if record.text is not None else "" if self._recipe.template != "none" else "".join(m["content"] for m in record.messages)
        spells = bool(self._speller.spelled.search(said)) if said else self.chats.spells(record)
        return Encoded(record, found, spells=spells)

    # ---------------------------------------------------------------- without a template

    def _plain(self, record: Record, texts: Iterator[list[int]]) -> tuple[Document, ...] | Fault:
        if record.text is not None:
            ids = next(texts)
            return (self._document(ids, 1),)
        if len(record.messages) != 2 or record.messages[0]["role"] != "user":
            fix = "give prompt and completion, or name a chat template"
            return self._fault(record, "a chat without a template", f"{len(record.messages)} messages", fix)
        asked, said = (str(message["content"]) for message in record.messages)
        prompt, ids = self._text_ids([asked]) + self._text_ids([asked + said])
        start = next((at for at, (one, two) in enumerate(zip(prompt, ids, strict=False)) if one != two), min(len(prompt), len(ids)))
        if start < len(prompt) and not self._may_differ:
            theirs, ours = (names(self.tokenizer, some[start : start + 3]) for some in (prompt, ids))
            shown = f"at token {start} the prompt has {theirs} and the text {ours}"
            fix = "move white space from the end of the prompt to the beginning of the completion, or overrule=('mismatch',)"
            return self._fault(record, "prompt and completion join into other tokens", shown, fix)
        return (self._document(ids, 1 if self._recipe.learn == "all" else start),)

    def _document(self, ids: list[int], start: int) -> Document:
        """A text and its end, learned from ``start`` on; the first token has nothing before it from which it could be predicted."""
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise DataError("The tokenizer has no EOS token, so that texts would never end", "set tokenizer.eos_token and save it beside the model")
        whole = [*ids, eos]
        start = max(start, 1)
        return Document(whole, [IGNORED] * start + whole[start:])

    def _text_ids(self, texts: list[str], *, literal: bool = False) -> list[list[int]]:
        """Tokens of plain texts, as the tokenizer begins and ends them, without an EOS; what spells a special token stays text unless ``literal``."""
        if not texts:
            return []
        spelled = [] if literal else [index for index, text in enumerate(texts) if self._speller.spelled.search(text)]
        found: list[list[int]] = [list(ids) for ids in self.tokenizer(texts, verbose=False)["input_ids"]]
        for index in spelled:
            found[index] = self._kept_text(texts[index])
        eos = self.tokenizer.eos_token_id
        return [ids[:-1] if ids and ids[-1] == eos else ids for ids in found]

    def _kept_text(self, text: str) -> list[int]:
        def rendered(breaker: str) -> tuple[str, Any]:
            apart = self._speller.apart(text, self._speller.spelled, breaker)
            return apart, self.tokenizer([apart], return_offsets_mapping=True, verbose=False)

        return self._speller.tokens(rendered, text)[0]

    def _fault(self, record: Record, kind: str, detail: str, fix: str) -> Fault:
        return Fault(kind=kind, source=record.source, line=record.line, field="messages", detail=detail, excerpt=excerpt(record.answer), fix=fix)
