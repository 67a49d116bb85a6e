"""Chat templates by name, for tokenizers that come without one: the forms in common use, in our own words, with generation marks.

A template can only be used where the tokenizer has the special tokens it is written in: without them every model would read and write
their spelling, letter by letter, and never stop. Those of Llama 2, Mistral, Zephyr and Vicuna need nothing but an EOS token.
"""

from __future__ import annotations

from typing import Final, NamedTuple, get_args

from sparklab.data.render import Tokenizer
from sparklab.errors import DataError
from sparklab.planner.recipe import Template


class _Named(NamedTuple):
    tokens: tuple[str, ...]
    """Special tokens it is written in, EOS aside."""
    text: str


_SYSTEM_FIRST: Final = (
    "{%- set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' -%}"
    "{%- set turns = messages[1:] if messages[0]['role'] == 'system' else messages -%}"
)
_NO_TOOLS: Final = "{%- if message['role'] == 'tool' or message.get('tool_calls') -%}{{- raise_exception('it has no form for tool calls') -}}{%- endif -%}"
_BOS: Final = "{{- bos_token or '' -}}"


def _headers(opening: str, closing: str, *, assistant: str = "'assistant'", bos: str = "", trim: str = "") -> str:
    """Turns that each have a header with the role's name: ``opening`` and ``closing`` are template expressions around ``role``."""
    said = f"message['content']{trim}"
    return (
        f"{bos}{{%- for message in messages -%}}{_NO_TOOLS}{{%- set role = {assistant} if message['role'] == 'assistant' else message['role'] -%}}"
        f"{{{{- {opening} -}}}}{{%- if message['role'] == 'assistant' -%}}{{%- generation -%}}{{{{- {said} + {closing} -}}}}{{%- endgeneration -%}}"
        f"{{%- else -%}}{{{{- {said} + {closing} -}}}}{{%- endif -%}}@after@{{%- endfor -%}}"
        f"{{%- if add_generation_prompt -%}}{{%- set role = {assistant} -%}}{{{{- {opening} -}}}}{{%- endif -%}}"
    )


_INSTRUCTIONS: Final = (
    _SYSTEM_FIRST + "{%- for message in turns -%}" + _NO_TOOLS + "{%- if message['role'] == 'user' -%}"
    "{%- set asked = @system@ + message['content'] if loop.first and system else message['content'] -%}"
    "{{- @bos@ + '[INST] ' + asked + ' [/INST]' -}}"
    "{%- else -%}{%- generation -%}{{- ' ' + message['content'] + @eos@ -}}{%- endgeneration -%}{%- endif -%}{%- endfor -%}"
)

_NAMED: Final[dict[str, _Named]] = {
    "chatml": _Named(
        ("<|im_start|>", "<|im_end|>"), _headers("'<|im_start|>' + role + '\\n'", "'<|im_end|>'").replace("@after@", "{{- '\\n' -}}")
    ),
    "llama2": _Named(
        (),
        _INSTRUCTIONS.replace("@system@", "'<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n'")
        .replace("@bos@", "(bos_token or '')").replace("@eos@", "' ' + eos_token"),
    ),
    "llama3": _Named(
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        _headers("'<|start_header_id|>' + role + '<|end_header_id|>\\n\\n'", "'<|eot_id|>'", bos=_BOS, trim=" | trim").replace("@after@", ""),
    ),
    "mistral": _Named(
        (),
        _BOS + _INSTRUCTIONS.replace("@system@", "system + '\\n\\n'").replace("@bos@", "''").replace("@eos@", "eos_token"),
    ),
    "gemma": _Named(
        ("<start_of_turn>", "<end_of_turn>"),
        _BOS + _SYSTEM_FIRST + _headers(
            "'<start_of_turn>' + role + '\\n' + (system + '\\n\\n' if loop is defined and loop.first and system else '')", "'<end_of_turn>'",
            assistant="'model'", trim=" | trim",
        ).replace("in messages -", "in turns -").replace("@after@", "{{- '\\n' -}}"),
    ),
    "phi3": _Named(
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), _headers("'<|' + role + '|>\\n'", "'<|end|>'").replace("@after@", "{{- '\\n' -}}")
    ),
    "zephyr": _Named((), _headers("'<|' + role + '|>\\n'", "eos_token").replace("@after@", "{{- '\\n' -}}")),
    "vicuna": _Named(
        (),
        _BOS + _SYSTEM_FIRST + "{{- system + '\\n\\n' if system else '' -}}{%- for message in turns -%}" + _NO_TOOLS
        + "{%- if message['role'] == 'user' -%}{{- 'USER: ' + message['content'] + ' ASSISTANT:' -}}"
        "{%- else -%}{%- generation -%}{{- ' ' + message['content'] + eos_token -}}{%- endgeneration -%}{%- endif -%}{%- endfor -%}",
    ),
}  # fmt: skip


def names() -> tuple[str, ...]:
    """The templates that can be named."""
    return tuple(_NAMED)


def text_of(name: str) -> str:
    """A named template, as Jinja."""
    return _NAMED[name].text


def dress(tokenizer: Tokenizer, template: str) -> Tokenizer:
    """The tokenizer with the chat template that a recipe names; ``auto`` and ``none`` leave its own. Twice is as once.

    The template goes with the tokenizer into the run's result, so that whoever asks the model asks it in the form it learned.
    Raises :class:`DataError` where the tokenizer lacks the tokens that the template is written in.
    """
    if template in ("auto", "none"):
        return tokenizer
    present = {value.content for value in tokenizer.added_tokens_decoder.values()}
    if tokenizer.eos_token_id is None:
        raise DataError(f"template is {template!r}, but the tokenizer has no EOS token to end a turn with", "use the tokenizer of its instruct version")
    lacking = [token for token in _NAMED[template].tokens if token not in present]
    if lacking:
        able = [name for name, named in _NAMED.items() if all(token in present for token in named.tokens)]
        fact = f"template is {template!r}, but the tokenizer has no token {', '.join(lacking)}"
        raise DataError(fact, f"choose one that it can write: {', '.join(able)}")
    tokenizer.chat_template = _NAMED[template].text
    return tokenizer


assert {*_NAMED, "auto", "none"} == set(get_args(Template))
