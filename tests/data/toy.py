"""A tokenizer small enough to train for each test session, chat templates of the two kinds, and chats."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = [
    "The lamp on the table is warm and the window is open.",
    "Which colour do you like, red or green? Seven green apples lie on the shelf.",
    "She carried the basket home, and nobody asked her where it came from.",
    "القط ينام على الكرسي والباب مفتوح.",
    'Write {"name": "Noor", "count": 12} and nothing else.',
]
SPECIAL = ["<|pad|>", "<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]

PLAIN_SPECIAL = ["<|pad|>", "<|bos|>", "<|start|>", "<|stop|>"]

MARKED = (
    "{{- '<|bos|>' -}}{%- for message in messages -%}{{- '<|' + message['role'] + '|>' -}}"
    "{%- if message['role'] == 'assistant' -%}{%- generation -%}{{- message['content'] + '<|end|>' -}}{%- endgeneration -%}"
    "{%- else -%}{{- message['content'] + '<|end|>' -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
# The shape of ChatML: a header line, the words, an end token and a newline that belongs to nobody.
PLAIN = (
    "{%- for message in messages -%}{{- '<|start|>' + message['role'] + '\\n' + message['content'] + '<|stop|>' + '\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|start|>assistant\\n' -}}{%- endif -%}"
)


def build_tokenizer(template: str | None, *, end: str, special: list[str] = SPECIAL) -> PreTrainedTokenizerFast:
    """Byte-level BPE of some 500 tokens; any text can be encoded and decoded exactly."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    backend.train_from_iterator(SENTENCES * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|bos|>", eos_token=end, pad_token="<|pad|>")
    tokenizer.chat_template = template
    return tokenizer


def chat_line(*contents: str, system: str | None = None) -> str:
    """One JSONL record whose messages alternate from the user's."""
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages += [{"role": "user" if index % 2 == 0 else "assistant", "content": content} for index, content in enumerate(contents)]
    return json.dumps({"messages": messages}, ensure_ascii=False)


def write_chats(path: Path, count: int, *, words: int = 5) -> Path:
    """A file of ``count`` different short chats."""
    lines = [
        chat_line(f"Question {index}: how many apples?", " ".join([f"There are {index} apples."] + ["Indeed."] * (index % words))) for index in range(count)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
