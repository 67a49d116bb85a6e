"""Make the bundled tiny model from nothing: tokenizer, pretraining, validation, release.

    python examples/make_tiny.py --out DIR [--steps N] [--seed S]

The text it reads is the little world of ``sparklab.data.world``: generated, seen once, no JSON
in it. The defaults take less than half an hour on two CPU cores without AMX. The same seed on the same
machine with the same libraries gives the same weights; on another machine expect the same
quality, not the same bits (the order of floating-point sums differs).

A model that cannot copy, pick the right word out of an order, or read Arabic cannot be taught
the quickstart's task, however low its loss: copying and picking appear suddenly, late. So the
release is written only if the validation gate passes; ``--force`` writes it anyway.
"""

# Names of tensors end in their shapes: B rows, T tokens, V entries of the vocabulary, N = B*T.
# ruff: noqa: N802, N815

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sparklab.data.world import PROBES, Chat, Probe, pretraining_chats, probes

PAD, BOS, END = "<|pad|>", "<|bos|>", "<|end|>"
USER, ASSISTANT, SYSTEM = "<|user|>", "<|assistant|>", "<|system|>"

# The generation tags mark what a loss on answers should see: the words and the <|end|> after
# them, so the model also learns to stop.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '<|assistant|>' }}"
    "{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{% elif message['role'] in ['user', 'system'] %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% else %}"
    "{{ raise_exception('role is ' + message['role'] + '; it is system, user or assistant') }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Every default, once; the command line is made from it."""

    out: Path = Path("tiny")
    "Folder for the release."
    steps: int = 2200
    "Updates of the weights."
    seed: int = 0
    "Decides the text, the tokenizer and the initial weights."
    rows: int = 8
    "Rows in an update."
    row_tokens: int = 256
    "Tokens in a row; whole chats are packed into rows."
    vocabulary: int = 1536
    "Tokens in the vocabulary."
    hidden: int = 256
    "Width of the model."
    layers: int = 4
    "Depth of the model."
    heads: int = 4
    "Attention heads."
    feed_forward: int = 512
    "Width of the feed-forward layers."
    learning_rate: float = 3e-3
    "Highest learning rate: reached after the warm-up, then a cosine down to 2 % of it."
    warmup_steps: int = 100
    "Updates until the learning rate is reached."
    prompt_weight: float = 0.2
    "Weight of the loss on what the user says (mostly random words), against 1 on answers."
    threads: int = 2
    "CPU threads."
    eager: bool = False
    "Do not compile the model (compiling needs a C++ compiler)."
    force: bool = False
    "Write the release even if validation fails."


# Share of probes whose whole answer must come out right.
GATE: dict[Probe, float] = {"copy": 0.85, "select": 0.90, "arabic": 0.85}
PROBE_CHATS = 200
# Compiling costs about half a minute: not worth it for a short trial.
COMPILE_FROM_STEPS = 200
TOKENIZER_CHATS = 30_000
NO_DOCUMENT = -1


# ---------------------------------------------------------------- tokenizer


def train_tokenizer(settings: Settings) -> PreTrainedTokenizerFast:
    """Byte-level BPE whose words never swallow a space, digit or punctuation mark.

    So `Layla` is the same tokens after a space and after a quote, and a value can be copied
    out of a sentence into JSON token by token.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\s|\p{N}|\p{P}|\p{S}"), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocabulary,
        special_tokens=[PAD, BOS, END, USER, ASSISTANT, SYSTEM],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=20,
        show_progress=False,
    )
    chats = islice(pretraining_chats(settings.seed), TOKENIZER_CHATS)
    core.train_from_iterator((message["content"] for chat in chats for message in chat), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT, SYSTEM],
        clean_up_tokenization_spaces=False,
        model_max_length=2 * settings.row_tokens,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def render(chat: Chat) -> str:
    """The chat template's text, without its cost a hundred thousand times over."""
    return BOS + "".join(f"<|{message['role']}|>{message['content']}{END}" for message in chat)


