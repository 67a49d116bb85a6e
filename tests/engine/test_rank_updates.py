"""Two processes make the updates of one: losses, gradient norms and adapters; and one bad row, which one of them has, ends both."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    plain = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    found = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    places = [{}, *({**found, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2))]
    command = [sys.executable, str(Path(__file__).with_name("rank_update.py"))]
    processes = [
        subprocess.Popen([*command, str(tmp_path / str(len(place)))], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**plain, **place})
        for place in places
    ]
    told = []
    for process in processes:
        out, err = process.communicate(timeout=400)
        assert process.returncode == 0, err[-2000:]
        told.append(json.loads(out.strip().splitlines()[-1]))
    one, *two = told
    assert (one["ranks"], [each["ranks"] for each in two]) == (1, [2, 2])
    assert len(one["updates"]) == 3
    for each in two:
        for (loss, norm), (expected, expected_norm) in zip(each["updates"], one["updates"], strict=True):
            assert loss == pytest.approx(expected, rel=1e-6)
            assert norm == pytest.approx(expected_norm, rel=1e-5)
        assert each["weights"].keys() == one["weights"].keys() and len(one["weights"]) == 14
        for name, rows in one["weights"].items():
            for row, expected in zip(each["weights"][name], rows, strict=True):
                assert row == pytest.approx(expected, rel=1e-3, abs=1e-6)
        assert "not finite" in each["failed"] and "update" in each["failed"]
    assert "in row 2;" in one["failed"]
    assert sum("in row 2;" in each["failed"] for each in two) == 1  # the rank that has it names it, the other all of its own
