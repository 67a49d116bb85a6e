"""One record: what was said, or written, and where it came from."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

Message = dict[str, Any]
"""``{"role": ..., "content": ...}`` as chat templates take it, the content always text; an assistant's may have ``tool_calls`` and a thought."""

ROLES: Final = ("system", "user", "assistant", "tool")
THOUGHTS: Final = ("reasoning_content", "thinking")
"""Where messages keep an assistant's thought beside its content: Qwen3's name and gpt-oss's."""


@dataclass(frozen=True)
class Record:
    """One record of any format: messages, or plain text."""

    messages: tuple[Message, ...] = ()
    """Empty for plain text."""
    line: int = 0
    """Line number in ``source``, from 1; of a table the row, of a CSV the row as a spreadsheet numbers it (the header is row 1)."""
    source: str = ""
    ignored: tuple[str, ...] = ()
    """Fields of the record that are not used, as ``messages[].name``."""
    text: str | None = None
    """Plain text, learned whole."""
    given: int = 0
    """Messages at the beginning that are by their format a prompt, never learned: those of ``prompt`` in prompt/completion and preference pairs."""
    tools: tuple[dict[str, Any], ...] = ()
    """JSON schemas of the functions that the assistant may call, handed to the chat template."""
    rejected: tuple[Message, ...] = ()
    """Of a preference pair: what should not have been said after the first ``given`` messages; ``messages`` goes on with what was chosen."""

    @cached_property
    def key(self) -> bytes:
        """Sixteen bytes that two records share exactly when they say the same."""
        said: list[Any] = [[message["role"], message["content"], *_beside(message)] for message in self.messages]
        said += [more for more in (self.text, self.tools, self.rejected) if more]
        return hashlib.blake2b(json.dumps(said).encode(), digest_size=16).digest()

    @property
    def asks(self) -> bool:
        """Whether the record can be asked about: it ends in an answer in words."""
        return bool(self.messages) and bool(self.messages[-1]["content"]) and not self.messages[-1].get("tool_calls")

    @property
    def prompt(self) -> list[Message]:
        """The messages before the last answer: what a model is asked with when the record is held out."""
        return list(self.messages[:-1])

    @property
    def answer(self) -> str:
        """The last answer: what a model should say to :attr:`prompt`. Of plain text, the text."""
        return str(self.messages[-1]["content"]) if self.messages else self.text or ""


def _beside(message: Message) -> list[Any]:
    """What a message says beside role and content."""
    return [[name, message[name]] for name in sorted(message) if name not in ("role", "content")] if len(message) > 2 else []