# ---------------------------------------------------------------- batches


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Packed rows: B rows of T tokens; a chat sees only itself."""

    ids_BT: torch.Tensor
    position_BT: torch.Tensor
    document_BT: torch.Tensor
    weight_BT: torch.Tensor

    def mask_B1TT(self) -> torch.Tensor:
        """True where a token may look: backwards, within its own chat."""
        doc = self.document_BT
        causal_TT = torch.ones(doc.shape[1], doc.shape[1], dtype=torch.bool).tril()
        return ((doc[:, :, None] == doc[:, None, :]) & causal_TT)[:, None]


def packed_rows(documents: Iterator[list[int]], row_tokens: int) -> Iterator[list[list[int]]]:
    """Whole documents gathered into rows, first fit; what is longer than a row is left out."""
    open_rows: list[tuple[int, list[list[int]]]] = []  # (room left, documents)
    for document in documents:
        if len(document) > row_tokens:
            continue
        for i, (room, row) in enumerate(open_rows):
            if len(document) <= room:
                row.append(document)
                open_rows[i] = (room - len(document), row)
                break
        else:
            open_rows.append((row_tokens - len(document), [document]))
        if len(open_rows) > 16:
            fullest = min(range(len(open_rows)), key=lambda i: open_rows[i][0])
            yield open_rows.pop(fullest)[1]


def token_documents(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[list[int]]:
    """Token ids of one pretraining chat after another."""
    chats = pretraining_chats(seed)
    while True:
        texts = [render(chat) for chat in islice(chats, 1000)]
        yield from tokenizer(texts, add_special_tokens=False)["input_ids"]


def answer_mask(ids_BT: torch.Tensor, assistant: int, end: int) -> torch.Tensor:
    """True on the tokens after <|assistant|>, up to and including <|end|>."""
    place_T = torch.arange(ids_BT.shape[1])
    last_assistant_BT, last_end_BT = (torch.where(ids_BT == token, place_T, -1).cummax(-1).values for token in (assistant, end))
    return F.pad(last_assistant_BT > last_end_BT, (1, 0))[:, :-1]


def batches(tokenizer: PreTrainedTokenizerFast, settings: Settings) -> Iterator[Batch]:
    """Endless training batches, made as they are needed."""
    pad, bos, end, assistant = tokenizer.convert_tokens_to_ids([PAD, BOS, END, ASSISTANT])
    # Not the tokenizer's stream: its chats would be read twice.
    rows = packed_rows(token_documents(tokenizer, settings.seed + 1), settings.row_tokens)
    shape = (settings.rows, settings.row_tokens)
    while True:
        ids_BT = torch.full(shape, pad)
        position_BT = torch.zeros(shape, dtype=torch.long)
        document_BT = torch.full(shape, NO_DOCUMENT)
        for b, row in enumerate(islice(rows, settings.rows)):
            start = 0
            for d, document in enumerate(row):
                stop = start + len(document)
                ids_BT[b, start:stop] = torch.tensor(document)
                position_BT[b, start:stop] = torch.arange(len(document))
                document_BT[b, start:stop] = d
                start = stop
        answers_BT = answer_mask(ids_BT, assistant, end)
        weight_BT = torch.where(answers_BT, 1.0, settings.prompt_weight)
        weight_BT[(ids_BT == bos) | (ids_BT == pad)] = 0.0
        yield Batch(ids_BT=ids_BT, position_BT=position_BT, document_BT=document_BT, weight_BT=weight_BT)


# ---------------------------------------------------------------- model


def new_model(tokenizer: PreTrainedTokenizerFast, settings: Settings) -> LlamaForCausalLM:
    """A freshly initialised Llama with tied embeddings."""
    torch.manual_seed(settings.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden,
        num_hidden_layers=settings.layers,
        intermediate_size=settings.feed_forward,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=2 * settings.row_tokens,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def batch_loss(
    model: LlamaForCausalLM,
    ids_BT: torch.Tensor,
    position_BT: torch.Tensor,
    mask_B1TT: torch.Tensor,
    weight_BT: torch.Tensor,
) -> torch.Tensor:
    """Weighted mean cross-entropy of every next token."""
    logits_BTV = model(input_ids=ids_BT, position_ids=position_BT, attention_mask=mask_B1TT, use_cache=False).logits
    # Row t predicts token t+1; a chat's first token has weight 0, so no chat predicts the next.
    loss_N = F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="none")
    weight_N = weight_BT[:, 1:].flatten()
    return (loss_N * weight_N).sum() / weight_N.sum()


class Muon:
    """Momentum whose step is made orthogonal: every matrix moves equally far in all directions, not mostly in the few that the gradient favours.

    Copying and picking appear after a quarter of the tokens that AdamW alone needs (benchmarks/LOG.md). Method and coefficients: Jordan et al.,
    "Muon", 2024; the step's size, that of an AdamW step of the same learning rate: Liu et al., arXiv 2502.16982. torch.optim.Muon does the same
    one matrix at a time and in bf16, which takes a CPU without bf16 units three times as long as equal shapes stacked in fp32.
    """

    COEFFICIENTS = (3.4445, -4.7750, 2.0315)
    ITERATIONS = 5

    def __init__(self, matrices: list[torch.nn.Parameter], weight_decay: float, momentum: float = 0.95) -> None:
        self.weight_decay, self.momentum = weight_decay, momentum
        self.momenta = {parameter: torch.zeros_like(parameter) for parameter in matrices}
        self.stacks: dict[tuple[int, int], list[torch.nn.Parameter]] = {}
        for parameter in matrices:
            self.stacks.setdefault((min(parameter.shape), max(parameter.shape)), []).append(parameter)

    def orthogonal(self, stack: torch.Tensor) -> torch.Tensor:
        """Nearly the nearest orthogonal matrix of each [n, m >= n] in the stack, by Newton and Schulz's iteration."""
        a, b, c = self.COEFFICIENTS
        x = stack / (stack.norm(dim=(-2, -1), keepdim=True) + 1e-7)
        for _ in range(self.ITERATIONS):
            square = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
        return x

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """One update; the gradients are used up."""
        for (_, longer), parameters in self.stacks.items():
            ahead = []
            for parameter in parameters:
                momentum = self.momenta[parameter].mul_(self.momentum).add_(parameter.grad)
                step = parameter.grad.add_(momentum, alpha=self.momentum)
                ahead.append(step if step.shape[0] <= step.shape[1] else step.mT)
            for parameter, step in zip(parameters, self.orthogonal(torch.stack(ahead)), strict=True):
                parameter.mul_(1 - learning_rate * self.weight_decay)
                parameter.add_(step if parameter.shape[0] <= parameter.shape[1] else step.mT, alpha=-0.2 * longer**0.5 * learning_rate)
                parameter.grad = None


