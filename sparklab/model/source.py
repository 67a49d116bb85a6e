"""Where a model's files are: a directory, a hub name, or ``"tiny"``, the one that ships with sparklab. No torch here."""

from __future__ import annotations

from pathlib import Path

from sparklab.errors import ModelError
from sparklab.model.hub import TINY_PATH, load_config
from sparklab.model.shards import read_headers


def resolve(model: str) -> str:
    """The directory of a local model as an absolute path; any other name (the hub's) unchanged. ModelError where it is a file."""
    path = TINY_PATH if model == "tiny" else Path(model).expanduser()
    if path.is_file():
        raise ModelError(f"model {model!r} is a file; training needs the directory with config.json, weights and tokenizer", f"use {path.parent}")
    return str(path.resolve()) if path.is_dir() else model


def check_trainable(model: str) -> str:
    """As :func:`resolve`, and a local directory must hold config, safetensors weights and a tokenizer: all that is missing is named at once.

    So is a weight file that is missing, cut short or damaged, as far as its header tells.
    """
    source = resolve(model)
    path = Path(source)
    if not path.is_dir():
        return source
    missing = [] if (path / "config.json").is_file() else ["config.json"]
    if not list(path.glob("*.safetensors")):  # to the end: a search left halfway keeps its folder open
        pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in path.glob(pattern))
        missing.append("weights (*.safetensors)" + (f"; {', '.join(pickled[:3])} is a pickle, which sparklab never loads" if pickled else ""))
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        missing.append("a tokenizer (tokenizer.json)")
    if missing:
        raise ModelError(f"model directory {model!r} lacks {' and '.join(missing)}", "save the model there with save_pretrained, tokenizer included")
    values = load_config(source)
    if isinstance(values, dict) and isinstance(values.get("text_config"), dict):
        raise ModelError(f"model {model!r} reads more than text, and only text can be trained on", "train a model of text alone; a plan is of its text part")
    read_headers(path)
    return source
