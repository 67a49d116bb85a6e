"""Checkpoints: everything a run needs to go on as if it had never stopped, in safetensors and JSON, never a pickle.

::

    step-000120/
      adapter_model.safetensors, adapter_config.json     PEFT's own format; or model.safetensors after full fine-tuning
      optimizer.safetensors, optimizer.json              moments and step counts; learning rates and the like
      scheduler.json  rng.json  trainer_state.json
      manifest.json                                      size and SHA-256 of all the others, written last

A checkpoint is written beside its place, brought to the disk and renamed, so a name that exists is a whole checkpoint; the manifest tells
one that was damaged afterwards.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparklab.errors import RunError

MANIFEST = "manifest.json"


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A folder to fill; on leaving it is sealed with a manifest, brought to the disk and renamed to ``target``; on an error it is gone."""
    draft = target.with_name(f".{target.name}.{os.getpid()}.new")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
        _seal(draft)
        shutil.rmtree(target, ignore_errors=True)
        os.rename(draft, target)
        _sync(target.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def faults(folder: Path) -> list[str]:
    """What is wrong with a sealed folder, file by file; empty when it is as it was written."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files = dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError):
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
    """The updates that have a checkpoint, ascending."""
    return sorted(int(match[1]) for entry in folder.iterdir() if (match := re.fullmatch(r"step-(\d{6,})", entry.name)))


def keep_last(folder: Path, count: int) -> None:
    """Removes all but the newest ``count`` checkpoints."""
    for step in steps(folder)[:-count]:
        shutil.rmtree(step_path(folder, step), ignore_errors=True)


def size_bytes(folder: Path) -> int:
    """Bytes of the files in a checkpoint."""
    return sum(file.stat().st_size for file in folder.iterdir())


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
    plain = _read_json(folder / "optimizer.json")
    state: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in plain["state"].items()}
    for key, tensor in load_file(folder / "optimizer.safetensors").items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = tensor
    groups = [{**group, **({"betas": tuple(group["betas"])} if "betas" in group else {})} for group in plain["param_groups"]]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def save_scheduler(scheduler: Any, folder: Path) -> None:
    _write_json(folder / "scheduler.json", scheduler.state_dict())


def load_scheduler(scheduler: Any, folder: Path) -> None:
    scheduler.load_state_dict(_read_json(folder / "scheduler.json"))


def save_rng(folder: Path) -> None:
    """The state of every random generator a step may draw from: Python, NumPy, torch on the CPU and on each CUDA device."""
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    content = {
        "python": [version, list(internal), gauss],
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, cached],
        "torch": torch.get_rng_state().tolist(),
        "cuda": [state.tolist() for state in cuda],
    }
    _write_json(folder / "rng.json", content)


def load_rng(folder: Path) -> None:
    """The inverse of :func:`save_rng`."""
    content = _read_json(folder / "rng.json")
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
    file = next((folder / name for name in ("adapter_model.safetensors", "model.safetensors") if (folder / name).is_file()), None)
    if file is None:
        raise RunError(f"checkpoint {folder} holds neither adapter_model.safetensors nor model.safetensors", "delete it and resume from the one before")
    saved = load_file(file)
    if file.name.startswith("adapter"):
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
    _sync(folder / MANIFEST)
    _sync(folder)


def _digest(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content), encoding="utf-8")


def _read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))
