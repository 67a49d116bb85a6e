"""A training row as two CUDA graphs: its forward and its backward pass are recorded once and from then on launched as a whole.

Where a GPU computes faster than Python can tell it what to do (small models, short rows, fast chips), it waits: a LoRA row of 2,048 tokens of an 8B
is 4,100 kernels, 138 ms of work on an H200 and 250 ms of launching (benchmarks/LOG.md). A graph has the same kernels on the same memory.

Recorded are the decoder's two passes; the loss, whose work depends on how many tokens are supervised, stays outside. A graph has one shape, so a row is
filled up to the recipe's ``micro_batch_tokens`` by one more document; where documents begin and end is read on the device, by the one kernel that
takes them all. Where several rows make an update, gradients are added up in tensors that stay; where one does, they are what its second graph leaves.

Whether replaying pays is found out on the first rows, by the clock; what cannot be recorded (soft caps, sinks, positions that are turned document by
document, kernels that ask the device a question) is trained as before, and so is a row that is much shorter, whatever the reason. A recording holds a
row's activations for as long as it is there, and a plan counts them once: it goes before anything else needs as much, and is made again afterwards,
unless that happens too often to pay.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor, nn

from sparklab.engine.attention import RECORDED
from sparklab.text import first_line

FULL_ENOUGH: Final = 7 / 8  # of a row's tokens: what is filled up costs as much as what was there
FEWEST_DOCUMENTS: Final = 16  # that a graph has room for; room grows by doubling
MUST_GAIN: Final = 0.97  # of the plain way's time; else the recording is dropped, and its memory with it
TIMED_ROWS: Final = 2  # each way, after one that does not count: it loads kernels, or is recorded; the fastest counts
SERVES: Final = 16  # rows that a recording must have been replayed for on average, or none is made any more; it costs about three rows
FEWEST_DROPS: Final = 3  # before that is judged
ROWS_OF_TRIAL: Final = 2 * (TIMED_ROWS + 1)

Record = Callable[[Callable[[], None]], Callable[[], None]]
"""Takes work, and gives what does it again on the same memory."""
Decode = Callable[[dict[str, Tensor]], Tensor]
"""A row's last hidden states [T, H]."""
Kind = tuple[bool, int]
"""Whether a row is one document without filling, and else for how many there is room."""


class _Recorded:
    """One shape of row: what goes in, what comes out, and the two passes between."""

    def __init__(self, kind: Kind, tokens: int, device: torch.device, learned: Sequence[nn.Parameter], alone: bool) -> None:
        whole, room = kind
        self.tokens, self.learned, self.alone = tokens, learned, alone
        self.count = torch.arange(tokens, device=device)[None]
        self.ends = torch.full((room + 1,), tokens, dtype=torch.int32, device=device)
        borders = torch.tensor([0, tokens], dtype=torch.int32)
        if not whole:
            setattr(borders, RECORDED, self.ends)
        self.inputs = {"input_ids": torch.zeros_like(self.count), "position_ids": self.count.clone(), "cu_seq_lens_q": borders}
        self.told: Tensor
        self.hidden: Tensor
        self.d_hidden: Tensor
        self.gradients: list[Tensor | None] = []

    def record(self, decode: Decode, warm: Callable[[Callable[[], None]], None], record: Record) -> None:
        """Does both passes once so that all kernels are loaded, then records them."""

        def forward() -> None:
            self.hidden = decode(self.inputs)

        def backward() -> None:
            found = torch.autograd.grad(self.hidden, self.learned, self.d_hidden, allow_unused=True)
            if self.alone:
                # as the parameters lie, which autograd sees to elsewhere, and fused optimizers rely on
                self.gradients = [new if new is None else new.contiguous() for new in found]
                return
            pairs = [(total, new) for total, new in zip(self.gradients, found, strict=True) if total is not None]
            torch._foreach_add_([total for total, _ in pairs], [new for _, new in pairs])

        def first() -> None:
            forward()
            self.d_hidden = torch.zeros_like(self.hidden)
            found = torch.autograd.grad(self.hidden, self.learned, self.d_hidden, allow_unused=True)
            if not self.alone:
                self.gradients = [None if new is None else torch.zeros_like(parameter) for new, parameter in zip(found, self.learned, strict=True)]
            del self.hidden

        warm(first)
        self.forward, self.backward = record(forward), record(backward)
        if hasattr(self, "hidden"):  # its graph would hold the parameters to the stream of the recording, where plain rows then add up too
            self.hidden = self.hidden.detach()

    def fill(self, inputs: dict[str, Tensor]) -> None:
        """Lays a row into the places that the graphs read."""
        tokens, borders = inputs["input_ids"].shape[1], inputs["cu_seq_lens_q"]
        for name, rest in (("input_ids", None), ("position_ids", self.count)):
            self.inputs[name][:, :tokens].copy_(inputs[name])
            if tokens < self.tokens:
                self.inputs[name][:, tokens:] = 0 if rest is None else rest[:, : self.tokens - tokens]
        self.told = torch.nn.functional.pad(borders, (0, len(self.ends) - len(borders)), value=self.tokens)  # kept: one pool's device may read it later
        self.ends.copy_(self.told, non_blocking=True)

    def own_totals(self) -> None:
        """Makes the tensors that the graphs add to the gradients of what learns, with what is there already."""
        pairs = [(parameter, total) for parameter, total in zip(self.learned, self.gradients, strict=True) if total is not None]
        if not pairs or pairs[0][0].grad is pairs[0][1]:
            return
        torch._foreach_zero_([total for _, total in pairs])
        for parameter, total in pairs:
            if parameter.grad is not None:
                total.copy_(parameter.grad)
            parameter.grad = total

    def hand_out(self) -> None:
        """Makes what the second graph left the gradients of what learns. The next row writes over them: the update must be done by then."""
        for parameter, new in zip(self.learned, self.gradients, strict=True):
            if new is not None:
                parameter.grad = new


