"""A rehearsal: the recipe at full size with random weights, nothing downloaded, measured phase by phase against its plan.

The work is done in a process of its own (:mod:`sparklab.run.perform`), so this one never loads torch, and all memory comes back at the end.
"""

from __future__ import annotations

import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from sparklab import errors
from sparklab.box import Box
from sparklab.box.calibration import cache_folder, learn
from sparklab.box.detect import CPU_RUNTIME_BYTES
from sparklab.errors import RunFailed, SparklabError
from sparklab.model.hub import load_config
from sparklab.planner import render
from sparklab.planner.cost import flops_per_token, kind_of_work, reached_share
from sparklab.planner.forecast import Plan
from sparklab.planner.items import BESIDE_RECORDING
from sparklab.run.guard import left_behind
from sparklab.run.launch import check_disk, child_environment
from sparklab.units import GIB, NA, gib, is_na, jsonable

# What the meter of a device cannot see of a plan, as shares of its lines. CUDA's allocator knows all tensors; following storages on a CPU
# misses what a kernel takes and gives back inside.
# Random weights come from no file. What a CUDA graph's memory keeps from others counts as free while the graph is not at work.
UNSEEN_ANYWHERE: Final = {"runtime": 1.0, "allocator slack": 1.0, "source tensors": 1.0, "experts being stacked": 1.0, BESIDE_RECORDING: 1.0}
LEAST_SECONDS: Final = 0.1  # a micro-batch that the chip could compute in less says little of larger ones: its rate is not kept for later plans
LEAST_MOVING: Final = 1.0 * GIB  # nor is the slack of an allocator that had less than this to move
EVERY_SECONDS: Final = 0.1  # between two looks at how far the process is
SECONDS_TO_LEAVE: Final = 10.0
HEADS: Final = ("phase", "planned", "measured", "of plan", "reserved", "process", "time")


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One phase, bytes planned and measured. The plan's figure is for what the meter can see: tensors, without runtime and allocator slack."""

    name: str
    planned_bytes: float
    measured_bytes: float
    """Tensors at the highest moment; where memory is one pool, with what saving copies on its host side."""
    reserved_bytes: float
    """What CUDA's allocator held for them; ``NA`` on a CPU."""
    process_bytes: float
    """The process's resident memory at its highest, runtime and all; ``NA`` where the system does not tell."""
    seconds: float

    @property
    def ratio(self) -> float:
        """Measured over planned."""
        return self.measured_bytes / self.planned_bytes

    def to_dict(self) -> dict[str, Any]:
        """For JSON; sizes in GiB, unknown as null."""
        values: dict[str, Any] = jsonable({
            "planned_gib": gib(self.planned_bytes), "measured_gib": gib(self.measured_bytes), "ratio": self.ratio,
            "reserved_gib": gib(self.reserved_bytes), "process_gib": gib(self.process_bytes), "seconds": self.seconds,
        })  # fmt: skip
        return values


