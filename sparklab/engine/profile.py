"""Where the time of an update goes: each kernel counted once, by kind, and what no kernel takes under ``other``, so that the parts sum to the update.

torch's profiler tells every operation with the one it was called from. On a CPU an operation's own time is its time without those it calls; on
CUDA it is the time of the kernels it launched. An operation belongs to the first kind that it, or whatever called it, is known to be: what
the loss, the attention or the optimizer do inside is theirs, matrix products too. Being watched makes the launching on CUDA several times as
long, and a graph's kernels have no caller: so rows are launched one by one there, and the kernels' time is held against an update that nobody watched.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from typing import Any, Final

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

DATA, OPTIMIZER = "sparklab: data wait", "sparklab: optimizer"
"""Marks that the Trainer sets round waiting for rows and round shortening the gradients."""
WITH_CALLERS: Final[dict[str, tuple[str, ...]]] = {
    "data wait": (DATA,),
    "loss": ("crossentropy", "cross_entropy", "nll_loss", "log_softmax"),
    "attention": ("attention", "_blockwise"),
    "optimizer": ("optimizer",),
}
"""Kinds by words of an operation's name or of that of any operation it was called from, the first that fits."""
ALONE: Final = {
    "matrix products": re.compile(r"(^|_)(add|b|baddb|grouped_)?mm(_|$)|matmul|linear|gemm|einsum|conv"),
    "unpacking 4 bits": re.compile(r"dequantize"),
}
"""Kinds by an operation's own name, without its library; every other operation works number by number, or moves numbers."""
KINDS: Final = ("matrix products", "attention", "elementwise", "loss", "optimizer", "unpacking 4 bits", "data wait", "other")


def kind_of(event: Any, on_device: bool = False) -> str:
    """The kind of an operation, or nothing where it is none (a mark, a Python function) and its own time is no kernel's. ``on_device``: it is one's:
    Python functions launch Triton's.
    """
    caller = event
    while caller is not None:
        name = caller.name.lower()
        for kind, words in WITH_CALLERS.items():
            if any(word in name for word in words):
                return kind
        caller = caller.cpu_parent
    library, _, name = event.name.lower().rpartition("::")
    if not on_device and (not library or library.startswith("autograd")):
        return ""
    return next((kind for kind, words in ALONE.items() if words.search(name)), "elementwise")


def seconds_by_kind(events: Iterable[Any], on_device: bool) -> dict[str, float]:
    """Own time of all operations, by kind; waiting for data is the host's on any device."""
    found = dict.fromkeys(KINDS, 0.0)
    for event in events:
        if event.device_type.name != "CPU":
            continue  # a kernel: counted with the operation that launched it
        waits = on_device and event.name == DATA
        own = event.cpu_time_total if waits else event.self_device_time_total if on_device else event.self_cpu_time_total
        kind = kind_of(event, on_device) if own else ""
        if kind and (waits or not on_device or kind != "data wait"):
            found[kind] += own / 1e6
    return found


class StepProfile(TrainerCallback):  # type: ignore[misc]  # transformers is not typed
    """Profiles ``count`` updates after the first ``first``, from the end of one to the end of another. ``seconds``: of one of them, by kind.

    ``unwatched``: tells what an update takes without the profiler, which on CUDA is what the kernels' time is held against.
    """

    def __init__(self, first: int, count: int, device: torch.device, unwatched: Callable[[], float]) -> None:
        self.first, self.count, self.device, self.unwatched = first, count, device, unwatched
        self.seconds: dict[str, float] = {}
        self._profile: Any = None
        self._began = 0.0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step == self.first:
            self._begin()
        elif state.global_step == self.first + self.count and self._profile is not None:
            self._end()

    def _begin(self) -> None:
        self._synchronize()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.device.type == "cuda" else [])]
        self._profile = profile(activities=activities, acc_events=True)
        self._profile.__enter__()
        self._began = time.perf_counter()

    def _end(self) -> None:
        self._synchronize()
        whole = time.perf_counter() - self._began
        self._profile.__exit__(None, None, None)
        on_device = self.device.type == "cuda"
        whole = self.unwatched() * self.count if on_device else whole
        self.seconds = closed(seconds_by_kind(self._profile.events(), on_device), whole, self.count)
        self._profile = None

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def closed(by_kind: dict[str, float], whole: float, updates: int) -> dict[str, float]:
    """Seconds of one update; what is left of the whole is ``other``: Python, launching, waiting. Where kernels overlap they are scaled to the whole."""
    told = sum(by_kind.values())
    scale = min(1.0, whole / told) if told else 1.0
    parts = {kind: by_kind.get(kind, 0.0) * scale for kind in KINDS if kind != "other"}
    parts["other"] = max(0.0, whole - sum(parts.values()))
    return {kind: parts[kind] / updates for kind in KINDS}
