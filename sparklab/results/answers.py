"""Loads what a run made and asks it: side-by-side answers, exact match, held-out loss. Runs in the job's process (torch)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import transformers
from torch import nn

from sparklab.box import Box
from sparklab.data.dataset import prepare
from sparklab.data.encode import Encoder
from sparklab.engine import checkpoint
from sparklab.engine.answer import answer, exact_match
from sparklab.engine.fast import ready_model
from sparklab.engine.trainer import mean_loss
from sparklab.errors import RunError
from sparklab.model import load
from sparklab.run.directory import RunDirectory
from sparklab.units import jsonable


class Tuned:
    """A run's base and its result, loaded once."""

    def __init__(self, directory: RunDirectory) -> None:
        transformers.utils.logging.set_verbosity_error()
        self.recipe = directory.recipe
        wrong = checkpoint.faults(directory.result_path)
        if wrong:
            raise RunError(f"{directory.result_path} is damaged: {'; '.join(wrong)}", "resume the run, or train anew")
        self.box = Box.detect()
        self.tokenizer = load.load_tokenizer(self.recipe.model)
        self.encoder = Encoder(self.tokenizer, self.recipe)
        self.model = ready_model(self.recipe, self.box)
        # adapters switch off; after full fine-tuning the base must be read again
        self._base = ready_model(self.recipe, self.box) if self.recipe.method == "full" else self.model
        checkpoint.load_weights(self.model, Path(directory.result_path))
        self.model.eval()

    def answers(self, ids: Sequence[Sequence[int]], max_new_tokens: int, tuned: bool) -> list[str]:
        """Greedy answers to prompts in tokens, of the tuned model, or of the base (the same weights with the adapters off)."""
        model, context = self.state(tuned)
        with context:
            return answer(model, self.tokenizer, ids, max_new_tokens, self.recipe)

    def state(self, tuned: bool) -> tuple[nn.Module, AbstractContextManager[Any]]:
        """The model and the context in which it is what the run made, or what it was before."""
        if tuned or self.recipe.method == "full":
            return self.model if tuned else self._base, nullcontext()
        return self.model, self.model.disable_adapter()  # type: ignore[operator]


def compare(directory: RunDirectory, prompts: list[str], max_new_tokens: int) -> dict[str, Any]:
    """``rows``: prompt, base's answer, tuned's answer."""
    tuned = Tuned(directory)
    ids = [tuned.encoder.prompt_ids([{"role": "user", "content": prompt}]) for prompt in prompts]
    before = tuned.answers(ids, max_new_tokens, tuned=False)
    after = tuned.answers(ids, max_new_tokens, tuned=True)
    return {"rows": [{"prompt": p, "base": b, "tuned": t} for p, b, t in zip(prompts, before, after, strict=True)]}


def evaluate(directory: RunDirectory, n: int | None) -> dict[str, Any]:
    """Held-out loss and exact match of base and tuned, over all held-out records or the first ``n`` for the answers."""
    tuned = Tuned(directory)
    recipe = directory.recipe
    data = prepare(recipe, tuned.tokenizer)
    if not data.held_out_rows:
        raise RunError("this run held nothing out to evaluate on", "train with held_out=0.1, or a file of held-out records")
    chats = data.held_out_chats[:n]
    ids, truths = [tuned.encoder.prompt_ids(chat.prompt, chat.tools) for chat in chats], [chat.answer for chat in chats]
    result: dict[str, Any] = {"held_out": len(data.held_out_chats), "answered": len(chats)}
    for name, is_tuned in (("base", False), ("tuned", True)):
        model, context = tuned.state(is_tuned)
        with context:
            loss = mean_loss(model, data.held_out_rows, recipe.loss, load.pick_device())
        scores = exact_match(tuned.answers(ids, recipe.answer_tokens, is_tuned), truths) if chats else {}  # of plain text nothing is asked
        result[name] = {**loss, **scores}
    checked: dict[str, Any] = jsonable(result)
    return checked
