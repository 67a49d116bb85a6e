"""Where an update's time goes: the parts sum to the update, each operation counts once, and what is made heavy shows where it belongs."""

import time
from types import SimpleNamespace

import pytest
import torch
from family_configs import SMALL
from torch.profiler import ProfilerActivity, profile
from transformers import PrinterCallback, TrainerCallback
from whole_step import BOX, base, documents, recipe_of, rows_of

from sparklab.engine.fast import ready_model
from sparklab.engine.profile import DATA, KINDS, StepProfile, closed, seconds_by_kind
from sparklab.engine.trainer import PackedTrainer
from sparklab.model.load import causal_lm

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers has opinions on token numbers and rotary factors of configs this small


class Quiet(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        control.should_save = control.should_evaluate = False


def profiled(folder, heavy=None, slow_data=0.0, **changes):
    """Seconds by kind of an update, and what the whole took from outside. ``heavy`` runs inside the first layer."""
    recipe = recipe_of(folder / "model", SMALL["llama"], max_steps=4, epochs=4.0, **changes)
    model = ready_model(recipe, BOX, base)
    if heavy is not None:

        def hook(*_):
            for _ in range(1 if heavy is HEAVY["other"] else 6):
                heavy()

        causal_lm(model).get_decoder().layers[0].register_forward_hook(hook)
    profiler = StepProfile(2, 2, torch.device("cpu"), lambda: 0.0)
    trainer = PackedTrainer(model, recipe, folder / "run", rows_of(documents(), True, 1), (), callback=Quiet())
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(profiler)
    if slow_data:
        collate = trainer.data_collator
        trainer.data_collator = lambda rows: (time.sleep(slow_data), collate(rows))[1]
    trainer.train()
    return profiler.seconds


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])  # on a CPU attention is flash attention's kernels in one, products in the other
def test_the_parts_sum_to_the_update(tmp_path, dtype):
    seconds = profiled(tmp_path, dtype=dtype)
    assert tuple(seconds) == KINDS
    assert all(seconds[kind] > 0 for kind in ("matrix products", "attention", "elementwise", "loss", "optimizer", "data wait", "other"))
    assert seconds["unpacking 4 bits"] == 0
    # nothing was scaled: on a CPU operations do not overlap, and Python takes its share
    assert seconds["other"] > 0.02 * sum(seconds.values())


SIDE = torch.randn(700, 700)
MANY = torch.randn(6_000_000)
HEAVY = {
    "matrix products": lambda: SIDE @ SIDE @ SIDE,
    "elementwise": lambda: MANY.mul(2.0).exp(),
    "attention": lambda: torch.nn.functional.scaled_dot_product_attention(*[MANY[: 8 * 700 * 64].view(1, 8, 700, 64)] * 3),
    "loss": lambda: torch.nn.functional.cross_entropy(MANY.view(-1, 1000), torch.zeros(6000, dtype=torch.long)),
    "other": lambda: time.sleep(0.1),
}


@pytest.mark.parametrize("kind", sorted(HEAVY))
def test_what_is_heavy_shows_where_it_belongs(kind, tmp_path):
    seconds = profiled(tmp_path, HEAVY[kind])
    assert max(seconds, key=lambda name: seconds[name]) == kind


def test_slow_data_shows(tmp_path):
    seconds = profiled(tmp_path, slow_data=0.2)
    assert 0.2 <= seconds["data wait"] == max(seconds.values())


def test_4_bit_weights_are_told_apart(tmp_path):
    assert profiled(tmp_path, method="qlora")["unpacking 4 bits"] > 0


def test_an_operation_counts_once():
    """A product is called linear, addmm, mm ...: its time is there once, and what a kind calls is that kind's."""
    linear = torch.nn.Linear(400, 400)
    x = torch.randn(2000, 400, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as seen:
        began = time.perf_counter()
        with torch.profiler.record_function(DATA):
            x.detach() @ linear.weight.detach()
        torch.nn.functional.cross_entropy(linear(x), torch.zeros(2000, dtype=torch.long)).backward()
        whole = time.perf_counter() - began
    seconds = seconds_by_kind(seen.events(), on_device=False)
    assert sum(seconds.values()) <= whole
    assert sum(seconds.values()) > 0.5 * whole
    assert seconds["matrix products"] > seconds["loss"] > 0 and seconds["data wait"] > 0


def test_a_kernel_that_a_python_function_launched_counts_on_a_device():
    """Triton's kernels, which no operation of a library stands for; and what only watches or waits does not."""

    def event(name, device_ms, caller=None):
        return SimpleNamespace(name=name, cpu_parent=caller, device_type=SimpleNamespace(name="CPU"), cpu_time_total=7e3,
                               self_cpu_time_total=5e3, self_device_time_total=1e3 * device_ms)  # fmt: skip

    loss = event("_ChunkedCrossEntropy", 0)
    events = [event("aten::mm", 8), event("LigerSiLUMulFunctionBackward", 3), event("aten::mm", 2, loss), event("AddmmBackward0", 0), event(DATA, 1)]
    seconds = seconds_by_kind(events, on_device=True)
    assert {kind: value for kind, value in seconds.items() if value} == pytest.approx(
        {"matrix products": 8e-3, "elementwise": 3e-3, "loss": 2e-3, "data wait": 7e-3}
    )
    assert seconds_by_kind(events, on_device=False)["elementwise"] == 0  # a Python function's own time on a CPU is Python's


def test_books_close_by_arithmetic():
    parts = closed({"matrix products": 3.0, "loss": 1.0}, whole=6.0, updates=2)
    assert parts == {**dict.fromkeys(KINDS, 0.0), "matrix products": 1.5, "loss": 0.5, "other": 1.0}
    overlapping = closed({"matrix products": 6.0, "loss": 2.0}, whole=4.0, updates=1)
    assert (overlapping["matrix products"], overlapping["loss"], overlapping["other"]) == (3.0, 1.0, 0.0)
