"""When memory runs out: told from other errors, and the same update in smaller pieces."""

import errno
import weakref
from types import SimpleNamespace

import pytest
import torch
from family_configs import SMALL
from transformers import PrinterCallback, Trainer, TrainerCallback
from whole_step import BOX, base, documents, recipe_of, rows_of

from sparklab.data.dataset import make_row
from sparklab.data.template import Document
from sparklab.engine import trainer
from sparklab.engine.fast import ready_model
from sparklab.engine.memory import give_back, is_out_of_memory, longest, pieces
from sparklab.engine.trainer import PackedTrainer, collate
from sparklab.model.load import decoder_layers


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), MemoryError(), OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        RuntimeError("CUDA error: out of memory"), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA driver error: NV_ERR_NO_MEMORY"), RuntimeError("cudaErrorMemoryAllocation"), RuntimeError("std::bad_alloc"),
    ],
    ids=str,
)  # fmt: skip
def test_it_is_known_whoever_says_it(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), OSError(errno.ENOSPC, "No space left on device"), ValueError("out of memory"), KeyboardInterrupt()]
)
def test_other_errors_are_not_taken_for_it(error):
    assert not is_out_of_memory(error)


def row_of(*lengths):
    start = iter(range(1000))
    return make_row([Document(ids := [next(start) for _ in range(length)], [-100, *ids[1:]]) for length in lengths])


@pytest.mark.parametrize(
    ("lengths", "most", "expected"),
    [((3, 4, 5), 12, [12]), ((3, 4, 5), 11, [7, 5]), ((3, 4, 5), 5, [3, 4, 5]), ((2, 2, 9, 1, 1), 4, [4, 9, 2]), ((7,), 3, [7]), ((1, 1, 1, 1), 2, [2, 2])],
)
def test_pieces_are_whole_documents_in_their_order(lengths, most, expected):
    inputs = collate([row_of(*lengths)])
    cut = pieces(inputs, most)
    assert [piece["input_ids"].shape[1] for piece in cut] == expected
    for name in ("input_ids", "labels", "position_ids"):
        assert torch.equal(torch.cat([piece[name] for piece in cut], dim=1), inputs[name])
    for piece in cut:
        assert piece["cu_seq_lens_q"][0] == 0 and piece["cu_seq_lens_q"][-1] == piece["input_ids"].shape[1] and piece["cu_seq_lens_q"].dtype == torch.int32
        assert all(piece["position_ids"][0, start] == 0 and piece["labels"][0, start] == -100 for start in piece["cu_seq_lens_q"][:-1])
    assert longest([row_of(*lengths), row_of(1)]) == (sum(lengths), max(lengths))


@pytest.mark.filterwarnings("ignore")  # transformers has opinions on token numbers of configs this small
def test_nothing_of_the_pass_that_failed_is_held(tmp_path, monkeypatch):
    """Memory runs out between layers that are computed together: their outputs wait, and with their graph all activations before them."""
    recipe = recipe_of(tmp_path / "model", SMALL["qwen3"], retry="smaller")
    model = ready_model(recipe, BOX, base)
    first, *_, last = decoder_layers(model)
    gone, left, failures = [], [], ["out of memory"]

    def fail(*_):
        if failures:
            raise torch.OutOfMemoryError(failures.pop())

    watching = first.register_forward_hook(lambda module, given, out: weakref.finalize(out.untyped_storage(), gone.append, "activations") and None)
    last.self_attn.q_norm.register_forward_pre_hook(fail)
    monkeypatch.setattr(trainer, "give_back", lambda: (give_back(), left.extend(gone), watching.remove()))
    ours = PackedTrainer(model, recipe, tmp_path / "run", rows_of(documents(), True, 1), (), callback=TrainerCallback())
    ours.remove_callback(PrinterCallback)
    ours.train()
    assert left == ["activations"]


def test_the_borders_stay_where_numbers_can_be_read(tmp_path, monkeypatch):
    """accelerate and Trainer send rows to the device; each layer's attention reads the borders, and on the device would wait for it."""
    recipe = recipe_of(tmp_path / "model", SMALL["llama"])
    trainer = PackedTrainer(ready_model(recipe, BOX, base), recipe, tmp_path / "run", rows_of(documents(), True, 1), (), callback=TrainerCallback())
    borders, asked = torch.tensor([0, 3], dtype=torch.int32), []
    there = SimpleNamespace(cpu=lambda: asked.append(1) or borders)
    monkeypatch.setattr(Trainer, "get_batch_samples", lambda self, *given: ([{"input_ids": borders, "cu_seq_lens_q": there}], torch.tensor(7)))
    rows, count = trainer.get_batch_samples(iter([]), 1, torch.device("cpu"))
    assert rows[0]["cu_seq_lens_q"] is borders and asked == [1]
    assert type(count) is float and count == 7
    monkeypatch.setattr(Trainer, "_prepare_input", lambda self, data: {name: tensor.to("meta") for name, tensor in data.items()})
    ready = trainer._prepare_inputs(rows[0])
    assert ready["cu_seq_lens_q"] is borders and ready["input_ids"].is_meta
