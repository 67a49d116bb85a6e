"""Checkpoints: everything a run needs to go on as if it had never stopped, in safetensors and JSON, never a pickle.

::

    step-000120/
      adapter_model.safetensors, adapter_config.json     PEFT's own format; or model.safetensors after full fine-tuning
      optimizer.safetensors, optimizer.json              moments and step counts; learning rates and the like
      scheduler.json  rng.json  trainer_state.json       rng.json: of every rank
      progress.json                                      what the run counts beside the Trainer: tokens, its place in the story, held-out loss
      manifest.json                                      size and SHA-256 of all the others, written last

A checkpoint is written beside its place, brought to the disk and renamed, so a name that exists is a whole checkpoint; the manifest tells
one that was damaged afterwards. It is written between two updates, when no gradient is half summed, and the place in the data follows from the
number of updates alone (:class:`EpochSampler`): there is no other state.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparklab.errors import RunError, SparklabError
from sparklab.files import read_json, sync
from sparklab.text import said
from sparklab.units import MIB

MANIFEST = "manifest.json"
PROGRESS = "progress.json"


_SEALED_BYTES: Final = MIB
"""Bytes of the largest manifest that is read."""
_RNG_BYTES: Final = 64 * MIB
_OPTIMIZER_BYTES: Final = 256 * MIB


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A folder to fill; on leaving it is sealed with a manifest, brought to the disk and renamed to ``target``; on an error it is gone."""
    draft, old = _beside(target, "new"), _beside(target, "old")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
        _seal(draft)
        if target.is_dir() and not target.is_symlink():
            os.rename(target, old)
        os.rename(draft, target)
        sync(target.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def clear_leftovers(folder: Path) -> None:
    """Removes what a worker that was killed left half written or half removed. Only who holds the run's lock may."""
    for entry in folder.iterdir():
        if re.fullmatch(r"\.[\w-]+\.\d+\.(new|old)", entry.name) and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)


def _beside(target: Path, what: str) -> Path:
    return target.with_name(f".{target.name}.{os.getpid()}.{what}")


