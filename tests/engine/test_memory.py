"""When memory runs out: told from other errors, and the same update in smaller pieces."""

import errno

import pytest
import torch

from sparklab.data.dataset import make_row
from sparklab.data.template import Document
from sparklab.engine.memory import is_out_of_memory, longest, pieces
from sparklab.engine.trainer import collate


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
