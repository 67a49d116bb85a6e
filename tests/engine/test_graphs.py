"""Rows replayed from recordings: the same weights as rows computed plainly. CUDA's recorder is stood in for by one that does the work again."""

import gc
import types
import weakref
from contextlib import nullcontext

import pytest
import torch
from transformers import TrainerCallback

from sparklab.box import Box
from sparklab.data.dataset import make_row
from sparklab.data.template import Document
from sparklab.engine import attention, graphs, trainer
from sparklab.engine.fast import ready_model
from sparklab.engine.graphs import Graphs
from sparklab.engine.trainer import PackedTrainer
from sparklab.model.blank import blank_base
from sparklab.planner.recipe import Recipe

TOKENS = 64
# full of one document; nearly full of several, twice; too short; of many short ones; full of two
ROWS = [[64], [30, 20, 9], [10, 50], [12, 9], [3] * 20, [40, 24], [5, 57], [64], [33, 31]] * 2


def make_rows(lengths=ROWS, seed=0):
    draw = torch.Generator().manual_seed(seed)

    def document(tokens):
        ids = torch.randint(3, 500, (tokens,), generator=draw).tolist()
        return Document(ids, [-100, *[-100 if place % 3 else token for place, token in enumerate(ids[1:])]])

    return [make_row([document(tokens) for tokens in row]) for row in lengths]


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Trains a small model on the rows and returns the trainer; borders that lie on the device are read there, as CUDA's kernel does."""
    plainly = attention.packed_attention

    def reading(*tensors, cu_seq_lens_q, **options):
        ends = getattr(cu_seq_lens_q, attention.RECORDED, None)
        return plainly(*tensors, cu_seq_lens_q=cu_seq_lens_q if ends is None else ends.unique_consecutive(), **options)

    monkeypatch.setattr(attention, "packed_attention", reading)
    monkeypatch.setattr(trainer, "filled", lambda tokens, on_gpu: tokens)  # as on a GPU
    (tmp_path / "config.json").write_text(
        '{"model_type": "llama", "vocab_size": 500, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,'
        ' "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 128}'
    )

    def run(record, rows=None, held_out=(), kind=PackedTrainer, **changes):
        changes = {"micro_batches_per_update": 2, "dtype": "fp32", "held_out": 0.0, "learning_rate": 1e-2, **changes}
        recipe = Recipe(model=str(tmp_path), data="none", micro_batch_tokens=TOKENS, max_length=TOKENS, **changes)
        torch.manual_seed(1)
        model = ready_model(recipe, Box.detect(), blank_base)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(0, 0.05)
        trainer = kind(model, recipe, tmp_path, rows or make_rows(), held_out, callback=TrainerCallback())
        if record is not None:
            trainer.graphs = Graphs(trainer._learned, TOKENS, alone=recipe.micro_batches_per_update == 1, record=record)
        trainer.train()
        return trainer

    return run


class Recorder:
    """Replays by doing the work again; counts."""

    def __init__(self):
        self.recorded = self.replayed = 0

    def __call__(self, work):
        self.recorded += 1

        def replay():
            self.replayed += 1
            with torch.enable_grad():  # a graph does not ask
                work()

        return replay


def weights(trainer):
    return torch.cat([parameter.detach().flatten() for parameter in trainer._learned])


@pytest.mark.parametrize(
    "changes", [{}, {"micro_batches_per_update": 1}, {"micro_batches_per_update": 3, "epochs": 2.0}, {"targets": "attention"}, {"loss": "full"}]
)
def test_replayed_rows_train_the_same_weights(train, monkeypatch, changes):
    monkeypatch.setattr(graphs, "MUST_GAIN", float("inf"))
    recorder = Recorder()
    plain, replayed = train(None, **changes), train(recorder, **changes)
    assert plain.graphs.why_not == "there is no CUDA device" and not replayed.graphs.why_not
    assert recorder.replayed > 4 and recorder.recorded >= 2
    assert torch.equal(plain._learned[0].isfinite(), replayed._learned[0].isfinite())
    assert float((weights(plain) - weights(replayed)).norm() / weights(plain).norm()) < 1e-6
    logged = [[line["loss"] for line in trainer.state.log_history if "loss" in line] for trainer in (plain, replayed)]
    assert logged[0] == pytest.approx(logged[1], rel=1e-5)


def test_evaluation_lets_go_and_training_records_again(train, monkeypatch):
    monkeypatch.setattr(graphs, "MUST_GAIN", float("inf"))
    rows, recorder = make_rows([[30, 30]] * 12), Recorder()
    held = make_rows([[20, 10]], seed=1)
    options = {"rows": rows, "held_out": held, "micro_batches_per_update": 1, "eval_every": 6}
    replayed = train(recorder, **options)
    assert recorder.recorded == 4 and recorder.replayed == 2 * (12 - 3)
    plain = train(None, **options)
    assert float((weights(plain) - weights(replayed)).norm() / weights(plain).norm()) < 1e-6


