"""Rehearsals: every phase of real work on small models against the plan's lines for it, and the process that does it."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from small_model import SHAPE, box, recipe
from support import ROOT

import sparklab as sl
from sparklab.engine.memory import is_out_of_memory
from sparklab.errors import ModelError, RunFailed
from sparklab.planner import plan
from sparklab.planner.cost import flops_per_token
from sparklab.planner.ledger import PHASES
from sparklab.planner.recipe import Recipe
from sparklab.run import rehearsal
from sparklab.run.perform import Performance, cap_memory
from sparklab.units import GIB, NA

# (changes of the shape, changes of the recipe)
GRID = [
    ({}, {}),
    ({}, {"dtype": "fp32", "adapter_dtype": "fp32", "checkpoint_layers": "all", "max_length": 48}),
    ({"num_key_value_heads": 2}, {"method": "qlora", "max_length": 256, "rank": 8}),
    ({"vocab_size": 4000, "tie_word_embeddings": True}, {"method": "full", "loss": "full", "micro_batches_per_update": 2}),
    ({"num_key_value_heads": 8, "hidden_size": 192}, {"checkpoint_layers": 2, "micro_batch_tokens": 1280, "targets": "attention"}),
]


def test_the_grid_has_every_method():
    assert len(GRID) == 5
    assert {changes.get("method", "lora") for _, changes in GRID} == {"full", "lora", "qlora"}


@pytest.mark.parametrize(("shape", "changes"), GRID)
def test_every_phase_is_as_planned(tmp_path, shape, changes):
    asked = recipe(tmp_path, shape, **changes)
    told = []
    answer = Performance(asked, tmp_path / "run", lambda **fields: told.append(fields["phase"])).run(NA)
    planned = plan(asked, box=box())
    phases = {phase.name: phase for phase in rehearsal._phases(planned, box(), answer["phases"])}
    expected = [phase for phase in PHASES if phase != "merge" or asked.method != "full"]
    assert told == list(phases) == expected == [phase for phase in PHASES if phase in planned.phases]
    for name, phase in phases.items():
        # What the process grows by while saving is Python's own, some hundred KB, and these models are small.
        measured = answer["phases"][name]["tensors_bytes"]
        assert measured == pytest.approx(phase.planned_bytes, rel=0.03 if asked.method == "qlora" else 0.02), name
        assert phase.measured_bytes - measured == (answer["phases"][name]["host_growth_bytes"] if name == "save" else 0)
    assert answer["phases"]["save"]["host_growth_bytes"] < 4 * 2**20
    assert len(answer["step_seconds"]) == 3 and all(seconds > 0 for seconds in answer["step_seconds"])


def test_a_blank_base_is_the_real_one_but_for_its_numbers():
    from sparklab.box import Box
    from sparklab.engine import attention
    from sparklab.model import load
    from sparklab.model.blank import blank_base

    attention.register()
    for method in ("full", "lora", "qlora"):
        asked = Recipe(model="tiny", data="none", method=method, dtype="bf16")
        real, blank = (load.load_model(asked, Box.detect(), attention.NAME, make) for make in (load.load_base, blank_base))

        def described(model):
            tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
            return {name: (tensor.shape, tensor.dtype, tensor.device.type, tensor.requires_grad) for name, tensor in tensors}

        assert described(real) == described(blank)
        for (name, one), (_, other) in zip(real.named_buffers(), blank.named_buffers(), strict=True):
            torch.testing.assert_close(one, other, msg=name)  # rotary frequencies are no random numbers
        ids = torch.arange(8)[None]
        hidden = load.causal_lm(blank).get_decoder()(input_ids=ids, cu_seq_lens_q=torch.tensor([0, 8], dtype=torch.int32)).last_hidden_state
        assert hidden.isfinite().all() and hidden.std() > 0.1


def test_merging_streamed_is_merging(tmp_path):
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlamaForCausalLM

    from sparklab.engine.merge import adapters_of, write_streamed

    torch.manual_seed(0)
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(**{**SHAPE, "num_hidden_layers": 1})), LoraConfig(r=4, lora_alpha=12, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapters = adapters_of(model)
    assert len(adapters) == 7
    base = {name: model.get_submodule("base_model.model." + name).base_layer.weight.detach().clone() for name in adapters}
    shapes = {name: tuple(weight.shape) for name, weight in base.items()}
    write_streamed(tmp_path / "merged.safetensors", shapes, torch.float32, lambda name: adapters[name].merge_into(base[name]))
    merged, expected = load_file(tmp_path / "merged.safetensors"), model.merge_and_unload()
    assert set(merged) == set(shapes)
    for name, weight in merged.items():
        torch.testing.assert_close(weight, expected.get_submodule(name).weight.detach(), rtol=1e-5, atol=1e-6)


SCRIPT = """
import json, sys
import sparklab as sl
from sparklab.planner.recipe import Recipe
told = []
rehearsal = sl.rehearse(Recipe.from_dict(json.loads(sys.argv[1])), on_phase=told.append)
assert not {"torch", "transformers"} & set(sys.modules)
print(json.dumps([told, rehearsal.to_dict(), str(rehearsal), rehearsal._repr_html_(), sl.Box.detect().sources["runtime_bytes"]]))
"""


def test_rehearse_in_a_process_of_its_own(tmp_path, calibrated):
    asked = recipe(tmp_path)
    done = subprocess.run([sys.executable, "-W", "error", "-c", SCRIPT, json.dumps(asked.to_dict())], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told, content, text, html, source = json.loads(done.stdout)
    assert told == list(content["phases"]) == ["load", "train", "evaluate", "sample", "save", "merge"]
    planned = plan(asked)
    assert set(planned.to_dict()) < set(content)
    assert content["phases"]["train"]["ratio"] == pytest.approx(1, rel=0.01)
    assert content["measured_gib"] == max(phase["measured_gib"] for phase in content["phases"].values())
    assert content["reserved_gib"] is None and content["phases"]["train"]["reserved_gib"] is None
    assert content["phases"]["train"]["process_gib"] > 0.2  # the interpreter and torch, whatever the model
    rate = content["tokens_per_second_measured"]
    assert content["tflops"] == pytest.approx(flops_per_token(planned.ledger) * rate / 1e12)
    assert 0 < content["roofline_share"] < 1 and content["seconds"] > 0
    assert "evaluate" in text and "tokens/s" in text and "<table" in html and "evaluate" in html
    # what was learned is used, and said to be measured; a model this small says nothing of how fast larger ones will be
    (entry,) = json.loads(calibrated.read_text())["boxes"].values()
    assert set(entry) == {"runtime_bytes"} and 0.2 * GIB < entry["runtime_bytes"] < 2 * GIB
    assert source == "measured" and sl.Box.detect().runtime_bytes == entry["runtime_bytes"]
    assert not list(calibrated.parent.glob("rehearsal-*"))


def test_sampling_leaves_no_holes(tmp_path, calibrated):
    """The process holds what its tensors hold and little more, however often the cache grows: 169 MiB once took 9 GiB of a box."""
    rehearsal = sl.rehearse(Recipe(model="tiny", data="none", micro_batch_tokens=128, max_length=128, answer_tokens=64))
    phases = {phase.name: phase for phase in rehearsal.phases}
    grown = phases["sample"].process_bytes - phases["evaluate"].process_bytes
    assert grown < 4 * phases["sample"].measured_bytes  # 1.3 times; 24 with the holes


@pytest.fixture
def started(monkeypatch, tmp_path):
    """The processes that rehearsals start."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    processes = []
    popen = subprocess.Popen

    def start(*arguments, **options):
        processes.append(popen(*arguments, **options))
        return processes[-1]

    monkeypatch.setattr(rehearsal.subprocess, "Popen", start)
    return processes