@dataclass(frozen=True, repr=False)
class Rehearsal:
    """A plan and what was measured of it. Speeds are those of this machine, whatever box the plan was for."""

    plan: Plan
    phases: tuple[Phase, ...]
    step_seconds: tuple[float, ...]
    """Of the updates that were timed, after two to warm up."""
    watts: float
    """Mean draw during those, as far as the box tells: the GPU's, or the processor's; ``NA`` where it does not."""
    seconds: float
    """The whole rehearsal."""
    device: str
    """What computed."""
    here: Box
    """The machine that computed."""
    notes: tuple[str, ...] = ()
    profile: Mapping[str, float] = field(default_factory=dict)
    """Seconds of an update by kind of work, which sum to the update: on a CPU as profiled, on a GPU as it is; empty where nobody asked."""

    @property
    def measured_bytes(self) -> float:
        """The most that tensors held in any phase."""
        return max(phase.measured_bytes for phase in self.phases)

    @property
    def reserved_bytes(self) -> float:
        """The most that CUDA's allocator held; ``NA`` on a CPU."""
        return max(phase.reserved_bytes for phase in self.phases)

    @property
    def update_seconds(self) -> float:
        """Median of the timed updates."""
        return statistics.median(self.step_seconds)

    @property
    def tokens_per_second(self) -> float:
        """Non-pad tokens a second on one device."""
        recipe = self.plan.recipe
        return recipe.micro_batch_tokens * recipe.micro_batches_per_update / self.update_seconds

    @property
    def tflops(self) -> float:
        """10^12 operations a second, recomputation counted; ``NA`` where that would be more than the chip can do, which is a counting error."""
        return NA if self.is_beyond_roofline else flops_per_token(self.plan.ledger) * self.tokens_per_second / 1e12

    @property
    def roofline_share(self) -> float:
        """Share of the chip's peak that is; ``NA`` where the peak is unknown or the share cannot be."""
        return self.tflops * 1e12 / self.here.compute_flops(self.plan.ledger.dtype)

    @property
    def is_beyond_roofline(self) -> bool:
        """More was counted than the chip can compute."""
        return flops_per_token(self.plan.ledger) * self.tokens_per_second > self.here.compute_flops(self.plan.ledger.dtype)

    def to_dict(self) -> dict[str, Any]:
        """The plan's JSON and what was measured, unknown as null."""
        values: dict[str, Any] = jsonable({
            **self.plan.to_dict(),
            "measured_gib": gib(self.measured_bytes),
            "reserved_gib": gib(self.reserved_bytes),
            "phases": {phase.name: phase.to_dict() for phase in self.phases},
            "tokens_per_second_measured": self.tokens_per_second,
            "tflops": self.tflops,
            "roofline_share": self.roofline_share,
            "watts": self.watts,
            "seconds": self.seconds,
            "device": self.device,
            "profile": {kind: {"ms": 1e3 * seconds, "share": seconds / self._profiled} for kind, seconds in self.profile.items()} or None,
            "profile_ms": 1e3 * self._profiled if self.profile else None,
            "notes": [*self.plan.notes, *self.notes],
        })  # fmt: skip
        return values

    @property
    def _profiled(self) -> float:
        return sum(self.profile.values())

    def _kinds(self) -> list[tuple[str, ...]]:
        """Rows of the profile: kind, milliseconds, share; nothing of what took none."""
        return [(kind, f"{1e3 * seconds:,.1f} ms", f"{seconds / self._profiled:.1%}") for kind, seconds in self.profile.items() if seconds]

    def _time(self) -> str:
        if self.here.is_gpu:
            return f"an update: {1e3 * self._profiled:,.1f} ms, its kernels' time by kind"
        return f"an update as profiled: {1e3 * self._profiled:,.1f} ms (without the profiler {1e3 * self.update_seconds:,.1f} ms)"

    def __repr__(self) -> str:
        memory = ", ".join(f"{phase.name} {render.size(phase.measured_bytes)}" for phase in self.phases)
        return f"Rehearsal({self.plan.recipe.method} of {self.plan.recipe.model} on {self.device}: {memory}; {self.tokens_per_second:,.0f} tokens/s)"

    def _rows(self) -> list[tuple[str, ...]]:
        rows = []
        for phase in self.phases:
            sizes = (phase.planned_bytes, phase.measured_bytes, phase.reserved_bytes, phase.process_bytes)
            share = f"{phase.ratio:.1%}"
            rows.append((phase.name, *("N/A" if is_na(size) else render.size(size) for size in sizes[:2]), share,
                         *("N/A" if is_na(size) else render.size(size) for size in sizes[2:]), f"{phase.seconds:.1f} s"))  # fmt: skip
        return rows

    def _speed(self) -> str:
        share = "share of the chip's peak unknown" if is_na(self.roofline_share) else f"{self.roofline_share:.1%} of the chip's peak"
        watts = "" if is_na(self.watts) else f", {self.watts:.0f} W"
        rate = "" if is_na(self.tflops) else f", {self.tflops:.3g} TFLOP/s"
        return f"{self.tokens_per_second:,.0f} tokens/s{rate}, {share}{watts}; on {self.device}, {self.seconds:.0f} s in all"

    def __str__(self) -> str:
        rows = [HEADS, *self._rows()]
        widths = [max(len(row[index]) for row in rows) for index in range(len(HEADS))]
        lines = [render.heading(self.plan)]
        lines += ["  ".join(cell.rjust(width) if index else cell.ljust(width) for index, (cell, width) in enumerate(zip(row, widths, strict=True)))
                  for row in rows]  # fmt: skip
        kinds = [f"  {kind:<20}{ms:>14}{share:>9}" for kind, ms, share in self._kinds()]
        return "\n".join([*lines, self._speed(), *([self._time(), *kinds] if kinds else []), *(f"Note: {note}" for note in self.notes)])

    def _repr_html_(self) -> str:
        table: str = render.table_block(render.heading(self.plan), HEADS, self._rows(), (self._speed(), *(f"Note: {note}" for note in self.notes)))
        return table + (render.table_block(self._time(), ("kind", "time", "share"), self._kinds(), ()) if self.profile else "")


