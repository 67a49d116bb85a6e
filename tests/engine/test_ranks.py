"""Rows under several ranks: each is seen once in an epoch, by one of them, in the order that one process alone would have."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from sparklab.data.dataset import make_row
from sparklab.data.pack import epoch_order
from sparklab.data.template import Document
from sparklab.engine.loss import chunked_cross_entropy, full_cross_entropy
from sparklab.engine.trainer import EpochSampler, FilledUp, collate, training_arguments
from sparklab.errors import RecipeError
from sparklab.model.load import pick_device
from sparklab.planner.recipe import Recipe


def make_rows(count):
    return [make_row([Document([5 + row, 6, 7], [-100, 6, 7])]) for row in range(count)]


def share(count, world, rank, epoch):
    """Indices of the rows that accelerate gives one rank; ``count`` for the row that fills up."""
    loader = DataLoader(FilledUp(make_rows(count)), batch_size=1, sampler=EpochSampler(count, 3, world), collate_fn=collate)
    prepared = prepare_data_loader(loader, num_processes=world, process_index=rank, put_on_device=False)
    prepared.set_epoch(epoch)  # as Trainer does
    return [batch["input_ids"][0, 0].item() - 5 if (batch["labels"] != -100).any() else count for batch in prepared]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_each_row_once_by_one_rank(count, world):
    for epoch in (0, 1):
        shares = [share(count, world, rank, epoch) for rank in range(world)]
        assert shares == [epoch_order(count, 3, epoch, world)[rank::world] for rank in range(world)]
        together = sorted(row for each in shares for row in each)
        assert together == [*range(count), *[count] * (-count % world)]
        assert len({len(each) for each in shares}) == 1  # or one would wait for the others for ever
        one_alone = epoch_order(count, 3, epoch)
        for update in range(-(-count // world)):  # and an update is over the same rows as in one process
            assert {each[update] for each in shares} - {count} == set(one_alone[update * world : (update + 1) * world])


@pytest.mark.parametrize("loss", [chunked_cross_entropy, full_cross_entropy])
def test_the_row_that_fills_up_teaches_nothing(loss):
    rows = FilledUp(make_rows(3))
    assert len(rows) == 3 and rows[2].input_ids == [7, 6, 7]
    blank = collate([rows[3]])
    hidden, head = torch.ones(1, 4, requires_grad=True), torch.ones(9, 4, requires_grad=True)
    value = loss(hidden, head, blank["labels"][0], 10.0)
    value.backward()
    assert value.item() == 0 and not hidden.grad.any() and not head.grad.any()


def test_ranks_that_cannot_share_an_update_are_refused(monkeypatch, tmp_path):
    recipe = Recipe(model="tiny", data="none", micro_batches_per_update=6)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(RecipeError, match="4 processes cannot share 6 rows an update"):
        training_arguments(recipe, tmp_path, 100, held_out=False)


@pytest.mark.slow
def test_two_processes_of_the_trainer(tmp_path):
    """The real thing: PackedTrainer's own loader in two processes that found each other."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = Path(__file__).with_name("rank.py")
    environment = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    ranks = [
        subprocess.Popen([sys.executable, str(script), "5", str(tmp_path)], stdout=subprocess.PIPE, text=True,
                         env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]  # fmt: skip
    found = []
    for process in ranks:
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0
        found.append(json.loads(out.strip().splitlines()[-1]))
    for one in found:
        assert (one["ranks"], one["accumulated"], one["updates"]) == (2, 1, 3)  # 5 rows, 2 an update, one from each rank
    for epoch in (0, 1):
        order = epoch_order(5, 3, epoch, 2)
        for rank, one in enumerate(found):
            learned = [(row, 2) if row < 5 else (-5, 0) for row in order[rank::2]]
            assert [tuple(each) for each in one["seen"][epoch]] == learned


def test_a_process_has_one_gpu_of_several(tmp_path, monkeypatch):
    """Left to itself, Trainer would share a row among all that it sees, by DataParallel; and every process would load its model onto the first."""
    recipe = Recipe(model="tiny", data="none")
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 4))
    assert training_arguments(recipe, tmp_path, 100, held_out=False)._n_gpu == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device() == torch.device("cuda", 0)
    for rank, index in (("1", 1), ("3", 1)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert pick_device() == torch.device("cuda", index)