def learning_rate(step: int, settings: Settings) -> float:
    """Linear warm-up, then a cosine down to 2 % of the highest."""
    warmup = min(1.0, (step + 1) / settings.warmup_steps)
    cosine = 0.5 * (1.0 + math.cos(math.pi * step / settings.steps))
    return settings.learning_rate * warmup * (0.02 + 0.98 * cosine)


def pretrain(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, settings: Settings) -> None:
    """Train in place, printing the loss, the speed and the probes as it goes."""
    embedding = model.get_input_embeddings().weight
    muon = Muon([p for p in model.parameters() if p.dim() > 1 and p is not embedding], weight_decay=0.1)
    norms = [p for p in model.parameters() if p.dim() == 1]
    adamw = torch.optim.AdamW([{"params": [embedding], "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}], betas=(0.9, 0.95), fused=True)
    compiled = not settings.eager and settings.steps >= COMPILE_FROM_STEPS
    loss_of = torch.compile(batch_loss) if compiled else batch_loss
    update_tokens = settings.rows * settings.row_tokens
    started = time.perf_counter()
    for step, batch in enumerate(islice(batches(tokenizer, settings), settings.steps)):
        rate = learning_rate(step, settings)
        for group in adamw.param_groups:
            group["lr"] = rate
        loss = loss_of(model, batch.ids_BT, batch.position_BT, batch.mask_B1TT(), batch.weight_BT)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        muon.step(rate)
        adamw.step()
        adamw.zero_grad()
        done = step + 1
        if done % 50 == 0 or done == settings.steps:
            seconds = time.perf_counter() - started
            print(
                f"step {done}/{settings.steps}  loss {loss.item():.3f}  {done * update_tokens / seconds:.0f} tokens/s  {seconds:.0f} s",
                flush=True,
            )
        if done % 250 == 0:
            print(f"  probes: {describe(validate(model, tokenizer, chats=64))}", flush=True)


# ---------------------------------------------------------------- validation


@torch.no_grad()
def probe_share(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, kind: Probe, chats: int) -> float:
    """Share of probes whose greedy answer is right to the last token.

    Every answer token is the model's first choice given the ones before it: the same as
    generating greedily and comparing, for the price of one forward pass.
    """
    right = 0
    assistant, end = tokenizer.convert_tokens_to_ids([ASSISTANT, END])
    texts = sorted((render(chat) for chat in probes(kind, chats)), key=len)
    for start in range(0, len(texts), 50):
        encoded = tokenizer(texts[start : start + 50], add_special_tokens=False, padding=True, return_tensors="pt")
        ids_BT = encoded["input_ids"]
        best_BT = model(
            input_ids=ids_BT, attention_mask=encoded["attention_mask"], use_cache=False
        ).logits[:, :-1].argmax(-1)  # fmt: skip
        answer_BT = answer_mask(ids_BT, assistant, end)[:, 1:]
        right += int(((best_BT == ids_BT[:, 1:]) | ~answer_BT).all(-1).sum())
    return right / chats


def validate(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, chats: int = PROBE_CHATS) -> dict[Probe, float]:
    """The share of right answers for each kind of probe."""
    model.eval()
    shares = {kind: probe_share(model, tokenizer, kind, chats) for kind in PROBES}
    model.train()
    return shares


def describe(shares: dict[Probe, float]) -> str:
    """``copy 0.97, select 0.98, arabic 0.96``"""
    return ", ".join(f"{kind} {share:.3f}" for kind, share in shares.items())


# ---------------------------------------------------------------- release

CARD = """\
---
license: apache-2.0
language: [en, ar]
pipeline_tag: text-generation
---

# sparklab tiny

A Llama of {millions:.2f} million parameters that trains in seconds on a CPU. It exists so that a
fine-tuning toolkit can be tried, tested and taught without a download. It is not useful for
anything else.

- **Shape**: {layers} layers, hidden {hidden}, {heads} heads, feed-forward {feed_forward}, tied
  embeddings, vocabulary {vocabulary} (byte-level BPE; spaces, digits and punctuation marks are
  tokens of their own).
- **Made by** `python examples/make_tiny.py --steps {steps} --seed {seed}`: {updates} updates of
  {rows} x {row_tokens} packed tokens, each read once, from a generator of short chats
  (`sparklab/data/world.py`): orders and questions about them, meetings, trips, finds, copying
  drills, small talk; about three quarters English, one quarter Arabic; more than half of the names are random
  syllables. No text by people, no personal data, no JSON.
- **Can**: copy, quote and bracket short strings; answer questions about an order of the kind it
  has read, in English and Arabic. Share of {probes} unseen probes answered exactly: {shares}.
- **Cannot**: anything else. It knows no facts and no other subjects; its Arabic is template
  Arabic.
- **Chat format**: `<|bos|>`, then `<|role|>content<|end|>` for each message; roles `system`,
  `user`, `assistant`; `<|end|>` ends generation.
- **Licence**: Apache-2.0.
"""


def release(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    shares: dict[Probe, float],
    settings: Settings,
) -> None:
    """Write bf16 safetensors, tokenizer, configs and the model card to ``settings.out``."""
    settings.out.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=128,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model.to(torch.bfloat16).save_pretrained(settings.out)
    tokenizer.save_pretrained(settings.out)
    # Written private to its owner; an installed package is read by others.
    (settings.out / "model.safetensors").chmod(0o644)
    card = CARD.format(
        millions=sum(p.numel() for p in model.parameters()) / 1e6,
        layers=settings.layers, hidden=settings.hidden, heads=settings.heads,
        feed_forward=settings.feed_forward, vocabulary=len(tokenizer), steps=settings.steps,
        seed=settings.seed, updates=f"{settings.steps:,}", rows=settings.rows,
        row_tokens=settings.row_tokens, probes=PROBE_CHATS, shares=describe(shares),
    )  # fmt: skip
    (settings.out / "README.md").write_text(card, encoding="utf-8")


def make(settings: Settings) -> bool:
    """The whole run; True if a release was written."""
    torch.set_num_threads(settings.threads)
    tokenizer = train_tokenizer(settings)
    example = next(pretraining_chats(settings.seed))
    assert tokenizer.apply_chat_template(example, tokenize=False) == render(example)
    model = new_model(tokenizer, settings)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, {len(tokenizer)} tokens in the vocabulary", flush=True)
    pretrain(model, tokenizer, settings)
    # The gate judges what is shipped: the weights as rounded to bf16.
    model.to(torch.bfloat16).to(torch.float32)
    shares = validate(model, tokenizer)
    missed = [f"{kind} {shares[kind]:.3f}, {least:.2f} needed" for kind, least in GATE.items() if shares[kind] < least]
    print(f"validation: {describe(shares)}")
    if missed:
        print(f"the validation gate failed: {'; '.join(missed)}", file=sys.stderr)
        if not settings.force:
            print("nothing written; train longer (--steps), or use --force", file=sys.stderr)
            return False
    release(model, tokenizer, shares, settings)
    print(f"written to {settings.out}")
    return True


def read_settings(arguments: list[str] | None = None) -> Settings:
    """Settings from the command line; the defaults are the dataclass's own."""
    parser = argparse.ArgumentParser(description="Make the bundled tiny model.")
    for field in fields(Settings):
        flag = f"--{field.name.replace('_', '-')}"
        if isinstance(field.default, bool):
            parser.add_argument(flag, action="store_true")
        else:
            parser.add_argument(flag, type=type(field.default), default=field.default)
    return Settings(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(0 if make(read_settings()) else 1)