def faults(folder: Path) -> list[str]:
    """What is wrong with a sealed folder, file by file; empty when it is as it was written. No link in it is followed."""
    try:
        files = {name: (int(size), str(digest)) for name, (size, digest) in read_json(folder / MANIFEST, _SEALED_BYTES)["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return [f"{MANIFEST} is missing or damaged"]
    found = []
    for name, (size, digest) in files.items():
        file = folder / name
        if "/" in name or name.startswith(".") or file.is_symlink() or not file.is_file():
            found.append(f"{name} is missing")
        elif file.stat().st_size != size or _digest(file) != digest:
            found.append(f"{name} is not as it was written")
    return found


def newest_good(folder: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint with the highest step that is whole, and what was wrong with the newer ones passed over."""
    complaints: list[str] = []
    for step in reversed(steps(folder)):
        path = step_path(folder, step)
        wrong = faults(path)
        if not wrong:
            return path, complaints
        complaints.append(f"checkpoint {path.name} is damaged ({'; '.join(wrong)})")
    return None, complaints


def step_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of an update is."""
    return folder / f"step-{step:06d}"


def steps(folder: Path) -> list[int]:
    """The updates that have a checkpoint, ascending. A link is none."""
    found = (re.fullmatch(r"step-(\d{6,12})", entry.name) for entry in folder.iterdir() if entry.is_dir() and not entry.is_symlink())
    return sorted(int(match[1]) for match in found if match)


def keep_last(folder: Path, count: int, best: bool = False) -> None:
    """Removes all but the newest ``count`` checkpoints and, where wanted, the one of the ``best`` held-out loss."""
    there = steps(folder)
    losses = {step: loss for step in there if best and (loss := held_out_loss(step_path(folder, step))) is not None}
    kept = {*there[-count:], *([min(losses, key=lambda step: losses[step])] if losses else [])}
    for step in there:
        if step not in kept:  # renamed first: what is half removed must not look like a checkpoint
            gone = _beside(step_path(folder, step), "old")
            os.rename(step_path(folder, step), gone)
            shutil.rmtree(gone, ignore_errors=True)


def held_out_loss(folder: Path) -> float | None:
    """The held-out loss measured at this checkpoint; None where none was."""
    try:
        loss = read_json(folder / PROGRESS)["held_out_loss"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return float(loss) if isinstance(loss, (int, float)) else None


def size_bytes(folder: Path) -> int:
    """Bytes of the files in a checkpoint."""
    return sum(file.stat().st_size for file in folder.iterdir())


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Whatever a checkpoint holds that nobody of ours wrote becomes a :class:`RunError` that names it."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, RuntimeError, SafetensorError) as error:
        if isinstance(error, SparklabError):
            raise
        reason = said(error)
        raise RunError(f"checkpoint {folder.name} cannot be used ({reason})", f"delete {folder} and resume from the one before") from error


# the states, as safe files


def save_optimizer(optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """State tensors to ``optimizer.safetensors``, everything else to ``optimizer.json``."""
    content = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    places: set[int] = set()
    for index, state in content["state"].items():
        for name, value in _flat(state):
            if isinstance(value, Tensor):
                tensor = value.detach().contiguous().cpu()
                # All 8-bit states share one table of values, which safetensors refuses to write twice.
                tensors[f"{index}.{name}"] = tensor.clone() if tensor.data_ptr() in places else tensor
                places.add(tensor.data_ptr())
            else:
                plain.setdefault(str(index), {})[name] = value
    save_file(tensors, folder / "optimizer.safetensors")
    _write_json(folder / "optimizer.json", {"param_groups": content["param_groups"], "state": plain})


def _flat(state: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Names and values; bitsandbytes hands its 8-bit states out in a dict within the dict, and takes them back without."""
    for name, value in state.items():
        if isinstance(value, dict):
            yield from value.items()
        else:
            yield name, value


def load_optimizer(optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """The inverse of :func:`save_optimizer`."""
    plain = read_json(folder / "optimizer.json", _OPTIMIZER_BYTES)
    state: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in plain["state"].items()}
    for key, tensor in load_file(folder / "optimizer.safetensors").items():
        index, name = key.split(".", 1)
        # A copy: what is mapped from a checkpoint would hold its place on the disk long after retention has removed it.
        state.setdefault(int(index), {})[name] = tensor.clone()
    groups = [{**group, **({"betas": tuple(group["betas"])} if "betas" in group else {})} for group in plain["param_groups"]]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def save_scheduler(scheduler: Any, folder: Path) -> None:
    _write_json(folder / "scheduler.json", scheduler.state_dict())


def load_scheduler(scheduler: Any, folder: Path) -> None:
    """The inverse of :func:`save_scheduler`; takes figures alone, and none that the scheduler does not have."""
    own = {name: value for name, value in scheduler.state_dict().items() if name != "lr_lambdas"}
    state = {name: read for name, read in read_json(folder / "scheduler.json").items() if name in own}
    for name, value in own.items():
        if _shape(state[name]) != _shape(value):
            raise ValueError(f"{name} of the scheduler is {state[name]!r}")
    scheduler.load_state_dict({**scheduler.state_dict(), **state})


def _shape(value: Any) -> Any:
    """What a figure of the scheduler is: a number, a list of so many numbers, or what JSON has beside these."""
    if isinstance(value, list):
        return [_shape(item) for item in value]
    return "number" if isinstance(value, (int, float)) and not isinstance(value, bool) else type(value)


def save_progress(progress: dict[str, Any], folder: Path) -> None:
    """What the run counts beside the Trainer's own state."""
    _write_json(folder / PROGRESS, progress)


def load_progress(folder: Path) -> dict[str, Any]:
    """The inverse of :func:`save_progress`. Raises :class:`RunError` where it is no such thing, or the Trainer's state is of another update."""
    with reading(folder):
        progress, state = read_json(folder / PROGRESS), read_json(folder / "trainer_state.json")
        step = int(folder.name.removeprefix("step-"))
        if (progress["step"], state["global_step"]) != (step, step):
            raise ValueError(f"it says it is of update {progress['step']}, and its Trainer of {state['global_step']}")
        return {"step": step, "skipped": int(progress["skipped"]), "told": int(progress["told"]), "tokens": int(progress["tokens"])}


def rng_state() -> dict[str, Any]:
    """The state of every random generator a step may draw from: Python, NumPy, torch on the CPU and on each CUDA device."""
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "python": [version, list(internal), gauss],
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, cached],
        "torch": torch.get_rng_state().tolist(),
        "cuda": [state.tolist() for state in cuda],
    }


def save_rng(folder: Path, ranks: Sequence[dict[str, Any]] | None = None) -> None:
    """The random states of every rank, in their order; default: this process alone."""
    _write_json(folder / "rng.json", {"ranks": [rng_state()] if ranks is None else list(ranks)})


def load_rng(folder: Path, rank: int = 0) -> None:
    """The inverse of :func:`save_rng` for one rank. Raises :class:`RunError` where the checkpoint was saved by fewer."""
    ranks = read_json(folder / "rng.json", _RNG_BYTES)["ranks"]
    if rank >= len(ranks):
        raise RunError(f"checkpoint {folder.name} was saved by {len(ranks)} processes, and this is number {rank + 1}", "resume with as many as before")
    set_rng(ranks[rank])


def set_rng(content: dict[str, Any]) -> None:
    """The inverse of :func:`rng_state`."""
    version, internal, gauss = content["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = content["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(torch.tensor(content["torch"], dtype=torch.uint8))
    if content["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([torch.tensor(state, dtype=torch.uint8) for state in content["cuda"]])


def save_weights(model: nn.Module, folder: Path) -> None:
    """What was trained: the adapters in PEFT's format, or the whole model in transformers'."""
    model.save_pretrained(folder)  # type: ignore[operator]


def load_weights(model: nn.Module, folder: Path) -> None:
    """Puts saved weights back into a model of the same recipe. Raises :class:`RunError` where names or shapes differ."""
    files = [file] if (file := folder / "adapter_model.safetensors").is_file() else sorted(folder.glob("model*.safetensors"))
    if not files:
        raise RunError(f"checkpoint {folder} holds neither adapter_model.safetensors nor model.safetensors", "delete it and resume from the one before")
    saved = {name: tensor for file in files for name, tensor in load_file(file).items()}
    if files[0].name.startswith("adapter"):
        from peft import set_peft_model_state_dict  # noqa: PLC0415

        outcome = set_peft_model_state_dict(model, saved)
        wrong = list(outcome.unexpected_keys) + [name for name in outcome.missing_keys if "lora_" in name]
    else:
        missing, wrong = model.load_state_dict(saved, strict=False)
        tied = set(getattr(model, "_tied_weights_keys", None) or ())
        wrong = list(wrong) + [name for name in missing if name not in tied]
    if wrong:
        raise RunError(f"checkpoint {folder} does not belong to this model: {', '.join(wrong[:5])}", "resume with the recipe the run was started with")


def _seal(folder: Path) -> None:
    files = {}
    for file in sorted(folder.iterdir()):
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
        files[file.name] = [file.stat().st_size, _digest(file)]
    _write_json(folder / MANIFEST, {"files": files})
    sync(folder / MANIFEST)
    sync(folder)


def _digest(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content), encoding="utf-8")
