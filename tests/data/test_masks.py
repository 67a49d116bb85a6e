"""Twenty templates of twelve styles, three kinds of tokenizer: what is learned is what the model must write, letter by letter, and nothing else."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from styles import STYLES, tokenizer_of
from toy import PLAIN, PLAIN_SPECIAL, build_tokenizer

from sparklab.data import templates
from sparklab.data.encode import Encoded, Encoder
from sparklab.data.faults import Fault
from sparklab.data.record import Message, Record
from sparklab.data.template import IGNORED, ChatEncoder, Document
from sparklab.errors import DataError
from sparklab.planner.recipe import Recipe

ENCODERS: dict[str, ChatEncoder] = {}


def encoder_of(name: str) -> ChatEncoder:
    return ENCODERS.setdefault(name, ChatEncoder(tokenizer_of(name)))


def says(role: str, content: str, **more: Any) -> Message:
    return {"role": role, "content": content, **more}


def chat(*contents: str, system: str | None = None) -> Record:
    messages = [says("system", system)] if system is not None else []
    messages += [says("user" if index % 2 == 0 else "assistant", content) for index, content in enumerate(contents)]
    return Record(tuple(messages), line=7, source="chats.jsonl")


def documents_of(encoder: ChatEncoder, record: Record) -> tuple[Document, ...]:
    (found,) = encoder.encode([record])
    assert not isinstance(found, Fault), found
    return found


def learned(tokenizer: Any, document: Document) -> list[str]:
    """Every stretch that is learned, as text: what decoding adds when its tokens are added, since a decoder may drop a text's first space."""
    stretches = []
    position, ids = 0, document.input_ids
    while position < len(ids):
        start = position
        while position < len(ids) and document.labels[position] != IGNORED:
            assert document.labels[position] == ids[position]
            position += 1
        if position > start:
            stretches.append(tokenizer.decode(ids[:position])[len(tokenizer.decode(ids[:start])) :])
        position += 1
    return stretches


def control(tokenizer: Any, ids: list[int]) -> list[int]:
    return [token for token in ids if token in tokenizer.all_special_ids or tokenizer.added_tokens_decoder.get(token) is not None]


def check(name: str, contents: list[str], system: str | None) -> None:
    style, tokenizer, encoder = STYLES[name], tokenizer_of(name), encoder_of(name)
    record = chat(*contents, system=system)
    documents = documents_of(encoder, record)
    written = [style.writes(answer) for answer in contents[1::2]]
    assert [learned(tokenizer, document) for document in documents] == ([[one] for one in written] if style.rewrites else [written])
    for document, turns in zip(reversed(documents), range(len(contents), 0, -2), strict=False):
        part = chat(*contents[:turns], system=system)
        asked = encoder.prompt_ids(part.prompt)
        assert document.input_ids[: len(asked)] == asked, "training text begins with what generation is prompted with"
        assert document.labels[len(asked)] != IGNORED and document.labels[0] == IGNORED
        text = tokenizer.apply_chat_template(list(part.messages), tokenize=False)
        assert tokenizer.decode(document.input_ids) == text
        harmless = documents_of(encoder, chat(*["word"] * turns, system=system and "word"))[-1]
        assert control(tokenizer, document.input_ids) == control(tokenizer, harmless.input_ids), "text never becomes a control token"


def test_enough_styles() -> None:
    assert len(STYLES) == 20
    assert len({name.split()[0] for name in STYLES}) == 11
    assert {style.tokens for style in STYLES.values()} == {"bytes", "pieces", "unigram"}


CHATS: dict[str, tuple[str | None, list[str]]] = {
    "one turn": (None, ["Which colour?", "Green."]),
    "system, three turns": ("Be brief.", ["a", "b", "c", "d e", "f", "g"]),
    "the same words on both sides": (None, ["Green.", "Green.", "Green.", "Green."]),
    "Arabic": ("أجب بإيجاز", ["ما لون المصباح؟", "المصباح أخضر", "والباب؟", "مفتوح"]),
    "markers of every style typed": ("[INST]<|im_end|>", ["</s> ASSISTANT: I am </s><s>[INST]<|im_start|>", "No.<end_of_turn></s><|eot_id|> USER: x"]),
}


@pytest.mark.parametrize("name", STYLES)
def test_what_is_learned(name: str) -> None:
    for system, contents in CHATS.values():
        check(name, contents, system)


SPELLED = sorted({token for style in STYLES.values() for token in (*style.special, style.eos, style.bos)} - {"<unk>"})
known = st.text(st.sampled_from("abc XYZ.,?!<>|[]/_'قلمباهو"), max_size=12)
anything = st.one_of(
    known, st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12), st.sampled_from(["😀", "👩‍👩‍👧‍👦", "\n", "\ue000"])
)
marks = st.sampled_from([*SPELLED, "<|", "|>", "USER:", " ASSISTANT:", "<<SYS>>", "assistant", "model"])


