"""The script that proves the engine on a GPU runs on a CPU, is right there, and says what is not."""

import sys

import pytest
from support import ROOT

from sparklab.model.families import FAMILIES

sys.path.insert(0, str(ROOT / "benchmarks"))
import cuda_parity

PARITY = ["box", "liger's trial", "llama bf16", "gemma2 fp32", "NF4 llama bf16", "adapters on experts qwen3_moe fp32", "long documents", "dropout",
          "adamw_8bit", "loss bfloat16, scale 1, cap 30.0", "answers gemma2 lora", "files full", "waits llama lora",
          "memory lora, all checkpointed"]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PARITY)
def test_a_case_of_cuda_parity_is_right_on_a_cpu(name):
    found, wrong = cuda_parity.one(cuda_parity.cases()[name])
    assert found and not wrong


def test_cuda_parity_has_every_family():
    assert set(cuda_parity.FAMILIES) == set(FAMILIES)
    assert {f"{family} {dtype}" for family in FAMILIES for dtype in ("fp32", "bf16")} < set(cuda_parity.cases())


@pytest.mark.filterwarnings("ignore")
def test_what_is_wrong_or_fails_is_a_line_and_the_next_case_runs(tmp_path, monkeypatch, capsys):
    def broken(folder):
        raise ValueError("a | b\nand more")

    ours = cuda_parity.our_update

    def doubled(*given):
        update = ours(*given)
        return cuda_parity.Update(update.loss, {name: 2 * gradient for name, gradient in update.gradients.items()})

    picked = {name: cuda_parity.cases()[name] for name in ("llama fp32", "llama bf16", "box")}
    monkeypatch.setattr(cuda_parity, "cases", lambda: {"broken": broken, **picked})
    monkeypatch.setattr(cuda_parity, "our_update", doubled)
    assert not cuda_parity.run([], tmp_path / "told.md")
    rows = {cells[1].strip(): cells[3].strip() for line in (tmp_path / "told.md").read_text().splitlines() if len(cells := line.split("|")) == 6}
    assert rows["broken"].startswith("ValueError: a / b and more [") and "one" in rows["broken"]
    assert rows["llama fp32"].startswith("over ") and rows["llama bf16"] == "farther off than stock" and not rows["box"]
    assert capsys.readouterr().out.count("FAIL") == 3
    assert cuda_parity.run(["box"], tmp_path / "told.md") and not cuda_parity.run(["nothing"], tmp_path / "told.md")
