"""Greedy answers: what the model says, for comparing base with tuned and for counting exact matches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sparklab.data.encode import Encoder
from sparklab.model.anatomy import Anatomy
from sparklab.model.load import causal_lm
from sparklab.planner.items import answers_at_once
from sparklab.planner.recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def generating(model: nn.Module) -> Iterator[Any]:
    """The model in the state generation needs (evaluation mode, masked SDPA with a cache), put back afterwards."""
    base = causal_lm(model)
    implementation, was_training = base.config._attn_implementation, model.training
    model.eval()
    base.set_attn_implementation("sdpa" if base._supports_sdpa else "eager")  # SDPA knows neither soft-capped scores nor sinks
    try:
        with torch.no_grad():
            yield model
    finally:
        base.set_attn_implementation(implementation)
        model.train(was_training)


def answer(model: nn.Module, tokenizer: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, recipe: Recipe) -> list[str]:
    """Greedy continuations of prompts given as token ids, in their order, special tokens left out; as many at once as the recipe's plan counted on."""
    longest = max(len(prompt) for prompt in prompts) + max_new_tokens
    at_once = answers_at_once(Anatomy.read(recipe.model), longest, causal_lm(model).get_input_embeddings().weight.element_size())
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    texts: list[str] = tokenizer.batch_decode(
        continuations(model, prompts, max_new_tokens, at_once, pad, _stops(model, tokenizer, recipe)), skip_special_tokens=True
    )
    return texts


def continuations(model: nn.Module, prompts: Sequence[Sequence[int]], max_new_tokens: int, at_once: int, pad: int, stops: Sequence[int]) -> list[list[int]]:
    """Greedy continuations as token ids, in the prompts' order, ``at_once`` prompts together.

    Prompts of similar length go together, so that little is computed for padding. An answer ends at the first of ``stops``; without any it
    always has ``max_new_tokens`` tokens.
    """
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers: list[list[int]] = [[] for _ in prompts]
    device = next(model.parameters()).device
    with generating(model) as ready:
        for start in range(0, len(order), at_once):
            chosen = order[start : start + at_once]
            width = max(len(prompts[index]) for index in chosen)
            ids = torch.tensor([[pad] * (width - len(prompts[index])) + list(prompts[index]) for index in chosen], device=device)
            mask = torch.tensor([[0] * (width - len(prompts[index])) + [1] * len(prompts[index]) for index in chosen], device=device)
            output = ready.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad, eos_token_id=list(stops) or None
            )
            for index, tokens in zip(chosen, output[:, width:].tolist(), strict=True):
                answers[index] = tokens
    return answers


def _stops(model: Any, tokenizer: Any, recipe: Recipe) -> list[int]:
    """Every token that ends an answer: the template's end of turn, the tokenizer's end of text and those of the generation config."""
    configured = causal_lm(model).generation_config.eos_token_id
    stops = {*Encoder(tokenizer, recipe).stop_ids, *(configured if isinstance(configured, list) else [configured])}
    return sorted(stop for stop in stops if stop is not None)


def exact_match(answers: Sequence[str], truths: Sequence[str]) -> dict[str, float]:
    """Share of answers equal to the truth letter by letter (outer blanks aside), with n and the standard error sqrt(p(1-p)/n)."""
    assert len(answers) == len(truths) > 0
    share = sum(given.strip() == true.strip() for given, true in zip(answers, truths, strict=True)) / len(truths)
    return {"exact_match": share, "n": len(truths), "standard_error": math.sqrt(share * (1 - share) / len(truths))}
