"""One of several ranks: prints the rows that Trainer and accelerate hand it in each of two epochs, as JSON. Started by test_ranks.py."""

import json
import os
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from sparklab.data.dataset import make_row
from sparklab.data.template import Document
from sparklab.engine.trainer import PackedTrainer
from sparklab.planner.recipe import Recipe

rows = [make_row([Document([5 + row, 6, 7], [-100, 6, 7])]) for row in range(int(sys.argv[1]))]
folder = Path(sys.argv[2])
config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=64)
recipe = Recipe(model="tiny", data="none", method="full", micro_batches_per_update=2, seed=3)
trainer = PackedTrainer(LlamaForCausalLM(config), recipe, folder / os.environ["RANK"], rows, (), callback=TrainerCallback())
loader = trainer.get_train_dataloader()
seen = []
for epoch in range(2):
    loader.set_epoch(epoch)  # as Trainer does
    seen.append([[batch["input_ids"][0, 0].item() - 5, int((batch["labels"] != -100).sum())] for batch in loader])
arguments = trainer.args
found = {"ranks": trainer.accelerator.num_processes, "accumulated": arguments.gradient_accumulation_steps, "updates": arguments.max_steps, "seen": seen}
print(json.dumps(found))
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
