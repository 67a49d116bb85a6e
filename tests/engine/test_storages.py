"""The storage tracker against torch's own account of what the allocator gave out, where no dispatch mode looks on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from sparklab.engine.gauge import asked_bytes
from sparklab.engine.loss import chunked_cross_entropy
from sparklab.engine.storages import StorageTracker


def profiled_peak(step: Callable[[], object]) -> int:
    """Most bytes that are there at once beyond those from before, by the profiler's list of allocations."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def tracked_peak(step: Callable[[], object]) -> int:
    with StorageTracker() as tracker:
        step()
    return tracker.peak_bytes


class Slope(torch.autograd.Function):
    """A backward pass written in Python, with an addition of its own that is no accumulation."""

    @staticmethod
    def forward(ctx, tensor: Tensor) -> Tensor:  # noqa: ARG004 - torch hands it over
        return tensor.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # noqa: ARG004
        return grad + grad * 2


def tied() -> object:
    """The weight is looked up and multiplied with: its two gradients become one."""
    weight = torch.ones(1000, 64, requires_grad=True)
    hidden = torch.nn.functional.embedding(torch.arange(8), weight)
    chunked_cross_entropy(hidden, weight, torch.arange(8), 8.0).backward()
    return weight.grad


def three_ways() -> object:
    """One tensor goes three ways."""
    leaf = torch.ones(1000, 64, requires_grad=True)
    tensor = leaf * 2
    (tensor * 2 + tensor * 3 + tensor * 4).mean().backward()
    return leaf.grad


def passed_by() -> object:
    """A residual stream: the gradient that goes past the branch is the one that goes into it, and must not be added to in place."""
    leaf = torch.ones(1000, 64, requires_grad=True)
    stream = leaf * 2
    (stream + stream * 3).mean().backward()
    return leaf.grad


def written_in_python() -> object:
    leaf = torch.ones(1000, 64, requires_grad=True)
    tensor = leaf * 2
    (Slope.apply(tensor) * 2 + tensor * 3).mean().backward()
    return leaf.grad


def again() -> object:
    """Two micro-batches."""
    leaf = torch.ones(1000, 64, requires_grad=True)
    for _ in range(2):
        (leaf * leaf).mean().backward()
    return leaf.grad


@pytest.mark.parametrize("step", [tied, three_ways, passed_by, written_in_python, again])
def test_gradients_add_up_as_they_do_when_nobody_looks(step: Callable[[], Tensor]) -> None:
    assert tracked_peak(step) == pytest.approx(profiled_peak(step), rel=0.002)  # the loss and its like are a few bytes
    plain = step()
    with StorageTracker():
        looked_at = step()
    assert torch.equal(plain, looked_at)


def test_what_was_asked_of_cuda_s_allocator_is_read_without_what_it_rounds_up(monkeypatch):
    told = {"requested_bytes.all.peak": 7, "allocated_bytes.all.peak": 9, "allocated_bytes.all.current": 5}
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: told)
    assert [asked_bytes(torch.device("cuda"), when) for when in ("peak", "current")] == [7.0, 5.0]
