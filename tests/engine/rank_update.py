"""One rank of a few updates of a small model: prints losses, gradient norms and the adapters at the end. Run by test_rank_updates.py."""

import json
import os
import sys
import warnings
from pathlib import Path

warnings.simplefilter("ignore")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import torch  # noqa: E402
from family_configs import SMALL  # noqa: E402
from transformers import PrinterCallback, TrainerCallback  # noqa: E402
from whole_step import BOX, base, documents, recipe_of, set_adapters  # noqa: E402

from sparklab.data.dataset import make_row  # noqa: E402
from sparklab.engine.fast import ready_model  # noqa: E402
from sparklab.engine.trainer import PackedTrainer  # noqa: E402
from sparklab.errors import RunFailed  # noqa: E402
from sparklab.model.load import causal_lm  # noqa: E402


class Notes(TrainerCallback):
    """Losses and gradient norms of all updates; nothing is saved."""

    def __init__(self):
        self.updates = []

    def on_log(self, args, state, control, logs=None, **_):
        if "loss" in logs:
            self.updates.append((logs["loss"], logs["grad_norm"]))

    def on_step_end(self, args, state, control, **_):
        control.should_save = control.should_evaluate = False


def trainer_of(folder, poisoned):
    """Ten rows of very different lengths and shares of learned tokens: a mean of means would be another number."""
    changes = {"learning_rate": 1e-2, "warmup_share": 0.0, "clip_norm": 1.0, "max_steps": None, "micro_batches_per_update": 4}
    recipe = recipe_of(folder / f"model-{os.environ.get('RANK', 'alone')}", SMALL["llama"], **changes)
    rows = [make_row(documents(lengths=lengths)) for lengths in ((40, 9), (5,), (60,), (3, 3, 30), (12,), (50, 20), (7,), (33,), (8, 8), (21,))]
    if poisoned:
        rows[2].input_ids[1] = 2
    model = ready_model(recipe, BOX, base)
    set_adapters(model)
    if poisoned:  # token 2 gives no number; it is in the third row alone
        hook = lambda module, arguments, output: torch.where((arguments[0] == 2)[..., None], torch.nan, output)  # noqa: E731
        causal_lm(model).get_input_embeddings().register_forward_hook(hook)
    trainer = PackedTrainer(model, recipe, folder / "run", rows, (), callback=Notes())
    trainer.remove_callback(PrinterCallback)
    return trainer


def main(folder):
    trainer = trainer_of(folder, poisoned=False)
    trainer.train()
    notes = next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, Notes))
    weights = {name: parameter.tolist() for name, parameter in trainer.model.named_parameters() if parameter.requires_grad and "layers.1" in name}
    found = {"ranks": trainer.accelerator.num_processes, "updates": notes.updates, "weights": weights}
    trainer = trainer_of(folder, poisoned=True)
    try:
        trainer.train()
    except RunFailed as error:
        found["failed"] = error.fact
    print(json.dumps(found))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


torch.set_num_threads(1)
main(Path(sys.argv[1]))
