"""The engine's benchmarks run: their arithmetic, and their code at the size of a toy."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from support import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))


def test_the_needed_arithmetic_of_an_8b():
    """4 x (6.98 billion in the layers + 0.53 in the head), and attention's 7 x T x 4096 x 32."""
    import engine_cuda

    assert engine_cuda.needed_flops(engine_cuda.LLAMA_8B, 2048) == 4 * (6_979_321_856 + 4096 * 128256) + 7 * 2048 * 4096 * 32


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ["toy", "toy-qlora", "toy-mixture"])
def test_a_toy_goes_through_our_side_of_the_cuda_benchmark(case):
    import engine_cuda

    found = engine_cuda.one(case, 3, "ours")
    assert found["tokens_per_second"] > 0 and found["share"] > 0
    assert found["versions"]["torch"] and found["planned_gib"] > 0


def test_every_case_of_the_issue_is_there():
    import engine_cuda

    assert set(engine_cuda.CASES) - set(engine_cuda.TOYS) == {
        "8b-lora-2048", "8b-lora-8192", "8b-qlora-2048", "8b-qlora-8192", "32b-lora-2048", "70b-qlora-2048", "30b-a3b-lora-2048",
    }  # fmt: skip
    assert {method for _, method, _, _ in engine_cuda.CASES.values()} == {"lora", "qlora"}


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".venv" / "trl" / "trl").is_dir(), reason="TRL is not in .venv/trl (`make .venv/trl`)")
def test_a_toy_goes_through_the_peers_sides(tmp_path):
    """TRL's own code; and Unsloth's side of the script, with a stand-in that has its two functions' signatures and does what PEFT does."""
    (tmp_path / "unsloth.py").write_text(STAND_IN)
    script = "import engine_cuda; print([engine_cuda.one(*given)['tokens_per_second'] > 0 for given in GIVEN])"
    for given in ([("toy", 3, "trl"), ("toy-qlora", 3, "trl"), ("toy-mixture", 3, "trl")], [("toy", 3, "unsloth"), ("toy-mixture", 3, "unsloth")]):
        paths = os.pathsep.join(map(str, (ROOT, ROOT / "benchmarks", ROOT / ".venv" / "trl", tmp_path)))
        environ = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
        done = subprocess.run([sys.executable, "-c", script.replace("GIVEN", repr(given))], capture_output=True, text=True, env=environ, check=False)
        assert done.stdout.strip().endswith(str([True] * len(given))), done.stderr[-3000:]


STAND_IN = """
class FastLanguageModel:
    @staticmethod
    def from_pretrained(model_name="", max_seq_length=2048, dtype=None, load_in_4bit=True, load_in_8bit=False, load_in_16bit=False, full_finetuning=False,
                        token=None, use_gradient_checkpointing="unsloth", use_exact_model_name=False, random_state=3407, local_files_only=False):
        from transformers import AutoModelForCausalLM, AutoTokenizer
        return AutoModelForCausalLM.from_pretrained(model_name, dtype=dtype), AutoTokenizer.from_pretrained(model_name)

    @staticmethod
    def get_peft_model(model, r=16, target_modules=(), lora_alpha=16, lora_dropout=0.0, bias="none", use_gradient_checkpointing="unsloth", random_state=3407):
        from peft import LoraConfig, get_peft_model
        return get_peft_model(model, LoraConfig(r=r, target_modules=target_modules, lora_alpha=lora_alpha, task_type="CAUSAL_LM"))
"""


@pytest.mark.filterwarnings("ignore")
def test_the_random_checkpoint_is_read_whole(tmp_path, monkeypatch):
    import engine_cuda
    from transformers import AutoModelForCausalLM, AutoTokenizer

    engine_cuda.write_checkpoint(engine_cuda.TOY, tmp_path)
    model, told = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    assert 0.015 < float(model.model.layers[1].mlp.up_proj.weight.float().std()) < 0.025
    assert AutoTokenizer.from_pretrained(tmp_path).convert_tokens_to_ids("t7") == 7
    monkeypatch.setattr(engine_cuda.shutil, "disk_usage", lambda path: SimpleNamespace(free=1e5))
    engine_cuda.write_checkpoint(engine_cuda.TOY, tmp_path)  # is there already
    with pytest.raises(SystemExit, match="its checkpoint of random weights takes 0 GB and 0 GB of disk are free"):
        engine_cuda.write_checkpoint(engine_cuda.TOY, tmp_path / "new")


@pytest.mark.filterwarnings("ignore")
def test_a_peer_that_runs_out_of_memory_checkpoints_all_layers(monkeypatch):
    import engine_cuda

    tried = []

    def peer(config, method, tokens, layers, updates, folder):
        tried.append(layers)
        if layers == "none":
            raise torch.OutOfMemoryError
        return [0.5] * updates

    monkeypatch.setattr(engine_cuda, "trl", peer)
    monkeypatch.setitem(engine_cuda.CASES, "toy", (*engine_cuda.CASES["toy"][:3], "fits"))
    assert engine_cuda.one("toy", 3, "trl")["checkpointed"] == "all" and tried == ["none", "all"]


def test_what_fails_is_a_row(tmp_path):
    import engine_cuda

    broken = tmp_path / "python"
    for code, stderr, said in ((1, "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", "out of memory: torch.OutOfMemoryError"),
                               (1, "ValueError: a | b", "ValueError: a | b"), (137, "", "no word")):  # fmt: skip
        broken.write_text(f"#!/bin/sh\necho '{stderr}' >&2\nexit {code}\n")
        broken.chmod(0o755)
        assert said in engine_cuda.measure(engine_cuda.started("toy", "ours", 2, str(broken), None))["failed"]
    assert "No such file" in engine_cuda.measure(engine_cuda.started("toy", "ours", 2, str(tmp_path / "nowhere"), None))["failed"]
    good = {"tokens_per_second": 100.0, "least": 90.0, "most": 110.0, "share": 0.5, "ceiling_tflops": 90.0, "planned_gib": float("nan"),
            "allocated_gib": 1.0, "reserved_gib": 2.0, "checkpointed": "none", "versions": {}}  # fmt: skip
    line = engine_cuda.row("toy", "trl", [{**good, "tokens_per_second": 40.0}, {"failed": "ValueError: a | b"}], [good])
    assert line == "| toy | trl | none | 40 (90 to 110) | 2.50x | 50.0% | 90 |  | 1.00 | 2.00 | 1 of 2 failed: ValueError: a / b |"
    assert engine_cuda.row("toy", "trl", [{"failed": "x"}], [good]).count("|") == line.count("|")
    assert "needs a GPU" in engine_cuda.lacking("unsloth", sys.executable, "toy") or torch.cuda.is_available()
