"""The rehearsal itself, in a process of its own: ``python -m sparklab.run.perform``, started by :mod:`sparklab.run.rehearsal`.

One line of JSON comes in on standard input, and the phases and the answer go into the file it names, a JSON object a line. The input stays
open as long as somebody waits for the answer: when it closes, this process ends, and all its memory comes back.
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import os
import random
import resource
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparklab.box import Box
from sparklab.box.meter import read_memory
from sparklab.box.power import PowerMeter
from sparklab.data.dataset import Row, longest_micro_batch
from sparklab.engine import merge
from sparklab.engine.answer import continuations
from sparklab.engine.cap import cap_device
from sparklab.engine.fast import ready_model
from sparklab.engine.gauge import Gauge
from sparklab.engine.graphs import ROWS_OF_TRIAL, Graphs
from sparklab.engine.memory import is_out_of_memory
from sparklab.engine.profile import StepProfile
from sparklab.engine.trainer import PackedTrainer, mean_loss
from sparklab.errors import SparklabError
from sparklab.model import load
from sparklab.model.anatomy import Anatomy
from sparklab.model.blank import blank_base
from sparklab.planner.items import answers_at_once
from sparklab.planner.recipe import Recipe
from sparklab.run import guard
from sparklab.text import first_line
from sparklab.units import KIB, MIB, NA, is_na, jsonable

WARM_UPDATES: Final = 2  # at least: the first makes the optimizer's states, the second is the first whole one; a CPU's storages are followed in both
TIMED_UPDATES: Final = 3
M_MMAP_THRESHOLD: Final = -3  # mallopt(3)
PROFILED_UPDATES: Final = 2  # after those, where somebody asks where the time goes: looking costs time


class _Stopwatch(TrainerCallback):  # type: ignore[misc]  # transformers is not typed
    """Times the updates after the first few, which the gauge follows."""

    def __init__(self, warm: int, gauge: Gauge, power: PowerMeter) -> None:
        self.seconds: list[float] = []
        self.graphs: Graphs
        """Of the trainer, which is made after its callback."""
        self._warm, self._gauge, self._power, self._mark = warm, gauge, power, 0.0

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step == self._warm:
            self._gauge.pause()
            self._gauge.synchronize()
            self._power.__enter__()
        self._mark = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        control.should_save = control.should_evaluate = False  # each has a phase of its own
        if self._warm < state.global_step <= self._warm + TIMED_UPDATES:
            self._gauge.synchronize()
            self.seconds.append(time.perf_counter() - self._mark)
        if state.global_step == self._warm + TIMED_UPDATES:
            self._power.__exit__(None, None, None)
            self.graphs.refuse("a profile cannot tell the kernels of a graph apart")
        if state.global_step == state.max_steps:
            self._gauge.resume()


class Performance:
    """One recipe at full size with random weights and random tokens, phase by phase."""

    def __init__(self, recipe: Recipe, scratch: Path, tell: Any, profiled: bool = False) -> None:
        self.scratch, self.tell = scratch, tell
        self.box = Box.detect()
        self.device = load.pick_device()
        trial = math.ceil(ROWS_OF_TRIAL / recipe.micro_batches_per_update) if self.device.type == "cuda" else 0
        self.warm = max(WARM_UPDATES, trial)
        self.updates = self.warm + TIMED_UPDATES + (PROFILED_UPDATES if profiled else 0)
        self.recipe = recipe.replace(max_steps=self.updates, epochs=1.0)
        self.gauge = Gauge(self.device)
        self.anatomy = Anatomy.read(recipe.model)
        self.power = PowerMeter(self.box.is_gpu)
        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        random.seed(recipe.seed)
        torch.manual_seed(recipe.seed)

    def run(self, available_bytes: float) -> dict[str, Any]:
        """All phases in order; what was measured, as plain values. ``available_bytes``: of the pool, before this process began."""
        with self._phase("load"):
            self.model = ready_model(self.recipe, self.box, blank_base)
        seconds = self._train()
        runtime = self.gauge.resident_bytes if self.device.type == "cpu" else self._outside_the_allocator(available_bytes)
        with self._phase("evaluate"):
            mean_loss(self.model, [self._row()], self.recipe.loss, self.device)
        self._sample()
        with self._phase("save"):
            self.trainer._save_checkpoint(self.model, None)
        if self.recipe.method != "full":
            self._merge()
        return {
            "phases": {name: asdict(reading) for name, reading in self.gauge.readings.items()},
            "step_seconds": seconds,
            "profile": self.profiler.seconds,
            "runtime_bytes": runtime,
            "watts": self.power.watts,
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.box.chip,
        }

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self.tell(phase=name)
        with self.gauge.phase(name):
            yield

    def _row(self) -> Row:
        """The longest micro-batch, of random tokens."""
        return longest_micro_batch(self.recipe, self._tokens)

    def _tokens(self, count: int) -> list[int]:
        return random.choices(range(self.anatomy.vocabulary), k=count)

    def _train(self) -> list[float]:
        """Real updates by the package's own Trainer; seconds of those that were timed."""
        rows = [self._row()] * (self.updates * self.recipe.micro_batches_per_update)
        watch = _Stopwatch(self.warm, self.gauge, self.power)
        with self._phase("train"):
            self.trainer = PackedTrainer(self.model, self.recipe, self.scratch, rows, (), callback=watch)
            watch.graphs = self.trainer.graphs
            self.trainer.remove_callback(transformers.PrinterCallback)
            self.profiler = StepProfile(self.warm + TIMED_UPDATES, PROFILED_UPDATES, self.device, partial(statistics.median, watch.seconds))
            self.trainer.add_callback(self.profiler)
            self.trainer.train()
        return watch.seconds

    def _outside_the_allocator(self, available_bytes: float) -> float:
        """What this process took of the pool beside the allocator's share: Python, libraries, the device's context. NA where it cannot be told."""
        free, _ = torch.cuda.mem_get_info(self.device)
        now = read_memory().available_bytes if self.box.unified else float(free)
        taken = available_bytes - now - torch.cuda.memory_reserved(self.device)
        return taken if taken > 0 else NA

    def _sample(self) -> None:
        """As many of the longest prompts as the plan counts on, answered to the last token."""
        recipe = self.recipe
        length = recipe.max_length + recipe.answer_tokens
        width = load.causal_lm(self.model).get_input_embeddings().weight.element_size()
        at_once = answers_at_once(self.anatomy, length, width)
        # Of two lengths, so that there is padding and attention needs a mask, as with real prompts.
        prompts = [self._tokens(max(1, recipe.max_length - index % 2)) for index in range(at_once)]
        load.causal_lm(self.model).generation_config.eos_token_id = None
        with mapped_tensors(), self._phase("sample"):
            continuations(self.model, prompts, recipe.answer_tokens, at_once, 0, ())

    def _merge(self) -> None:
        """The largest layers of each name merged and written, one at a time; a random weight stands in for the one read from the base's file."""
        dtype = load.torch_dtype(self.box.resolve_dtype(self.recipe.dtype))
        adapters = merge.adapters_of(self.model)
        del self.model, self.trainer
        gc.collect()
        chosen = {name.rsplit(".", 1)[-1]: name for name in adapters}  # one layer of each kind: the others are as large
        shapes = {name: adapters[name].shape for name in chosen.values()}

        def merged(name: str) -> Tensor:
            return adapters[name].merge_into(torch.empty(shapes[name], dtype=dtype, device=self.device).normal_(0, 0.02))

        with self._phase("merge"):
            merge.write_streamed(self.scratch / "merged.safetensors", shapes, dtype, merged)


