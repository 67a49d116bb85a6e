"""The engine's benchmarks run: their arithmetic, and their code at the size of a toy."""

import sys

import pytest
from support import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))


def test_the_needed_arithmetic_of_an_8b():
    """4 x (6.98 billion in the layers + 0.53 in the head), and attention's 7 x T x 4096 x 32."""
    import engine_cuda

    assert engine_cuda.needed_flops(engine_cuda.LLAMA_8B, 2048) == 4 * (6_979_321_856 + 4096 * 128256) + 7 * 2048 * 4096 * 32


@pytest.mark.filterwarnings("ignore")
def test_a_toy_goes_through_the_cuda_benchmark():
    import engine_cuda

    found = engine_cuda.one("toy", 3, "ours")
    assert found["tokens_per_second"] > 0 and found["share"] > 0


def test_every_case_of_the_issue_is_there():
    import engine_cuda

    assert len(engine_cuda.CASES) == 8
    assert {method for _, method, _, _ in engine_cuda.CASES.values()} == {"lora", "qlora"}