def test_a_recording_that_does_not_pay_is_dropped(train, monkeypatch):
    monkeypatch.setattr(graphs, "MUST_GAIN", 0.0)
    recorder = Recorder()
    trainer = train(recorder, rows=make_rows([[30, 30]] * 12))
    assert recorder.replayed == 2 * 3 and not trainer.graphs._rows and not trainer.graphs.why_not


def test_what_cannot_be_recorded_trains_plainly(train, caplog):
    def refusing(work):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    with caplog.at_level("INFO"):
        trainer = train(refusing)
    assert trainer.graphs.why_not == "operation not permitted when stream is capturing" and trainer.graphs.why_not in caplog.text
    assert torch.equal(weights(trainer), weights(train(None)))


def test_rows_of_more_documents_get_more_room():
    run = Graphs([], TOKENS, alone=False, record=Recorder())
    kinds = [run._kind({"input_ids": torch.zeros(1, sum(row)), "cu_seq_lens_q": torch.tensor([0, *torch.tensor(row).cumsum(0)])}) for row in ROWS[:6]]
    assert kinds == [(True, 1), (False, 16), (False, 16), None, (False, 32), (False, 16)]


@pytest.mark.parametrize(("changes", "said"), [({"method": "full"}, "all weights learn"), ({"checkpoint_layers": 1}, "layers are checkpointed"),
                                               ({"dropout": 0.1}, "dropout"), ({"engine": "stock"}, "the engine is stock")])  # fmt: skip
def test_who_is_not_recorded_at_all(train, monkeypatch, changes, said):
    trainer = train(None, rows=make_rows([[64]]), **changes)
    monkeypatch.setattr(type(trainer.args), "device", torch.device("cuda"))
    assert said in trainer._not_recorded()


def test_only_one_kernel_reads_borders_on_the_device():
    borders = torch.tensor([0, 8], dtype=torch.int32)
    setattr(borders, attention.RECORDED, borders)
    q = torch.zeros(1, 2, 8, 4)
    with pytest.raises(RuntimeError, match="where they end"):
        attention.packed_attention(torch.nn.Module(), q, q, q, cu_seq_lens_q=borders, softcap=30.0)


def test_answers_are_given_without_recorded_rows_in_memory(monkeypatch):
    from types import SimpleNamespace

    from sparklab.run import session

    done = []
    monkeypatch.setattr(session, "answer", lambda *_: done.append("answered") or ["yes"])
    run = SimpleNamespace(model=None, tokenizer=None, recipe=SimpleNamespace(answer_tokens=4),
                          reporter=SimpleNamespace(trainer=SimpleNamespace(graphs=SimpleNamespace(make_way=lambda: done.append("dropped")))))  # fmt: skip
    assert session.Session._answer(run, [[1]]) == ["yes"] and done == ["dropped", "answered"]


def of_rows(places):
    """Full rows, and at these places such as are too short; taken in this order."""
    return make_rows([[20] if place in places else [30, 30] for place in range(40)])


class InOrder(PackedTrainer):
    """Takes the rows as they stand, and notes whether each met a recording that held memory while it was computed plainly."""

    def _get_train_sampler(self, train_dataset=None):
        return range(len(self.train_dataset))

    def compute_loss(self, *given, **options):
        before = self.graphs._served
        loss = super().compute_loss(*given, **options)
        self.beside = [*getattr(self, "beside", []), self.graphs.held and self.graphs._served == before]
        return loss


def test_a_row_that_is_computed_plainly_holds_no_second_ones_activations(train, monkeypatch):
    monkeypatch.setattr(graphs, "MUST_GAIN", float("inf"))
    recorder = Recorder()
    lengths = [[30, 30]] * 8 + [[64]] * 8 + [[20]] + [[30, 30]] * 6 + [[3] * 20] * 6
    trainer = train(recorder, rows=make_rows(lengths), kind=InOrder, micro_batches_per_update=1)
    assert len(trainer.beside) == len(lengths) and not any(trainer.beside)
    assert recorder.recorded == 2 * 3  # at first, after the short row, and with more room
    plain = train(None, rows=make_rows(lengths), kind=InOrder, micro_batches_per_update=1)
    assert float((weights(plain) - weights(trainer)).norm() / weights(plain).norm()) < 1e-6


def test_recordings_that_make_way_too_often_are_given_up(train, monkeypatch):
    monkeypatch.setattr(graphs, "MUST_GAIN", float("inf"))
    recorder = Recorder()
    often = train(recorder, rows=of_rows(range(5, 40, 2)), kind=InOrder)
    assert recorder.recorded == 2 * graphs.FEWEST_DROPS and "too little is trained" in often.graphs.why_not
    assert not train(Recorder(), rows=of_rows({39}), kind=InOrder).graphs.why_not


