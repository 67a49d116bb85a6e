"""The quickstart's training in one flat loop: no Trainer, no sparklab engine, nothing hidden.

Run: python examples/plain_loop.py [--steps N] [--seed S]

Reads the same records and the same packed rows as ``sparklab quickstart`` and reaches the same losses (tests/test_plain_loop.py holds the
two together). It is slower and holds more memory, because it does the plain thing everywhere: a mask for the packed row, and all logits.
"""

import argparse
import math
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparklab.data.dataset import prepare
from sparklab.data.lesson import lesson
from sparklab.data.pack import epoch_order
from sparklab.model.hub import TINY_PATH


def train(steps: int, seed: int = 0) -> list[float]:
    """Losses of the first ``steps`` updates of the LoRA lesson, in fp32."""
    # The recipe: 1,000 orders in words, each with its JSON.
    recipe = lesson("lora", seed, Path(tempfile.mkdtemp(prefix="plain-loop-")))

    # The data: documents back to back in rows of at most 640 tokens; labels are -100 except on the assistant's own tokens.
    tokenizer = AutoTokenizer.from_pretrained(TINY_PATH)
    rows = prepare(recipe, tokenizer).train_rows
    updates = math.ceil(len(rows) * recipe.epochs)
    warmup = math.ceil(recipe.warmup_share * updates)

    # The model: a frozen base with a pair of small matrices, A and B, beside every linear layer.
    model = AutoModelForCausalLM.from_pretrained(TINY_PATH, dtype=torch.float32)
    config = LoraConfig(r=recipe.rank, lora_alpha=recipe.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    torch.manual_seed(seed)  # A starts random, B at zero: at first the adapters change nothing
    model = get_peft_model(model, config)
    model.train()
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=recipe.learning_rate, betas=recipe.betas, weight_decay=0.0)

    losses = []
    for step in range(steps):
        # Learning rate: up in a straight line, then down along a cosine.
        falling = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (updates - warmup)))
        scale = step / warmup if step < warmup else falling
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * scale

        # One packed row. A token may look at earlier tokens of its own document and at nothing else.
        epoch, place = divmod(step, len(rows))
        row = rows[epoch_order(len(rows), seed, epoch)[place]]
        ids = torch.tensor([row.input_ids])
        document = torch.repeat_interleave(torch.arange(row.documents), torch.tensor(row.boundaries).diff())
        allowed = (document[:, None] == document[None, :]).tril()
        mask = torch.zeros(allowed.shape).masked_fill(~allowed, float("-inf"))[None, None]

        # Forward: logits for every token; the loss of token t is about token t + 1, and only where there is a label.
        logits = model(input_ids=ids, position_ids=torch.tensor([row.position_ids]), attention_mask=mask).logits[0]
        loss = F.cross_entropy(logits[:-1].float(), torch.tensor(row.labels[1:]), ignore_index=-100)

        # Backward, clip, step.
        loss.backward()
        torch.nn.utils.clip_grad_norm_(adapters, recipe.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for number, value in enumerate(train(options.steps, options.seed), 1):
        print(f"step {number:4d}  loss {value:.4f}")
