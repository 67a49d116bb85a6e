"""Runs killed with SIGKILL again and again, resumed each time, and compared bit for bit with runs that nobody touched.

    python benchmarks/torture.py [--runs 64] [--seed 0] [--write benchmarks/torture.md]

Each run is killed one to three times, and then left alone until it is finished. A kill comes

- at a random moment of the worker's life, from outside;
- just before or after the backward pass of a random row, in the middle of an update;
- just before or after a random one of the calls by which anything becomes durable (fsync, rename, replace, unlink, rmdir, mkdir);
- in the middle of a random line of events.jsonl, half of it written;
- in the middle of a random file of weights or moments, half of it written.

A run counts as lost where it cannot be resumed to its end, and as different where its story (steps, losses, gradient norms, learning rates,
evaluations, samples, with their numbers: ``sparklab.run.events.story``), its numbering or its final weights are not those of the run that
nobody touched. Workers are forked from a process that has torch loaded, with one thread each; the code is the worker's own from
``sl.train`` on, run inline. The guard's watchdog is off: it would be another process for every one of hundreds of workers.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import gc
import hashlib
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"
os.environ.update(TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", SPARKLAB_CALIBRATION="off")

import bitsandbytes  # noqa: E402, F401 - loaded once, before the forks
import torch  # noqa: E402
import transformers  # noqa: E402

import sparklab as sl  # noqa: E402
import sparklab.run.session  # noqa: E402 - and all that a worker loads
from sparklab.data.lesson import lesson  # noqa: E402
from sparklab.data.world import orders  # noqa: E402
from sparklab.engine import checkpoint  # noqa: E402
from sparklab.model.hub import TINY_PATH  # noqa: E402
from sparklab.run.events import EventReader, EventWriter, story  # noqa: E402

VARIANTS: dict[str, dict[str, Any]] = {
    "lora, dropout, two rows an update": {"method": "lora", "dropout": 0.1, "micro_batches_per_update": 2},
    "full": {"method": "full"},
    "qlora": {"method": "qlora", "dropout": 0.05},
    "lora, 8-bit AdamW, best kept": {"method": "lora", "optimizer": "adamw_8bit", "keep_best": True},
}
KINDS = ("moment", "step", "durable", "line", "weights")
MOST = {"step": 12, "durable": 70, "line": 36, "weights": 8}
"""Calls of each kind in a whole run, about."""
DURABLE = ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir")
DIFFERING = {"seq", "time", "seconds", "wait_seconds", "tokens_per_second", "peak_bytes"}
PATIENCE_SECONDS = 300


@dataclasses.dataclass
class Outcome:
    """One run's end."""

    variant: str
    kills: list[tuple[str, str]]
    """How each kill came, and what it left behind."""
    lost: str = ""
    different: str = ""


def make_model(folder: Path) -> None:
    """A Llama of one layer with the bundled model's tokenizer and random weights: what is tortured is the run, not the model."""
    config = transformers.AutoConfig.from_pretrained(TINY_PATH)
    config.update({"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32})
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(TINY_PATH).save_pretrained(folder)


def recipe(folder: Path, variant: str) -> sl.Recipe:
    """Orders to JSON over 24 records: 10 updates, a checkpoint at every third, an evaluation and a sample at every fourth."""
    changes = dict(VARIANTS[variant])
    base = lesson(changes.pop("method"), 0, folder / "lesson")
    paths = {}
    for name, split, count in (("data", "train", 24), ("held_out", "held_out", 4)):
        path = folder / f"{name}.jsonl"
        if not path.exists():
            path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in orders(split, count, 0)), encoding="utf-8")
        paths[name] = str(path)
    if not (folder / "model").exists():
        assert forked(lambda: make_model(folder / "model")) == 0
    settings = {
        "model": str(folder / "model"),
        "micro_batch_tokens": 128,
        "max_length": 128,
        "max_steps": 10,
        "epochs": 50,
        "save_every": 3,
        "eval_every": 4,
        "answer_held_out": 0,
    }
    return base.replace(**{**settings, "sample_prompts": ("Hello!",), "answer_tokens": 4, "guard": False, **paths, **changes})


def go_on(made: sl.Recipe, path: Path) -> None:
    """What a user does: starts the run, or resumes it where it is there already."""
    if not (path / "recipe.json").is_file():
        sl.train(made, path, inline=True, panel=False)
        return
    run = sl.Run.open(path)
    if run.status != "finished":
        run.resume(inline=True, panel=False)


