"""From messages to token ids through the tokenizer's own chat template, with text kept text.

Text that happens to spell a special token stays text: a user who writes ``<|assistant|>`` would otherwise open an assistant's turn, in
training and in answering alike. Both come through here, so both see the same tokens. Split: special tokens are taken apart in every message;
other added tokens that the template itself writes (some models flag their role markers so) in all but the assistant's, which may
hold ``<think>`` and its kin for good reason.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final, Protocol

from sparklab.data.chat import Message
from sparklab.errors import DataError

_BREAKS: Final = "\ue000\ue001\ue002\ue003\uf8fe\uf8ff"
"""Private-use characters; one that the chat lacks is put inside text that spells a special token, and taken out again as tokens."""
_MARKS: Final = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class Tokenizer(Protocol):
    """What is asked of a tokenizer; those of transformers have it."""

    @property
    def chat_template(self) -> Any: ...
    @property
    def is_fast(self) -> bool: ...
    @property
    def bos_token_id(self) -> Any: ...
    @property
    def eos_token_id(self) -> Any: ...
    @property
    def added_tokens_decoder(self) -> dict[int, Any]: ...
    def get_chat_template(self) -> str: ...
    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any: ...
    def convert_ids_to_tokens(self, ids: Any) -> Any: ...


class Renderer:
    """A tokenizer and its chat template. Raises :class:`DataError` where there is no template."""

    marked: bool
    """The template says by ``{% generation %}`` what the assistant writes."""
    special: frozenset[int]
    """Ids of the tokens that are no text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        if not tokenizer.chat_template:
            fix = "use the instruct version of this model, or set tokenizer.chat_template and save the tokenizer beside the model"
            raise DataError("The tokenizer has no chat template, so chats cannot become tokens", fix)
        self.tokenizer = tokenizer
        template = tokenizer.get_chat_template()
        # Only fast tokenizers tell which token a character became, which is how marks become a mask.
        self.marked = tokenizer.is_fast and bool(_MARKS.search(template))
        added = tokenizer.added_tokens_decoder
        self.special = frozenset(token for token, value in added.items() if value.special)
        # One character cannot be taken apart, and white space is text wherever it stands.
        texts = {value.content: value.special for value in added.values() if len(value.content) > 1 and not value.content.isspace()}
        self._spelled = _any_of(text for text, special in texts.items() if special)
        self._spelled_or_written = _any_of(text for text, special in texts.items() if special or text in template)

    def prompts(self, conversations: Sequence[Sequence[Message]]) -> list[list[int]]:
        """The tokens each conversation is asked with: all of it, and the opening of the assistant's turn."""
        return [ids for ids, _ in self._tokens(conversations, add_generation_prompt=True)]

    def texts(self, conversations: Sequence[Sequence[Message]]) -> list[tuple[list[int], list[int]]]:
        """The tokens of each whole conversation, and the first token of every marked stretch (none where the template marks nothing)."""
        return [(ids, _starts(mask)) for ids, mask in self._tokens(conversations, add_generation_prompt=False)]

    def names(self, ids: Sequence[int]) -> str:
        """Token ids as a person reads them: ``'<|end|>' (4)``."""
        return " ".join(f"{name!r} ({token})" for token, name in zip(ids, self.tokenizer.convert_ids_to_tokens(list(ids)), strict=True))

    def _tokens(self, conversations: Sequence[Sequence[Message]], add_generation_prompt: bool) -> list[tuple[list[int], list[int]]]:
        """Tokens and mask of each; those that spell a special token one by one, all others in one call."""
        found: list[tuple[list[int], list[int]]] = [([], [])] * len(conversations)
        plain = []
        for index, messages in enumerate(conversations):
            breaker = self._breaker(messages)
            if breaker:
                found[index] = self._broken(messages, breaker, add_generation_prompt)
            else:
                plain.append(index)
        if plain:
            out = self._apply([list(conversations[index]) for index in plain], add_generation_prompt)
            masks = out["assistant_masks"] if "assistant_masks" in out else [[]] * len(plain)
            for index, ids, mask in zip(plain, out["input_ids"], masks, strict=True):
                found[index] = (ids, mask)
        return found

    def _apply(self, conversations: list[list[Message]], add_generation_prompt: bool, **tokenizer_kwargs: Any) -> Any:
        # The template writes BOS where it belongs; apply_chat_template tokenises without adding a second one.
        return self.tokenizer.apply_chat_template(
            conversations,
            add_generation_prompt=add_generation_prompt,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=self.marked and not add_generation_prompt,
            tokenizer_kwargs=tokenizer_kwargs,
        )

    def _pattern(self, message: Message) -> re.Pattern[str]:
        return self._spelled if message["role"] == "assistant" else self._spelled_or_written

    def _breaker(self, messages: Sequence[Message]) -> str:
        """A character this conversation lacks where its text spells a special token; "" where it spells none, as nearly always."""
        if not any(self._pattern(message).search(message["content"]) for message in messages):
            return ""
        for char in _BREAKS:
            if not any(char in message["content"] for message in messages):
                return char
        raise DataError("A chat spells a special token and holds every private-use character that could keep it text", "remove either from the text")

    def _broken(self, messages: Sequence[Message], breaker: str, add_generation_prompt: bool) -> tuple[list[int], list[int]]:
        """Tokens and mask of a conversation whose text spells special tokens, none of which becomes one."""
        if not self.tokenizer.is_fast:
            raise DataError("A chat spells a special token, which a slow tokenizer cannot keep text", "use the model's fast tokenizer (tokenizer.json)")
        apart = []
        for message in messages:
            content, found = message["content"], 1
            while found:  # taking one apart may leave another
                content, found = self._pattern(message).subn(lambda spelled: spelled[0][0] + breaker + spelled[0][1:], content)
            apart.append({**message, "content": content})
        text = self.tokenizer.apply_chat_template(apart, add_generation_prompt=add_generation_prompt, tokenize=False)
        out = self._apply([apart], add_generation_prompt, return_offsets_mapping=True)
        ids: list[int] = out["input_ids"][0]
        mask = out["assistant_masks"][0] if "assistant_masks" in out else [0] * len(ids)
        kept = []
        for index, (start, end) in enumerate(out["offset_mapping"][0]):
            if breaker not in text[start:end]:
                kept.append(index)
            elif text[start:end].strip(breaker):
                fact = f"The tokenizer joins {text[start:end]!r} into one token, so that text which spells a special token cannot stay text"
                raise DataError(fact, "remove the special token's text from the record")
        return [ids[index] for index in kept], [mask[index] for index in kept]


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