class _Replay(torch.autograd.Function):
    """Hands a recorded row to autograd: the states of its first ``tokens``, and the gradients to where they are added up."""

    @staticmethod
    def forward(ctx: Any, _: Tensor, row: _Recorded, tokens: int) -> Tensor:
        ctx.row, ctx.tokens = row, tokens
        row.forward()
        return row.hidden.detach()[:tokens]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        row, ctx.row = ctx.row, None  # the loss outlives this, and would hold the recording
        row.d_hidden[: ctx.tokens].copy_(grad)
        row.d_hidden[ctx.tokens :].zero_()
        row.backward()
        if row.alone:
            row.hand_out()
        return None, None, None


class _Trial:
    """How long rows of one kind take, plainly and replayed."""

    def __init__(self) -> None:
        self.plain: list[float] = []
        self.replayed: list[float] = []
        self.lost = False

    @property
    def wants_plain(self) -> bool:
        return len(self.plain) <= TIMED_ROWS  # the first one loads kernels, and does not count

    @property
    def decided(self) -> bool:
        return self.lost or len(self.replayed) >= TIMED_ROWS

    def note(self, seconds: float, was_replayed: bool) -> None:
        (self.replayed if was_replayed else self.plain).append(seconds)
        self.lost = self.lost or (self.decided and min(self.replayed) > MUST_GAIN * min(self.plain[1:]))