def test_an_interrupt_ends_the_process(tmp_path, started):
    def interrupt(phase):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sl.rehearse(recipe(tmp_path), on_phase=interrupt)
    (process,) = started
    assert process.returncode is not None


def test_out_of_memory_is_one_error_that_names_the_phase(tmp_path, started):
    """The process may have 0.1 GiB of tensors; the logits of this row alone are three times that."""
    asked = recipe(tmp_path, {"vocab_size": 8000}, loss="full", micro_batch_tokens=4096)
    runtime = sl.Box.detect().runtime_bytes
    with pytest.raises(RunFailed, match=r"ran out of memory .* in the phase 'train'"):
        sl.rehearse(asked, box=box(memory_bytes=runtime + 0.1 * GIB, runtime_bytes=runtime), force=True)
    (process,) = started
    assert process.returncode is not None


def test_errors_of_the_process_are_the_users_errors(tmp_path, monkeypatch):
    planned = plan(recipe(tmp_path), box=box())
    log = tmp_path / "log"
    log.write_text("one\ntwo")
    assert "two" in str(rehearsal._death(planned, "train", "", 1, log))
    killed = rehearsal._death(planned, "sample", "", -signal.SIGKILL, log)
    assert "killed" in killed.fact and "'sample'" in killed.fact
    from sparklab.model.blank import blank_base

    with pytest.raises(ModelError, match="no-such-type"):
        blank_base(recipe(tmp_path, {"model_type": "no-such-type"}), torch.bfloat16, torch.device("cpu"), "sdpa")
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
    assert not is_out_of_memory(RuntimeError("shapes differ"))


def test_the_process_is_capped(monkeypatch):
    import resource

    asked = []
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limits: asked.append((kind, limits[0])))
    cap_memory(2 * GIB, 0.5 * GIB)
    ((kind, limit),) = asked
    assert kind == resource.RLIMIT_DATA and 1 * GIB < limit < 8 * GIB


def test_the_benchmark_runs_small(tmp_path):
    """The command that rehearses real sizes on a CUDA device, on a toy with its base in four bits."""
    script = ROOT / "benchmarks" / "rehearse_spark_sizes.py"
    command = [sys.executable, script, "--small", "--only", "70b-qlora", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "rehearse_spark_sizes_small.json").read_text())
    assert row["phases"]["train"]["ratio"] == pytest.approx(1, rel=0.05)
    assert "| 70b-qlora |" in (tmp_path / "rehearse_spark_sizes_small.md").read_text()
