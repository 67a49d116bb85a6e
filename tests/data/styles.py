"""Chat-template styles in common use, in our own words, each with the tokenizer it goes with and what a model must write in it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from toy import SENTENCES
from transformers import PreTrainedTokenizerFast

from sparklab.data import templates

QWEN3 = (
    "{%- set ns = namespace(last=-1) -%}{%- for m in messages -%}{%- if m['role'] == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}"
    "{%- if tools -%}{{- '<|im_start|>system\\n' + (messages[0]['content'] + '\\n' if messages[0]['role'] == 'system' else '') + 'Functions:' -}}"
    "{%- for tool in tools -%}{{- '\\n' + (tool | tojson) -}}{%- endfor -%}{{- '<|im_end|>\\n' -}}{%- endif -%}"
    "{%- for m in messages -%}"
    "{%- if m['role'] == 'assistant' -%}"
    "{%- set thought = m.get('reasoning_content') or '' -%}{%- set said = m['content'] -%}"
    "{%- if '</think>' in said -%}{%- set thought = said.split('</think>')[0].split('<think>')[-1].strip('\\n') -%}"
    "{%- set said = said.split('</think>')[-1].lstrip('\\n') -%}{%- endif -%}"
    "{{- '<|im_start|>assistant\\n' -}}"
    "{%- if loop.index0 > ns.last and (loop.last or thought) -%}{{- '<think>\\n' + thought + '\\n</think>\\n\\n' -}}{%- endif -%}"
    "{{- said -}}{%- for call in m.get('tool_calls') or [] -%}"
    "{{- ('\\n' if said else '') + '<tool_call>\\n' + ({'name': call['function']['name'], 'arguments': call['function']['arguments']} | tojson) -}}"
    "{{- '\\n</tool_call>' -}}{%- endfor -%}{{- '<|im_end|>\\n' -}}"
    "{%- elif m['role'] == 'tool' -%}{{- '<|im_start|>user\\n<tool_response>\\n' + m['content'] + '\\n</tool_response><|im_end|>\\n' -}}"
    "{%- elif m['role'] == 'user' or not tools -%}{{- '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' -}}{%- endif -%}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
HARMONY = (
    "{{- '<|start|>system<|message|>Channels: analysis, commentary, final.<|end|>' -}}"
    "{%- for m in messages -%}"
    "{%- if m['role'] == 'system' -%}{{- '<|start|>developer<|message|>' + m['content'] + '<|end|>' -}}"
    "{%- elif m['role'] == 'user' -%}{{- '<|start|>user<|message|>' + m['content'] + '<|end|>' -}}"
    "{%- elif m['role'] == 'tool' -%}"
    "{{- '<|start|>functions.' + m['name'] + ' to=assistant<|channel|>commentary<|message|>' + m['content'] + '<|end|>' -}}"
    "{%- elif m.get('tool_calls') -%}{%- set call = m['tool_calls'][0]['function'] -%}"
    "{%- if m.get('thinking') -%}{{- '<|start|>assistant<|channel|>analysis<|message|>' + m['thinking'] + '<|end|>' -}}{%- endif -%}"
    "{{- '<|start|>assistant to=functions.' + call['name'] + '<|channel|>commentary json<|message|>' + (call['arguments'] | tojson) + '<|call|>' -}}"
    "{%- else -%}"
    "{%- if loop.last and m.get('thinking') -%}{{- '<|start|>assistant<|channel|>analysis<|message|>' + m['thinking'] + '<|end|>' -}}{%- endif -%}"
    "{{- '<|start|>assistant<|channel|>final<|message|>' + m['content'] + ('<|return|>' if loop.last else '<|end|>') -}}{%- endif -%}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|start|>assistant' -}}{%- endif -%}"
)
# Mistral's later form: the instruction's brackets are tokens, and no space stands around the words.
TEKKEN = (
    "{{- bos_token -}}{%- for m in messages -%}{%- if m['role'] == 'system' -%}{{- '[SYSTEM]' + m['content'] + '[/SYSTEM]' -}}"
    "{%- elif m['role'] == 'user' -%}{{- '[INST]' + m['content'] + '[/INST]' -}}{%- else -%}{{- m['content'] + eos_token -}}{%- endif -%}{%- endfor -%}"
)
PHI4 = (
    "{%- for m in messages -%}{{- '<|im_start|>' + m['role'] + '<|im_sep|>' + m['content'] + '<|im_end|>' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant<|im_sep|>' -}}{%- endif -%}"
)


@dataclass(frozen=True)
class Style:
    """A template, its special tokens, and what an answer is in it."""

    text: str
    special: tuple[str, ...]
    eos: str
    writes: Callable[[str], str]
    """What the model must write for an answer, end of turn included."""
    bos: str = "<s>"
    rewrites: bool = False
    """Earlier turns are written otherwise, so each is a document of its own."""
    tokens: str = "bytes"
    """Kind of tokenizer: bytes (BPE on bytes), pieces (BPE on words with their space, falling back to bytes), unigram."""
    said: Callable[[str], str] = str
    """What the template makes of a question or a system message."""


def _named(name: str, special: tuple[str, ...], eos: str, writes: Callable[[str], str], tokens: str = "bytes", **more: Any) -> dict[str, Style]:
    """A named template, with its generation marks and without."""
    text = templates.text_of(name)
    bare = text.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
    assert bare != text
    return {name: Style(text, special, eos, writes, tokens=tokens, **more), f"{name} without marks": Style(bare, special, eos, writes, tokens=tokens, **more)}


HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
CHANNELS = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>")
STYLES: dict[str, Style] = {
    **_named("chatml", ("<|im_start|>", "<|im_end|>"), "<|im_end|>", lambda said: f"{said}<|im_end|>"),
    **_named("llama2", ("<s>", "</s>", "<unk>"), "</s>", lambda said: f" {said} </s>", "pieces"),
    **_named("llama3", HEADERS, "<|eot_id|>", lambda said: f"{said.strip()}<|eot_id|>"),
    **_named("mistral", ("<s>", "</s>", "<unk>"), "</s>", lambda said: f" {said}</s>", "pieces"),
    **_named("gemma", ("<start_of_turn>", "<end_of_turn>", "<eos>", "<unk>"), "<eos>", lambda said: f"{said.strip()}<end_of_turn>", "pieces"),
    **_named("phi3", ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"), "<|endoftext|>", lambda said: f"{said}<|end|>"),
    **_named("zephyr", ("<s>", "</s>", "<unk>"), "</s>", lambda said: f"{said}</s>", "pieces"),
    **_named("vicuna", ("<s>", "</s>", "<unk>"), "</s>", lambda said: f" {said}</s>", "unigram"),
    "mistral tekken": Style(TEKKEN, ("[SYSTEM]", "[/SYSTEM]", "[INST]", "[/INST]", "</s>"), "</s>", lambda said: f"{said}</s>"),
    "phi4": Style(PHI4, ("<|im_start|>", "<|im_sep|>", "<|im_end|>"), "<|im_end|>", lambda said: f"{said}<|im_end|>"),
    "qwen3": Style(QWEN3, ("<|im_start|>", "<|im_end|>"), "<|im_end|>", lambda said: f"<think>\n\n</think>\n\n{said}<|im_end|>", rewrites=True),
    "harmony": Style(HARMONY, CHANNELS, "<|return|>", lambda said: f"<|channel|>final<|message|>{said}<|return|>", rewrites=True),
}


@functools.cache
def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """A style's tokenizer with its template."""
    style = STYLES[name]
    special = list(dict.fromkeys(["<|pad|>", style.bos, style.eos, *style.special]))
    backend = {"bytes": _bytes, "pieces": _pieces, "unigram": _unigram}[style.tokens]()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=style.bos, eos_token=style.eos, pad_token="<|pad|>", clean_up_tokenization_spaces=False
    )
    if name == "qwen3":  # flagged as words of the vocabulary, as that model does
        tokenizer.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
    tokenizer.chat_template = style.text
    return tokenizer


def _bytes() -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(SENTENCES * 3, trainers.BpeTrainer(vocab_size=450, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return backend


def _pieces() -> Tokenizer:
    """As SentencePiece's BPE: words begin with their space, and characters the vocabulary lacks become bytes."""
    import json

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trained.train_from_iterator(SENTENCES * 3, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(model["vocab"], key=model["vocab"].get)]
    vocab = {word: index for index, word in enumerate(dict.fromkeys(words))}
    backend = Tokenizer(models.BPE(vocab, [tuple(merge) for merge in model["merges"]], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return backend


def _unigram() -> Tokenizer:
    """As SentencePiece's unigram: what the vocabulary lacks is unknown."""
    letters = [chr(point) for point in range(32, 127)] + list("ابتثجحخدذرزسشصضطظعغفقكلمنهويىةءأإؤئ؟،é\n")
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.UnigramTrainer(vocab_size=400, unk_token="<unk>", special_tokens=["<unk>"], initial_alphabet=["▁", *letters], show_progress=False)
    backend.train_from_iterator(SENTENCES * 3, trainer)
    return backend