def forked(work: Callable[[], None], kill_after: float | None = None) -> int:
    """Runs ``work`` in a forked process and returns how it ended; kills it after so many seconds."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            silence = os.open(os.devnull, os.O_WRONLY)
            if "TORTURE_LOUD" not in os.environ:
                os.dup2(silence, 1)
                os.dup2(silence, 2)
            work()
            status = 0
        finally:
            os._exit(status)
    deadline = time.monotonic() + (PATIENCE_SECONDS if kill_after is None else kill_after)
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def trap(kind: str, number: int, after: bool) -> Iterator[None]:
    """In the worker: death at the ``number``-th call of its kind (from 0)."""
    calls = 0

    def due() -> bool:
        nonlocal calls
        calls += 1
        return calls > number

    def around(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            now = due()
            if now and not after:
                die()
            result = real(*arguments, **options)
            if now:
                die()
            return result

        return call

    if kind == "durable":
        for name in DURABLE:
            setattr(os, name, around(getattr(os, name)))
    elif kind == "step":
        torch.Tensor.backward = around(torch.Tensor.backward)  # type: ignore[method-assign]
    elif kind == "line":
        _half_lines(due)
    elif kind == "weights":
        _half_files(due)
    yield


def _half_lines(due: Callable[[], bool]) -> None:
    write = EventWriter.write

    def half(self: EventWriter, event: str, **fields: Any) -> Any:
        if due():
            file = self._file
            line = json.dumps({"event": event, "seq": 10**6, **{name: str(value) for name, value in fields.items()}}).encode()
            file.write(line[: len(line) // 2])
            die()
        return write(self, event, **fields)

    EventWriter.write = half  # type: ignore[method-assign]


def _half_files(due: Callable[[], bool]) -> None:
    for name in ("save_optimizer", "save_weights"):
        real = getattr(checkpoint, name)

        def half(what: Any, folder: Path, real: Callable[..., None] = real) -> None:
            real(what, folder)
            if due():
                file = max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
                os.truncate(file, file.stat().st_size // 2)
                die()

        setattr(checkpoint, name, half)


def left_behind(path: Path) -> str:
    """Where a kill struck, by what lies in the directory."""
    if not (path / "recipe.json").is_file():
        return "before the run directory"
    found = list(EventReader(path / "events.jsonl").read_new())
    content = (path / "events.jsonl").read_bytes()
    if content and not content.endswith(b"\n"):
        return "in an event's line"
    if list(path.glob("checkpoints/.step-*.new")):
        return "in a checkpoint"
    if list(path.glob(".*.new")) or list(path.rglob(".*.old")):
        return "while saving or removing"
    phases = [event["phase"] for event in found if event["event"] == "phase"]
    return f"in phase {phases[-1]}" if phases else "before the first phase"


def told(path: Path) -> tuple[list[dict[str, Any]], str]:
    """The story of a run, without its clocks, and the digest of its final weights."""
    events = list(EventReader(path / "events.jsonl").read_new())
    assert [event["seq"] for event in events] == list(range(len(events))), "numbers with a gap"
    what = [{name: value for name, value in event.items() if name not in DIFFERING} for event in story(events)]
    assert [event["nth"] for event in what] == list(range(len(what))), "story with a gap"
    (weights,) = [file for folder in ("adapter", "model") for file in (path / folder).glob("*.safetensors")]
    return what, hashlib.sha256(weights.read_bytes()).hexdigest()


def tortured(made: sl.Recipe, path: Path, variant: str, reference: tuple[Any, str], seconds: float, draw: random.Random) -> Outcome:
    """One run, killed one to three times and then let finish. A run that was finished before any of its kills came begins anew."""
    outcome = Outcome(variant, [])
    while not outcome.kills and not outcome.lost:
        shutil.rmtree(path, ignore_errors=True)
        for _ in range(draw.randint(1, 3)):
            kill(made, path, outcome, seconds, draw)
    if outcome.lost:
        return outcome
    status = forked(lambda: go_on(made, path))
    if status != 0 or sl.Run.open(path).status != "finished":
        state = sl.Run.open(path).state if (path / "recipe.json").is_file() else None
        outcome.lost = f"status {status}, {state.status if state else 'no directory'}: {state.reason if state else ''}"
        return outcome
    what, weights = told(path)
    if weights != reference[1]:
        outcome.different = "final weights"
    elif what != reference[0]:
        outcome.different = next(
            (f"{ours} instead of {theirs}" for ours, theirs in zip(what, reference[0], strict=False) if ours != theirs), "length of the story"
        )
    return outcome


def say_at_once(text: str) -> None:
    print(text, flush=True)  # what waits in a buffer at a fork would be said twice


def kill(made: sl.Recipe, path: Path, outcome: Outcome, seconds: float, draw: random.Random) -> None:
    """Lets a worker go on until a kill of a random kind comes, or to the end where none does."""
    kind = draw.choice(KINDS)
    if kind == "moment":
        status = forked(lambda: go_on(made, path), kill_after=draw.uniform(0, 0.6 * seconds))
    else:
        number, after = draw.randrange(MOST[kind]), draw.random() < 0.5

        def work() -> None:
            with trap(kind, number, after):
                go_on(made, path)

        status = forked(work)
    if status == -signal.SIGKILL:
        outcome.kills.append((kind, left_behind(path)))
    elif status != 0:
        outcome.lost = f"a worker ended with status {status} instead of being killed ({kind})"


def torture(folder: Path, runs: int, seed: int, variants: list[str], say: Callable[[str], None] = say_at_once) -> list[Outcome]:
    """``runs`` runs, the variants in turn."""
    torch.set_num_threads(1)  # nothing is computed in this process, so no thread is there to be lost in a fork
    gc.collect()
    gc.freeze()  # what is loaded stays: no worker need look through it
    made, references, seconds = {}, {}, {}
    for number, variant in enumerate(variants):
        made[variant] = recipe(folder, variant)
        path = folder / f"reference-{number}"
        began = time.monotonic()
        assert forked(lambda variant=variant, path=path: go_on(made[variant], path)) == 0, f"{variant}: {sl.Run.open(path).state.reason}"  # type: ignore[misc]
        seconds[variant] = time.monotonic() - began
        references[variant] = told(path)
        say(f"{variant}: {len(references[variant][0])} events in the story, {seconds[variant]:.1f} s untouched")
    outcomes = []
    for number in range(runs):
        variant = variants[number % len(variants)]
        path = folder / f"run-{number}"
        outcome = tortured(made[variant], path, variant, references[variant], seconds[variant], random.Random(f"{seed} {number}"))
        outcomes.append(outcome)
        say(f"{number + 1:3}/{runs} {variant}: killed {len(outcome.kills)} times; {outcome.lost or outcome.different or 'the same'}")
    return outcomes


def report(outcomes: list[Outcome], seconds: float, seed: int) -> str:
    """The figures as Markdown."""
    kills = [kill for outcome in outcomes for kill in outcome.kills]
    lost, different = [outcome for outcome in outcomes if outcome.lost], [outcome for outcome in outcomes if outcome.different]
    machine = f"{_cpu()}, one thread, torch {torch.__version__}, Python {platform.python_version()}"
    lines = [
        "# Runs killed and resumed",
        "",
        f"`python benchmarks/torture.py --runs {len(outcomes)} --seed {seed}`; {machine}; {seconds / 60:.0f} minutes.",
        "",
        f"**{len(outcomes)} runs, {len(kills)} kills with SIGKILL: {len(lost)} lost, {len(different)} different.**",
        "",
        "How kills come, and what is compared (every step's loss, gradient norm and learning rate, every evaluation and sample with their numbers, and",
        "the bytes of the final weights), stands in the script.",
        "",
        "| variant | runs | kills | lost | different |",
        "|---|---|---|---|---|",
    ]
    for variant in dict.fromkeys(outcome.variant for outcome in outcomes):
        mine = [outcome for outcome in outcomes if outcome.variant == variant]
        row = (variant, len(mine), sum(len(one.kills) for one in mine), sum(bool(one.lost) for one in mine), sum(bool(one.different) for one in mine))
        lines.append("| " + " | ".join(map(str, row)) + " |")
    for title, index in (("how the kill came", 0), ("where it struck, by what lay in the directory", 1)):
        lines += ["", f"| {title} | kills |", "|---|---|"]
        lines += [f"| {what} | {count} |" for what, count in collections.Counter(kill[index] for kill in kills).most_common()]
    lines += [f"\n{outcome.variant}: {outcome.lost or outcome.different}" for outcome in (*lost, *different)]
    return "\n".join(lines) + "\n"


def _cpu() -> str:
    names = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{len(os.sched_getaffinity(0))} cores of {names[0] if names else platform.machine()}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variants", type=int, default=len(VARIANTS), help="so many of the kinds of run")
    parser.add_argument("--write", type=Path, help="a Markdown file for the figures")
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="sparklab-torture-") as folder:
        outcomes = torture(Path(folder), options.runs, options.seed, list(VARIANTS)[: options.variants])
    text = report(outcomes, time.monotonic() - began, options.seed)
    print(text)
    if options.write:
        options.write.write_text(text, encoding="utf-8")
    return int(any(outcome.lost or outcome.different for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
