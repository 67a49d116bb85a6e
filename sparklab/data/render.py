"""From messages to token ids through the tokenizer's own chat template, with text kept text.

Text that happens to spell a special token stays text: a user who writes ``<|assistant|>`` would otherwise open an assistant's turn, in
training and in answering alike. Both come through here, so both see the same tokens. Split: special tokens are taken apart in every message;
other added tokens that the template itself writes (some models flag their role markers so) in all but the assistant's, which may
hold ``<think>`` and its kin for good reason.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any, Final, NamedTuple, Protocol

from sparklab.data.record import THOUGHTS, Message
from sparklab.errors import DataError

_BREAKERS: Final = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))
"""Private-use characters; one that the chat lacks is put inside text that spells a special token, and taken out again as tokens."""
_MARKS: Final = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class Tokenizer(Protocol):
    """What is asked of a tokenizer; those of transformers have it."""

    chat_template: Any

    @property
    def is_fast(self) -> bool: ...
    @property
    def bos_token_id(self) -> Any: ...
    @property
    def eos_token_id(self) -> Any: ...
    @property
    def added_tokens_decoder(self) -> dict[int, Any]: ...
    def __call__(self, text: Any, **kwargs: Any) -> Any: ...
    def get_chat_template(self) -> str: ...
    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any: ...
    def convert_ids_to_tokens(self, ids: Any) -> Any: ...


class Conversation(NamedTuple):
    """What a chat template is given."""

    messages: Sequence[Message]
    tools: Sequence[dict[str, Any]] = ()


class Speller:
    """Keeps text that spells special tokens text, for one tokenizer."""

    special: frozenset[int]
    """Ids of the tokens that are no text."""

    def __init__(self, tokenizer: Tokenizer, template: str) -> None:
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self.special = frozenset(token for token, value in added.items() if value.special)
        # One character cannot be taken apart, and white space is text wherever it stands.
        texts = {value.content: value.special for value in added.values() if len(value.content) > 1 and not value.content.isspace()}
        self.spelled = _any_of(text for text, special in texts.items() if special)
        self.spelled_or_written = _any_of(text for text, special in texts.items() if special or text in template)

    def apart(self, value: Any, pattern: re.Pattern[str], breaker: str) -> Any:
        """The value with every spelled token in it taken apart."""
        if isinstance(value, str):
            found = 1
            while found:  # taking one apart may leave another
                value, found = pattern.subn(lambda spelled: spelled[0][0] + breaker + spelled[0][1:], value)
            return value
        if isinstance(value, dict):
            return {self.apart(key, pattern, breaker): self.apart(inner, pattern, breaker) for key, inner in value.items()}
        return [self.apart(inner, pattern, breaker) for inner in value] if isinstance(value, (list, tuple)) else value

    def tokens(self, rendered: Callable[[str], tuple[str, Any]], said: str) -> tuple[list[int], list[int]]:
        """Tokens and mask of what ``rendered`` makes with a breaker that ``said`` lacks: its text, and the tokenizer's output with offsets."""
        if not self.tokenizer.is_fast:
            raise DataError("A chat spells a special token, which a slow tokenizer cannot keep text", "use the model's fast tokenizer (tokenizer.json)")
        present, joined = set(said), ""
        candidates = (chr(point) for point in chain(*_BREAKERS) if chr(point) not in present)
        for breaker, _ in zip(candidates, range(4), strict=False):  # a tokenizer may join one with what stands beside it
            text, out = rendered(breaker)
            ids: list[int] = out["input_ids"][0]
            mask = out["assistant_masks"][0] if "assistant_masks" in out else [0] * len(ids)
            kept, joined = [], ""
            for index, (start, end) in enumerate(out["offset_mapping"][0]):
                if breaker not in text[start:end]:
                    kept.append(index)
                elif text[start:end].strip(breaker):
                    joined = text[start:end]
                    break
            if not joined:
                return [ids[index] for index in kept], [mask[index] for index in kept]
        if not joined:
            raise DataError("A chat spells a special token and holds every private-use character that could keep it text", "remove either from the text")
        fact = f"The tokenizer joins {joined!r} into one token, so that text which spells a special token cannot stay text"
        raise DataError(fact, "remove the special token's text from the record")