def test_a_timed_row_is_not_one_that_was_recorded(train, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(graphs, "MUST_GAIN", 2.0)
    monkeypatch.setattr(graphs, "time", types.SimpleNamespace(perf_counter=lambda: clock.__setitem__(0, clock[0] + 1) or clock[0]))

    class Slow(Recorder):
        def __call__(self, work):
            clock[0] += 100
            return super().__call__(work)

    trainer = train(Slow(), rows=of_rows({4, 6}), kind=InOrder, micro_batches_per_update=1)  # each of rows 3, 5 and 7 is recorded anew
    (trial,) = trainer.graphs._trials.values()
    assert trial.plain == [1.0] * 3 and trial.replayed == [1.0] * 2 and not trial.lost


def test_out_of_memory_beside_a_recording_takes_the_update_again_without(train, monkeypatch):
    monkeypatch.setattr(graphs, "MUST_GAIN", float("inf"))

    class Tight(InOrder):
        def compute_loss(self, *given, **options):
            loss = super().compute_loss(*given, **options)
            if self.graphs.held and self.graphs._served > 6:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return loss

    options = {"rows": of_rows({}), "micro_batches_per_update": 2}
    tight, plain = train(Recorder(), kind=Tight, **options), train(None, kind=InOrder, **options)
    assert tight.graphs.why_not == "memory ran out" and tight.row_tokens == TOKENS
    assert float((weights(plain) - weights(tight)).norm() / weights(plain).norm()) < 1e-6


def test_what_a_failed_recording_held_is_given_back_before_the_row_is_computed(monkeypatch):
    made, said = [], []

    def refusing(work):
        raise RuntimeError("CUDA out of memory")

    class Watched(graphs._Recorded):
        def __init__(self, *given):
            super().__init__(*given)
            made.append(weakref.ref(self))

    monkeypatch.setattr(graphs, "_Recorded", Watched)
    run = Graphs([torch.nn.Parameter(torch.ones(2))], 8, alone=False, record=refusing, clear=lambda: said.append("cleared"))
    monkeypatch.setattr(Graphs, "_give_back", lambda self: said.append(made[0]() is None))
    assert run._recorded((True, 1), lambda inputs: run.learned[0] * 2, torch.device("cpu")) is None
    assert said == ["cleared", True] and run.why_not == "CUDA out of memory"


def test_nothing_that_was_recorded_keeps_its_graph():
    learned = [torch.nn.Parameter(torch.ones(2))]
    row = graphs._Recorded((True, 1), 8, torch.device("cpu"), learned, alone=False)
    row.record(lambda inputs: learned[0] * 2, lambda work: work(), lambda work: (work(), work)[1])
    assert row.hidden.grad_fn is None


def test_recording_warms_up_on_one_stream_and_may_not_wait_for_the_device(monkeypatch):
    mode, streams, seen = [0], [], []
    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    fakes = {
        "synchronize": lambda: None, "empty_cache": lambda: None, "current_stream": lambda: stream, "Stream": lambda: streams.append(1) or stream,
        "stream": lambda side: nullcontext(), "get_sync_debug_mode": lambda: mode[0], "set_sync_debug_mode": lambda to: mode.__setitem__(0, to),
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    graphs._side.cache_clear()
    try:
        graphs._on_the_side(lambda: seen.append(mode[0]))
        with pytest.raises(RuntimeError):
            graphs._on_the_side(lambda: (_ for _ in ()).throw(RuntimeError("called a synchronizing CUDA operation")))
    finally:
        graphs._side.cache_clear()
    assert seen == ["error"] and mode == [0] and streams == [1]


def test_all_of_a_model_is_in_training_mode_though_its_base_came_in_evaluation_mode(train):
    class FromFiles(PackedTrainer):
        def __init__(self, model, *given, **options):
            model.get_base_model().eval()  # as from_pretrained leaves it
            super().__init__(model, *given, **options)

        def compute_loss(self, model, *given, **options):
            assert all(module.training for module in model.modules())
            return super().compute_loss(model, *given, **options)

    assert train(None, rows=make_rows([[64]]), kind=FromFiles).state.global_step == 1


def test_a_loss_that_is_still_there_does_not_hold_the_recording():
    learned = torch.nn.Parameter(torch.ones(3))
    run = Graphs([learned], 4, alone=True, record=Recorder())
    inputs = {"input_ids": torch.zeros(1, 4, dtype=torch.long), "position_ids": torch.arange(4)[None], "cu_seq_lens_q": torch.tensor([0, 4], dtype=torch.int32)}
    for _ in range(4):
        with run.row(inputs):
            states = run.states(lambda row: learned * row["position_ids"][0, :, None], inputs)
            loss = (learned * torch.arange(4)[:, None] if states is None else states).sum()
            loss.backward()
    (row,) = (weakref.ref(row) for row in run._rows.values())
    run.drop()
    gc.collect()  # the stand-in's work refers to itself
    assert loss.grad_fn is not None and row() is None