def rehearse_plan(planned: Plan, on_phase: Callable[[str], None] | None = None, profile: bool = False) -> Rehearsal:
    """Performs the plan's recipe in a process of its own, held to the plan's usable memory, and keeps what it learns for later plans here.

    ``on_phase`` is told each phase as it begins; ``profile`` asks where an update's time goes. Raises :class:`RunFailed` where memory ran out or
    the process died, with the phase it died in, :class:`ModelError` where transformers cannot make the model, :class:`DiskFull` where a
    checkpoint would not fit on the disk.
    """
    began = time.perf_counter()
    here = Box.detect()
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    # On the disk of the cache and not in the system's temporary folder, which on some systems is memory.
    with tempfile.TemporaryDirectory(prefix="rehearsal-", dir=folder) as scratch:
        check_disk(Path(scratch), _written_bytes(planned))
        answer = _perform(planned, here, Path(scratch), on_phase, profile)
    rehearsal = Rehearsal(
        plan=planned,
        phases=_phases(planned, here, answer["phases"]),
        step_seconds=tuple(answer["step_seconds"]),
        watts=_figure(answer["watts"]),
        seconds=time.perf_counter() - began,
        device=answer["device"],
        here=here,
        profile=answer["profile"],
    )
    return replace(rehearsal, notes=_notes(rehearsal, answer))


def _written_bytes(planned: Plan) -> float:
    """A checkpoint of weights and two moments, and a merged layer of each kind."""
    ledger = planned.ledger
    return 3.0 * ledger.trainable * max(ledger.trained_width, ledger.width) + sum(2.0 * linear.weights / linear.count for linear in ledger.adapted) + 2**20


def _perform(planned: Plan, here: Box, scratch: Path, on_phase: Callable[[str], None] | None, profile: bool) -> dict[str, Any]:
    """Starts the process, follows it from phase to phase and returns its answer."""
    # The process needs no network: all it reads of the model is this file.
    (scratch / "config.json").write_text(json.dumps(load_config(planned.recipe.model)), encoding="utf-8")
    report, log = scratch / "report.jsonl", scratch / "log.txt"
    report.touch()
    request = {
        "recipe": planned.recipe.replace(model=str(scratch), dtype=planned.ledger.dtype).to_dict(),
        "scratch": str(scratch / "run"),
        "report": str(report),
        "profile": profile,
        "limit_bytes": min(planned.usable_bytes, here.usable_bytes),
        "runtime_bytes": here.runtime_bytes,
        "available_bytes": here.available_bytes,
    }
    with open(log, "wb") as stderr:
        process = subprocess.Popen([sys.executable, "-m", "sparklab.run.perform"], stdin=subprocess.PIPE, stdout=stderr, stderr=stderr,
                                   env=child_environment(offline=True))  # fmt: skip
    assert process.stdin is not None
    phase, said = "start", dict[str, Any]()
    try:
        process.stdin.write(json.dumps(jsonable(request)).encode() + b"\n")
        process.stdin.flush()
        with open(report, encoding="utf-8") as lines:
            while not said:
                over = process.poll() is not None  # asked before the last look, so that nothing said at the end is missed
                for line in lines:
                    content = json.loads(line)
                    if "phase" not in content:
                        said = content
                        break
                    phase = content["phase"]
                    if on_phase is not None:
                        on_phase(phase)
                if over and not said:
                    break
                time.sleep(EVERY_SECONDS)
    finally:  # an interrupt ends the process too: it leaves when its input closes
        process.stdin.close()
        _end(process)
    if "answer" in said:
        return dict(said["answer"])
    if "error" in said:
        raise getattr(errors, said["error"]["error"], SparklabError)(said["error"]["fact"], said["error"]["fix"])
    raise _death(planned, phase, said.get("out_of_memory", ""), process.returncode, log)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Waits for the process to leave; ends it where it does not."""
    try:
        process.wait(SECONDS_TO_LEAVE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _death(planned: Plan, phase: str, out_of_memory: str, status: int, log: Path) -> RunFailed:
    """One clear error for a process that gave no answer."""
    left = left_behind(log.parent)
    if left is not None:
        return RunFailed(f"the guard ended the rehearsal in the phase {phase!r}: {left['reason']}", "fewer micro_batch_tokens, or more checkpoint_layers")
    if out_of_memory or status == -signal.SIGKILL:
        how = f"ran out of memory ({out_of_memory})" if out_of_memory else "was killed, as the system does when memory runs out"
        need = f"{gib(planned.phases[phase]):.3g} GiB planned for it" if phase in planned.phases else "before its first phase"
        return RunFailed(f"the rehearsal {how} in the phase {phase!r}: {need}, {gib(planned.usable_bytes):.3g} GiB usable",
                         "fewer micro_batch_tokens, more checkpoint_layers, or close what else holds memory")  # fmt: skip
    tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-5:])
    return RunFailed(f"the rehearsal ended in the phase {phase!r} with exit status {status}:\n{tail}", "run it again; if it stays, report it with these lines")


def _figure(value: Any) -> float:
    """A number of the answer; JSON's null is NA."""
    return NA if value is None else float(value)