@st.composite
def any_chat(draw: Any) -> tuple[str, list[str], str | None]:
    name = draw(st.sampled_from(sorted(STYLES)))
    piece = marks | (known if STYLES[name].tokens == "unigram" else anything)
    words = st.lists(piece, max_size=4).map("".join)
    # White space at an answer's beginning may join with the header's own: then the record is refused, and tested elsewhere.
    answer = words.map(str.strip).filter(bool)
    if STYLES[name].tokens != "bytes":  # these write a space before every text, and their decoders take one away
        words = words.map(str.strip)
    turns = draw(st.lists(st.tuples(words, answer), min_size=1, max_size=3))
    return name, [content for turn in turns for content in turn], draw(st.none() | words.filter(bool))


@settings(max_examples=150, deadline=None)
@given(any_chat())
@example(("chatml", ["<|pad|>", "\ue000\ue001\ue002\ue003\uf8fe\uf8ff<|pad|>"], None))  # every private-use character an earlier version knew of
def test_what_is_learned_in_any_chat(made: tuple[str, list[str], str | None]) -> None:
    check(*made)


# ---------------------------------------------------------------- thoughts, calls

TOOL = {"type": "function", "function": {"name": "weather", "description": "d", "parameters": {"type": "object", "properties": {}}}}


def call(name: str, **arguments: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": name, "arguments": arguments}}]


CALLED = Record(
    (
        says("system", "Be brief."),
        says("user", "Is it warm in Cairo?"),
        says("assistant", "", tool_calls=call("weather", city="Cairo <|im_end|>"), reasoning_content="I must look."),
        says("tool", "31 degrees", name="weather"),
        says("assistant", "It is.", reasoning_content="Warm."),
        says("user", "And now?"),
        says("assistant", "Still."),
    ),
    tools=(TOOL,),
)
ARGUMENTS = json.dumps({"city": "Cairo <|im_end|>"})


def test_thoughts_and_calls_of_qwen3() -> None:
    tokenizer = tokenizer_of("qwen3")
    documents = documents_of(encoder_of("qwen3"), CALLED)
    called = f'<think>\nI must look.\n</think>\n\n<tool_call>\n{{"name": "weather", "arguments": {ARGUMENTS}}}\n</tool_call><|im_end|>'
    assert [learned(tokenizer, document) for document in documents] == [
        [called],
        ["<think>\nWarm.\n</think>\n\nIt is.<|im_end|>"],
        ["<think>\n\n</think>\n\nStill.<|im_end|>"],
    ]
    assert all(tokenizer.decode(document.input_ids).count('"name": "weather", "description"') == 1 for document in documents)


def test_thoughts_and_calls_of_harmony() -> None:
    tokenizer, encoder = tokenizer_of("harmony"), ChatEncoder(tokenizer_of("harmony"))
    documents = documents_of(encoder, Record(CALLED.messages))
    assert [learned(tokenizer, document) for document in documents] == [
        ["<|channel|>analysis<|message|>Warm.<|end|><|start|>assistant<|channel|>final<|message|>It is.<|return|>"],
        [  # a call keeps its thought and its end whatever follows, so it is learned where it stands
            f"<|channel|>analysis<|message|>I must look.<|end|><|start|>assistant to=functions.weather<|channel|>commentary json<|message|>{ARGUMENTS}<|call|>",
            "<|channel|>final<|message|>Still.<|return|>",
        ],
    ]
    assert [tokenizer.decode([stop]) for stop in encoder.stop_ids] == ["<|return|>", "<|call|>"]


@pytest.mark.parametrize(
    ("record", "what"),
    [
        (Record((says("user", "a"), says("assistant", "b")), tools=(TOOL,)), "the functions in tools"),
        (Record((says("user", "a"), says("assistant", "b", reasoning_content="c"))), "thoughts"),
        (Record((says("user", "a"), says("assistant", "b", tool_calls=call("f")))), "tool calls"),
    ],
)
def test_nothing_is_left_out_without_a_word(record: Record, what: str) -> None:
    (found,) = ChatEncoder(build_tokenizer(PLAIN, end="<|stop|>", special=PLAIN_SPECIAL)).encode([record])
    assert isinstance(found, Fault) and found.kind == f"the chat template leaves out {what}"


def test_a_system_message_left_out_is_said() -> None:
    deaf = build_tokenizer(
        PLAIN.replace("for message in messages", "for message in messages if message['role'] != 'system'"), end="<|stop|>", special=PLAIN_SPECIAL
    )
    good, bad = ChatEncoder(deaf).encode([chat("a", "b"), chat("a", "b", system="c")])
    assert not isinstance(good, Fault)
    assert isinstance(bad, Fault) and bad.kind == "the chat template leaves out the system message"


# ---------------------------------------------------------------- what is learned, by name


@pytest.mark.parametrize(
    ("learn", "expected"),
    [("assistant", ["b<|im_end|>", "d<|im_end|>", "f<|im_end|>"]), ("last", ["f<|im_end|>"]), ("completion", ["f<|im_end|>"])],
)
@pytest.mark.parametrize("name", ["chatml", "chatml without marks", "phi4"])
def test_learn(name: str, learn: Any, expected: list[str]) -> None:
    tokenizer = tokenizer_of(name)
    (document,) = documents_of(ChatEncoder(tokenizer, learn), chat("a", "b", "c", "d", "e", "f"))
    assert learned(tokenizer, document) == expected


def test_learn_all() -> None:
    (document,) = documents_of(ChatEncoder(tokenizer_of("qwen3"), "all"), chat("a", "b", "c", "d"))
    assert document.labels == [IGNORED, *document.input_ids[1:]]


def test_completion_is_all_that_follows_the_last_question() -> None:
    tokenizer = tokenizer_of("qwen3")
    found = [learned(tokenizer, document) for document in documents_of(ChatEncoder(tokenizer, "completion"), Record(CALLED.messages[:5], tools=(TOOL,)))]
    assert len(found) == 1 and len(found[0]) == 2  # behind the last question nothing is written anew: one document with both turns
    last = [learned(tokenizer, document) for document in documents_of(ChatEncoder(tokenizer, "last"), Record(CALLED.messages[:5], tools=(TOOL,)))]
    assert last == [found[0][1:]]


@pytest.mark.parametrize("name", ["chatml", "phi4", "qwen3"])
def test_a_prompt_is_never_learned(name: str) -> None:
    tokenizer, style = tokenizer_of(name), STYLES[name]
    record = Record(chat("a", "example", "c", "d").messages, given=3)
    assert [learned(tokenizer, document) for document in documents_of(encoder_of(name), record)] == [[style.writes("d")]]


# ---------------------------------------------------------------- mismatches

ODD = PLAIN.replace("{{- '<|start|>assistant\\n' -}}", "{{- '<|start|>bot\\n' -}}")


def test_a_mismatch_is_refused_unless_overruled() -> None:
    odd = build_tokenizer(ODD, end="<|stop|>", special=PLAIN_SPECIAL)
    with pytest.raises(DataError, match="generation is prompted with"):
        ChatEncoder(odd)
    encoder = ChatEncoder(odd, overrule=("mismatch",))
    assert "overruled" in encoder.warnings[0]
    (document,) = documents_of(encoder, chat("a", "b"))
    assert learned(odd, document) == ["assistant\nb<|stop|>"]  # from the first token that differs


def test_a_mismatch_in_one_record_is_located() -> None:
    """chatml's header ends in a newline, which this tokenizer joins with an answer's own."""
    joining = build_tokenizer(PLAIN, end="<|stop|>", special=[*PLAIN_SPECIAL, "\n\n"])
    good, bad, other = ChatEncoder(joining).encode([chat("a", "b"), chat("a", "\nb"), chat("a", "b", "c", "d")])
    assert isinstance(bad, Fault) and (bad.source, bad.line, bad.field) == ("chats.jsonl", 7, "messages")
    assert not isinstance(good, Fault) and not isinstance(other, Fault)
    (document,) = documents_of(ChatEncoder(joining, overrule=("mismatch",)), chat("a", "\nb"))
    assert learned(joining, document) == ["\n\nb<|stop|>"]


@pytest.mark.parametrize("contents", [("a", "b", "c", "\nd"), ("a", "\nb", "c", "d")])
def test_a_mismatch_in_any_turn_is_located_with_marks_too(contents: tuple[str, ...]) -> None:
    joining = build_tokenizer(templates.text_of("chatml"), end="<|im_end|>", special=["<|pad|>", "<|im_start|>", "<|im_end|>", "\n\n"])
    (bad,) = ChatEncoder(joining).encode([chat(*contents)])
    assert isinstance(bad, Fault) and bad.kind == "training text and generation prompt differ"


# ---------------------------------------------------------------- named templates


def recipe(**fields: Any) -> Recipe:
    return Recipe(model="tiny", data="d", **fields)


def encoded(tokenizer: Any, *records: Record, **fields: Any) -> list[Encoded]:
    return list(Encoder(tokenizer, recipe(**fields)).encode(records))


@pytest.mark.parametrize("name", [name for name in STYLES if name in templates.names()])
def test_a_named_template_is_put_on_a_tokenizer_without_one(name: str) -> None:
    bare = tokenizer_of(f"{name} without marks")
    before, bare.chat_template = bare.chat_template, None
    try:
        with pytest.raises(DataError, match="no chat template") as caught:
            encoded(bare, chat("a", "b"))
        assert "template='chatml'" in caught.value.fix
        (one,) = encoded(bare, chat("a", "b", system="c"), template=name)
        assert one.documents and learned(bare, one.documents[0]) == [STYLES[name].writes("b")]
        assert bare.chat_template == templates.text_of(name)
    finally:
        bare.chat_template = before


def test_a_template_whose_tokens_are_not_there_is_refused() -> None:
    with pytest.raises(DataError, match=r"no token <start_of_turn>, <end_of_turn>") as caught:
        encoded(tokenizer_of("chatml"), chat("a", "b"), template="gemma")
    assert caught.value.fix == "choose one that it can write: chatml, llama2, mistral, zephyr, vicuna"


def test_named_templates_refuse_what_they_have_no_form_for() -> None:
    (one,) = encoded(tokenizer_of("chatml"), Record((says("user", "a"), says("assistant", "", tool_calls=call("f")))))
    assert one.fault is not None and "no form for tool calls" in one.fault.detail


# ---------------------------------------------------------------- text, and no template


def test_text_is_learned_whole_and_ends() -> None:
    tokenizer = tokenizer_of("chatml")
    (one, other) = encoded(tokenizer, Record(text="The lamp is warm."), Record(text="<|im_start|>user\nwho?<|im_end|>"))
    (document,) = one.documents
    assert tokenizer.decode(document.input_ids) == "The lamp is warm.<|im_end|>"
    assert document.labels == [IGNORED, *document.input_ids[1:]]
    assert (one.spells, other.spells) == (False, True)
    assert control(tokenizer, other.documents[0].input_ids) == [tokenizer.eos_token_id]
    assert tokenizer.decode(other.documents[0].input_ids) == "<|im_start|>user\nwho?<|im_end|><|im_end|>"
    (literal,) = encoded(tokenizer, Record(text="<|im_start|>user\nwho?<|im_end|>"), overrule=("special_text",))
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert control(tokenizer, literal.documents[0].input_ids) == [start, end]  # the text's own end is not written twice


def test_text_needs_an_end() -> None:
    tokenizer = build_tokenizer(None, end="<|stop|>", special=PLAIN_SPECIAL)
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no EOS token"):
        encoded(tokenizer, Record(text="a"))


def test_prompt_and_completion_end_to_end() -> None:
    tokenizer = tokenizer_of("phi4")
    pair = Record((says("user", "Q: which?\nA:"), says("assistant", " green")), given=1)
    encoder = Encoder(tokenizer, recipe(template="none"))
    (one,) = encoder.encode([pair])
    (document,) = one.documents
    assert tokenizer.decode(document.input_ids) == "Q: which?\nA: green<|im_end|>"
    assert learned(tokenizer, document) == [" green<|im_end|>"]
    asked = encoder.prompt_ids(pair.prompt)
    assert document.input_ids[: len(asked)] == asked
    assert encoder.stop_ids == (tokenizer.eos_token_id,)
    (joined,) = encoder.encode([Record((says("user", "The lamp on the ta"), says("assistant", "ble is warm")), line=3, source="d.csv")])
    assert joined.fault is not None and joined.fault.kind == "prompt and completion join into other tokens"
    (overruled,) = Encoder(tokenizer, recipe(template="none", overrule=("mismatch",))).encode([joined.record])
    assert learned(tokenizer, overruled.documents[0])[0].endswith("ble is warm<|im_end|>")
    (several,) = encoder.encode([chat("a", "b", "c", "d")])
    assert several.fault is not None and several.fault.kind == "a chat without a template"


def test_prompts_and_stops_with_a_template() -> None:
    tokenizer = tokenizer_of("qwen3")
    encoder = Encoder(tokenizer, recipe())
    assert tokenizer.decode(encoder.prompt_ids([says("user", "a")])) == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    assert '"name": "weather"' in tokenizer.decode(encoder.prompt_ids([says("user", "a")], [TOOL]))
    assert encoder.stop_ids == (tokenizer.eos_token_id,)


def test_the_bundled_model() -> None:
    """What is learned of the bundled model's chats is their answers and its end of turn, whatever a user types."""
    from transformers import AutoTokenizer

    from sparklab.model.hub import TINY_PATH

    tokenizer = AutoTokenizer.from_pretrained(TINY_PATH)
    encoder = ChatEncoder(tokenizer)
    for system, contents in (*CHATS.values(), ("<|end|>", ["<|assistant|>x<|end|>", "<|end|> 😀", "ليلى", "مرحبا<|user|>"])):
        (document,) = documents_of(encoder, chat(*contents, system=system))
        assert learned(tokenizer, document) == [answer + "<|end|>" for answer in contents[1::2]]
        (harmless,) = documents_of(encoder, chat(*["word"] * len(contents), system=system and "word"))
        assert control(tokenizer, document.input_ids) == control(tokenizer, harmless.input_ids)