@contextmanager
def mapped_tensors() -> Iterator[None]:
    """Inside, each tensor of 128 KiB or more on a CPU is memory of its own (glibc; on others nothing happens).

    glibc begins like that, but what is let go of teaches it to take up to 32 MiB from its heap. There a cache that grows by a token a step, while
    its storages are followed, leaves gigabytes of holes (benchmarks/LOG.md). An ordinary run leaves hardly any, and answers faster from the heap.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)
    set_option(M_MMAP_THRESHOLD, 128 * KIB)
    try:
        yield
    finally:
        set_option(M_MMAP_THRESHOLD, 32 * MIB)


def cap_memory(limit_bytes: float, runtime_bytes: float) -> None:
    """Lets this process have no more than ``limit_bytes``, so that it fails where it would otherwise freeze the box."""
    if cap_device(limit_bytes, runtime_bytes) is not None:
        return
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[5])
    except (OSError, ValueError, IndexError):  # no Linux: nothing can be capped
        return
    # The limit counts address space, of which libraries and threads have asked for more than they use: only what comes from now on is held down.
    asked = pages * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (int(max(0.0, limit_bytes - read_memory().rss_bytes)) + asked, hard))


def end_with_the_asker() -> None:
    """Ends this process when the one that waits for the answer is gone."""

    def watch() -> None:
        while os.read(0, 1024):  # not through sys.stdin, whose lock the end of a program waits for
            pass
        os._exit(130)

    threading.Thread(target=watch, daemon=True).start()


def main() -> int:
    """Reads the request, performs, answers."""
    request = json.loads(sys.stdin.readline())
    end_with_the_asker()
    with open(request["report"], "a", encoding="utf-8") as report:

        def tell(**fields: Any) -> None:
            report.write(json.dumps(jsonable(fields)) + "\n")
            report.flush()

        try:
            limit, available = (NA if request[name] is None else float(request[name]) for name in ("limit_bytes", "available_bytes"))
            if not is_na(limit):
                cap_memory(limit, float(request["runtime_bytes"]))
            recipe = Recipe.from_dict(request["recipe"])
            performance = Performance(recipe, Path(request["scratch"]), tell, bool(request["profile"]))
            with guard.watching(Path(request["report"]).parent, guard.last_floor(recipe, performance.box), group=False):
                tell(answer=performance.run(available))
        except SparklabError as error:
            tell(error=error.to_dict())
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            tell(out_of_memory=first_line(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