def _phases(planned: Plan, here: Box, readings: dict[str, dict[str, Any]]) -> tuple[Phase, ...]:
    """Readings beside the plan's figures."""
    ledger = planned.ledger
    unseen = dict(UNSEEN_ANYWHERE)
    if not here.is_gpu:
        unseen |= {"library workspace": 1.0}
    phases = []
    for name, reading in readings.items():
        measured = _figure(reading["tensors_bytes"])
        if name == "save" and (here.unified or not here.is_gpu):  # what goes to the file through the host's side of the same pool
            measured += _figure(reading["host_growth_bytes"])
        phases.append(
            Phase(
                name=name,
                planned_bytes=ledger.seen_bytes(name, unseen),
                measured_bytes=measured,
                reserved_bytes=_figure(reading["reserved_bytes"]),
                process_bytes=_figure(reading["host_bytes"]),
                seconds=float(reading["seconds"]),
            )
        )
    return tuple(phases)


def _notes(rehearsal: Rehearsal, answer: dict[str, Any]) -> tuple[str, ...]:
    """What the reader must know, and what is kept for later plans on this machine."""
    notes = []
    if rehearsal.is_beyond_roofline:
        notes.append(f"{rehearsal.tokens_per_second:,.0f} tokens/s would be more than {rehearsal.here.chip} can compute: a counting error, so no rate is told")
    notes.append(learn(rehearsal.here.chip, learned(rehearsal, _figure(answer["runtime_bytes"]))))
    return tuple(notes)


def learned(rehearsal: Rehearsal, runtime_bytes: float) -> dict[str, Any]:
    """What later plans on this machine may use instead of assumptions: only what was measured at a size that says something of other sizes."""
    plan, here = rehearsal.plan, rehearsal.here
    # On a CPU a run holds more than its rehearsal, which meets fewer shapes and so fewer of oneDNN's kernels: what is known of runs is the least.
    least = 0.0 if here.is_gpu else CPU_RUNTIME_BYTES
    found: dict[str, Any] = {} if is_na(runtime_bytes) else {"runtime_bytes": max(runtime_bytes, least)}
    peak, seconds = here.compute_flops(plan.ledger.dtype), rehearsal.update_seconds / plan.recipe.micro_batches_per_update
    share = reached_share(plan.cost, peak, here.bandwidth_bytes_per_second, seconds)
    if plan.cost.flops / peak >= LEAST_SECONDS and not is_na(share):
        found["compute_shares"] = {kind_of_work(plan.ledger): share}
    train = next(phase for phase in rehearsal.phases if phase.name == "train")
    stays = sum(item.size_bytes for item in (*plan.ledger.weights, *plan.ledger.states))
    beside = sum(item.size_bytes for item in plan.ledger.phases["train"][1] if item.name == BESIDE_RECORDING)
    moving, slack = train.measured_bytes - stays, train.reserved_bytes - train.measured_bytes - beside
    if moving >= LEAST_MOVING and slack > 0:
        found["slack_share"] = slack / moving
    return found