class Graphs:
    """The recorded rows of one training run.

    ``why_not`` is "" while rows may be recorded, else the reason in words; it stays once it is there. ``alone``: each row is an update.
    ``clear`` lets go of what a forward pass that broke off has left in the model.
    """

    def __init__(
        self,
        learned: Sequence[nn.Parameter],
        tokens: int,
        why_not: str = "",
        *,
        alone: bool,
        record: Record | None = None,
        clear: Callable[[], None] = lambda: None,
    ) -> None:
        self.learned, self.tokens, self.why_not, self.alone = tuple(learned), tokens, why_not, alone
        self._record, self._clear = record, clear
        self._served = self._dropped = 0
        self._rows: dict[Kind, _Recorded] = {}
        self._trials: dict[Kind, _Trial] = {}
        self._now: tuple[_Trial, bool] | None = None  # of the row under way
        self._pool: Any = None

    def states(self, decode: Decode, inputs: dict[str, Tensor]) -> Tensor | None:
        """The last hidden states [T, H] of a row that is trained on; None where they are to be computed plainly."""
        kind = None if self.why_not else self._kind(inputs)
        trial = None if kind is None else self._trials.setdefault(kind, _Trial())
        if kind is None or trial is None or trial.lost:
            self.make_way()
            return None
        self._now = (trial, not trial.wants_plain)
        if trial.wants_plain:
            self.drop()
            return None
        row = self._rows.get(kind)
        if row is None:
            self._now = None  # recording takes its time, whenever it comes
            row = self._recorded(kind, decode, inputs["input_ids"].device)
        if row is None:
            return None
        self._served += 1
        row.fill(inputs)
        if not self.alone:
            row.own_totals()
        anchor = torch.empty(0, requires_grad=True)  # or autograd would not come back
        states: Tensor = _Replay.apply(anchor, row, inputs["input_ids"].shape[1])  # type: ignore[no-untyped-call]
        return states

    @contextmanager
    def row(self, inputs: dict[str, Tensor]) -> Iterator[None]:
        """Around a row's forward and backward pass: times it while the trial of its kind lasts."""
        self._now = None
        kind = None if self.why_not else self._kind(inputs)
        if kind is None or (kind in self._trials and self._trials[kind].decided):
            yield
            return
        self._wait()
        began = time.perf_counter()
        yield
        self._judge(began)

    def _judge(self, began: float) -> None:
        if self._now is not None:
            self._wait()
            trial, was_replayed = self._now
            trial.note(time.perf_counter() - began, was_replayed)
            if trial.lost:
                self.drop()

    @property
    def held(self) -> bool:
        """Whether a recording holds memory."""
        return bool(self._rows)

    def make_way(self) -> None:
        """Drops what is recorded for something else that needs the memory; where that happens too often, nothing is recorded any more."""
        if self._rows:
            self._dropped += 1
            self.drop()
            if self._dropped >= FEWEST_DROPS and self._served < SERVES * self._dropped:
                self.refuse("too little is trained between what they must make way for")

    def drop(self) -> None:
        """Lets go of all recordings and their memory; they are made again when a row asks for them."""
        if self._rows:
            self._wait()
            self._rows.clear()
            self._give_back()

    def _give_back(self) -> None:
        self._pool = None
        if self._record is None:
            torch._C._cuda_clearCublasWorkspaces()  # those of the stream that was recorded on: nothing else may need them again
            torch.cuda.empty_cache()

    def refuse(self, why: str) -> None:
        """Nothing is recorded any more."""
        self.why_not = self.why_not or why
        self.drop()

    def _kind(self, inputs: dict[str, Tensor]) -> Kind | None:
        tokens, documents = inputs["input_ids"].shape[1], len(inputs["cu_seq_lens_q"]) - 1
        if not FULL_ENOUGH * self.tokens <= tokens <= self.tokens:
            return None
        several = {room: trial for (whole, room), trial in self._trials.items() if not whole}
        if tokens == self.tokens and documents == 1 and all(trial.lost for trial in several.values()):  # or one recording does for both
            return True, 1
        room = max([FEWEST_DOCUMENTS, *several])
        while room < documents + 1:
            room *= 2
        return False, room

    def _recorded(self, kind: Kind, decode: Decode, device: torch.device) -> _Recorded | None:
        self.drop()  # of another kind
        row = _Recorded(kind, self.tokens, device, self.learned, self.alone)
        try:
            if self._record is None:
                self._pool = torch.cuda.graph_pool_handle()
                row.record(decode, _on_the_side, self._on_cuda)
            else:
                row.record(decode, lambda work: work(), self._record)
        except RuntimeError as error:  # of a kernel that cannot be recorded, or of memory
            reason = first_line(error, 200)
        else:
            self._rows[kind] = row
            return row
        # Out of the handler, whose error holds what the failed passes made: the row is computed plainly now, and needs as much.
        logging.getLogger(__name__).info("rows are not recorded as CUDA graphs: %s", reason)
        del row
        self._clear()
        self.refuse(reason)
        self._give_back()
        return None

    def _on_cuda(self, work: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # threads of the panel and the guard may ask CUDA what they like
        with torch.cuda.graph(graph, pool=self._pool, stream=_side(), capture_error_mode="thread_local"):
            work()
        replay: Callable[[], None] = graph.replay
        return replay

    def _wait(self) -> None:
        if self._record is None:
            torch.cuda.synchronize()


@cache
def _side() -> Any:
    """The one stream on which is recorded: cuBLAS has, and keeps, a workspace for each stream that it is used on."""
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]


def _on_the_side(work: Callable[[], None]) -> None:
    """On the stream that is recorded on. Memory is kept by stream: what plain rows left is given back first, or there would be twice as much.

    Whatever waits for the device raises RuntimeError here. While a graph is recorded CUDA would, after which torch's allocator thinks for ever
    that one is being recorded, and fails with the next ``empty_cache()``.
    """
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    side = _side()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), _waiting_is_an_error():
        work()
    torch.cuda.current_stream().wait_stream(side)


@contextmanager
def _waiting_is_an_error() -> Iterator[None]:
    was = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls the mode a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(was)