class Renderer:
    """A tokenizer and its chat template. Raises :class:`DataError` where there is no template."""

    marked: bool
    """The template says by ``{% generation %}`` what the assistant writes."""
    special: frozenset[int]
    """Ids of the tokens that are no text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        if not tokenizer.chat_template:
            fix = "name one (template='chatml'), use the instruct version of this model, or lay prompt and completion end to end (template='none')"
            raise DataError("The tokenizer has no chat template, so chats cannot become tokens", fix)
        self.tokenizer = tokenizer
        template = tokenizer.get_chat_template()
        # Only fast tokenizers tell which token a character became, which is how marks become a mask.
        self.marked = tokenizer.is_fast and bool(_MARKS.search(template))
        self._speller = Speller(tokenizer, template)
        self.special = self._speller.special

    def prompts(self, conversations: Sequence[Conversation]) -> list[list[int]]:
        """The tokens each conversation is asked with: all of it, and the opening of the assistant's turn."""
        return [ids for ids, _ in self._tokens(conversations, add_generation_prompt=True)]

    def texts(self, conversations: Sequence[Conversation]) -> list[tuple[list[int], list[int]]]:
        """The tokens of each whole conversation, and the first token of every marked stretch (none where the template marks nothing)."""
        return [(ids, _starts(mask)) for ids, mask in self._tokens(conversations, add_generation_prompt=False)]

    def written(self, conversation: Conversation) -> str:
        """The text of a conversation."""
        text: str = self._template([conversation.messages], conversation.tools, add_generation_prompt=False, tokenize=False)[0]
        return text

    def names(self, ids: Sequence[int]) -> str:
        """Token ids as a person reads them: ``'<|end|>' (4)``."""
        return names(self.tokenizer, ids)

    def _tokens(self, conversations: Sequence[Conversation], add_generation_prompt: bool) -> list[tuple[list[int], list[int]]]:
        """Tokens and mask of each; those that spell a special token, or have tools, one by one, all others in one call."""
        found: list[tuple[list[int], list[int]]] = [([], [])] * len(conversations)
        plain = []
        for index, conversation in enumerate(conversations):
            if self.spells(conversation):
                found[index] = self._broken(conversation, add_generation_prompt)
            elif conversation.tools:
                found[index] = self._whole([conversation], conversation.tools, add_generation_prompt)[0]
            else:
                plain.append(index)
        if plain:
            made = self._whole([conversations[index] for index in plain], (), add_generation_prompt)
            for index, tokens in zip(plain, made, strict=True):
                found[index] = tokens
        return found

    def _whole(self, conversations: Sequence[Conversation], tools: Sequence[dict[str, Any]], add_generation_prompt: bool) -> list[tuple[list[int], list[int]]]:
        out = self._apply([conversation.messages for conversation in conversations], tools, add_generation_prompt)
        masks = out["assistant_masks"] if "assistant_masks" in out else [[]] * len(conversations)
        return list(zip(out["input_ids"], masks, strict=True))

    def _apply(self, conversations: Sequence[Sequence[Message]], tools: Sequence[dict[str, Any]], add_generation_prompt: bool, **tokenizer_kwargs: Any) -> Any:
        # The template writes BOS where it belongs; apply_chat_template tokenises without adding a second one.
        return self._template(
            conversations,
            tools,
            add_generation_prompt=add_generation_prompt,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=self.marked and not add_generation_prompt,
            tokenizer_kwargs=tokenizer_kwargs,
        )

    def _template(self, conversations: Sequence[Sequence[Message]], tools: Sequence[dict[str, Any]], **options: Any) -> Any:
        messages = [[_both_names(message) for message in conversation] for conversation in conversations]
        return self.tokenizer.apply_chat_template(messages, tools=list(tools) or None, **options)

    def _pattern(self, message: Message) -> re.Pattern[str]:
        return self._speller.spelled if message["role"] == "assistant" else self._speller.spelled_or_written

    def spells(self, conversation: Conversation) -> bool:
        """Whether the conversation's text spells a special token, which is rare."""
        return any(self._pattern(message).search(text) for message in conversation.messages for text in _texts(message)) or any(
            self._speller.spelled_or_written.search(text) for text in _strings(conversation.tools)
        )

    def _broken(self, conversation: Conversation, add_generation_prompt: bool) -> tuple[list[int], list[int]]:
        """Tokens and mask of a conversation whose text spells special tokens, none of which becomes one."""

        def rendered(breaker: str) -> tuple[str, Any]:
            apart = [
                {name: value if name == "role" else self._speller.apart(value, self._pattern(message), breaker) for name, value in message.items()}
                for message in conversation.messages
            ]
            tools = self._speller.apart(list(conversation.tools), self._speller.spelled_or_written, breaker)
            (text,) = self._template([apart], tools, add_generation_prompt=add_generation_prompt, tokenize=False)
            return text, self._apply([apart], tools, add_generation_prompt, return_offsets_mapping=True)

        said = chain(_strings(conversation.tools), *map(_texts, conversation.messages))
        return self._speller.tokens(rendered, "".join(said))


def names(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Token ids as a person reads them: ``'<|end|>' (4)``."""
    return " ".join(f"{name!r} ({token})" for token, name in zip(ids, tokenizer.convert_ids_to_tokens(list(ids)), strict=True))


def _both_names(message: Message) -> Message:
    """The message with its thought under every name that templates know it by."""
    thought = next((message[name] for name in THOUGHTS if name in message), None)
    return message if thought is None else {**message, **dict.fromkeys(THOUGHTS, thought)}


def _texts(message: Message) -> Iterator[str]:
    """What a message says, the role aside."""
    return chain.from_iterable(_strings(value) for name, value in message.items() if name != "role")


def _strings(value: Any) -> Iterator[str]:
    """Every text in a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from _strings(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _strings(inner)


def _any_of(texts: Any) -> re.Pattern[str]:
    """A pattern for any of these texts, longest first since one may begin another; without any it matches nothing."""
    return re.compile("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)) or r"(?!)")


def _starts(mask: list[int]) -> list[int]:
    """Where each run of ones in the mask begins."""
    starts: list[int] = []
    position = 0
    while True:
        try:
            position = mask.index(1, position)
        except ValueError:
            return starts
        starts.append(position)
        try:
            position = mask.index(0, position)
        except ValueError:
            return starts
