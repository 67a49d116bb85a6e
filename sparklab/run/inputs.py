"""What a run's result depends on beside its checkpoints: recipe, data, model, packages, told by their content, so that a resume knows a change.

``environment.json`` holds it as it was at the start. A resumed run reads no data whose content is not known from there, unless that is
accepted by name: so a run directory from a stranger cannot make it read a file of this machine that the stranger does not know already.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import stat
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Final

from sparklab.data.read import open_source
from sparklab.errors import RecipeError, RunChanged, RunError, SparklabError
from sparklab.files import reason, write_json
from sparklab.model.hub import TINY_PATH
from sparklab.planner.recipe import Recipe
from sparklab.run.directory import RunDirectory
from sparklab.run.exhausted import MAY_CHANGE
from sparklab.run.lock import release
from sparklab.text import one_line
from sparklab.units import KIB, MIB

PACKAGES: Final = ("sparklab", "torch", "transformers", "peft", "datasets", "accelerate", "bitsandbytes", "liger-kernel")
NAMES: Final = ("recipe", "data", "held_out", "model", "versions")
"""What can change, as ``accept`` takes it."""
WHOLE_BYTES: Final = 16 * MIB
"""Larger files of a model are told by their size and 66 pieces of them: hashing 140 GB before every resume would take minutes and fill the
pool with page cache. A file made anew differs in all of them; one changed by a few bytes in place may pass."""
_PIECES: Final = 64
_PIECE_BYTES: Final = 64 * KIB


def describe(recipe: Recipe) -> dict[str, Any]:
    """The content of ``environment.json``: versions, machine, recipe, and what data and model hold."""
    return {
        "versions": versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "recipe": recipe.to_dict(),
        "recipe_fingerprint": recipe.fingerprint,
        "data": _data(recipe.data, recipe.format),
        **({"held_out": _data(recipe.held_out, recipe.format)} if isinstance(recipe.held_out, str) else {}),
        "model": model_manifest(recipe.model),
    }


def versions() -> dict[str, str | None]:
    """Package to its version; None for one that is not there. Python's own stands beside them."""
    found: dict[str, str | None] = {"python": ".".join(platform.python_version_tuple()[:2])}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def model_manifest(model: str) -> dict[str, Any]:
    """Where the model's files are, and the size and hash of each; no files where the hub's have not been fetched yet."""
    folder = _folder(model)
    files: dict[str, Any] = {}
    for file in sorted(folder.iterdir()) if folder is not None else ():
        if file.suffix in (".json", ".safetensors", ".jinja", ".model", ".txt") and file.is_file():
            size = file.stat().st_size
            files[file.name] = {"bytes": size, "sha256": _whole(file)} if size <= WHOLE_BYTES else {"bytes": size, "pieces_sha256": _pieces(file, size)}
    return {"source": model, "files": files}


def complete(directory: RunDirectory) -> None:
    """Fills in what was not there at the start: the files of a model that the worker has fetched from the hub."""
    environment = directory.read_json("environment")
    model = environment.get("model")
    if isinstance(model, dict) and not model.get("files"):
        write_json(directory.path / "environment.json", {**environment, "model": model_manifest(directory.recipe.model)})


def changes(directory: RunDirectory, names: Collection[str] = NAMES) -> dict[str, str]:
    """What of ``names`` is not as it was when the run started, by name, and how; empty where nothing has changed. Nothing else is read."""
    was, recipe = directory.read_json("environment"), directory.recipe
    looks: dict[str, Callable[[], str]] = {
        "recipe": lambda: _recipe_change(was, recipe),
        "data": lambda: _data_change(was.get("data"), recipe.data, recipe.format),
        "held_out": lambda: _data_change(was.get("held_out"), recipe.held_out, recipe.format) if isinstance(recipe.held_out, str) else "",
        "model": lambda: _model_change(was.get("model"), recipe.model),
        "versions": lambda: _versions_change(was.get("versions")),
    }
    return {name: one_line(how, 600) for name, look in looks.items() if name in names and (how := look())}


def check(directory: RunDirectory, accept: Collection[str] = ()) -> dict[str, str]:
    """Raises :class:`RunChanged`, which names all that has changed and is not accepted; returns what has and is, and makes it the new start."""
    unknown = sorted(set(accept) - set(NAMES))
    if unknown:
        raise RunError(f"there is nothing called {', '.join(map(repr, unknown))} to accept", f"use some of {', '.join(NAMES)}")
    found = changes(directory)
    named = {"data": directory.recipe.data, "held_out": directory.recipe.held_out}
    gone = missing(directory.recipe)
    refused = [name for name in found if name not in accept or named.get(name) in gone]  # what is not there cannot be accepted
    if refused:
        names = ", ".join(f'"{name}"' for name in found)
        if gone:
            fix = put_back(gone)
        else:
            fix = f"put it back as it was; or go on with it: run.resume(accept=({names},)), sparklab resume {directory.path} --accept {' '.join(found)}"
        raise _changed(directory, found, refused, fix)
    if found:
        before = directory.read_json("environment")
        history, told = before.pop("before", []), before.pop("accepted", [])
        now = {**describe(directory.recipe), "accepted": [*told, found], "before": [*history, before]}
        write_json(directory.path / "environment.json", now)
    return found


def check_same(directory: RunDirectory, names: Collection[str]) -> None:
    """Raises :class:`RunChanged` where one of ``names`` is not as it was: what the run learned would be measured against something else."""
    found = changes(directory, names)
    if found:
        raise _changed(directory, found, found, "put it back as it was, or train anew on what is there now")


def _changed(directory: RunDirectory, found: dict[str, str], refused: Collection[str], fix: str) -> RunChanged:
    listed = "".join(f"\n  - {name}: {how}" for name, how in found.items() if name in refused)
    error = RunChanged(f"{directory.path} was started with something else than what lies there now:{listed}", fix)
    error.changed = tuple(found)
    return error


def missing(recipe: Recipe) -> list[str]:
    """Files and directories of records that the recipe names and that are not there."""
    return [data for data in (recipe.data, recipe.held_out) if isinstance(data, str) and os.path.isabs(data) and not _is_there(data)]


def put_back(gone: Sequence[str]) -> str:
    """What mends that."""
    return f"put {' and '.join(gone)} back where it was, or a link to where it is now"


def _is_there(data: str) -> bool:
    """Whether the file or directory is, whose name may say a split behind a ``#``."""
    return os.path.exists(data) or os.path.exists(data.rpartition("#")[0])


def change_recipe(directory: RunDirectory, changes: dict[str, Any]) -> None:
    """Writes the recipe anew with ``changes``. Raises :class:`RecipeError` for what cannot be, or cannot be changed on the way, and RunBusy."""
    recipe = directory.recipe.replace(**changes)
    fixed = sorted(set(changes) - MAY_CHANGE)
    if fixed:
        was = directory.recipe
        each = ", ".join(f"{name} ({one_line(getattr(was, name), 60)} in this run, {one_line(changes[name], 60)} asked)" for name in fixed)
        anew = ", ".join(f"{name}={one_line(repr(changes[name]), 60)}" for name in fixed)
        raise RecipeError(
            f"{each} cannot change on the way: weights, optimizer, schedule or rows would no longer be those of the checkpoint",
            f"start a new run with it: sl.train(sl.Run.open({str(directory.path)!r}).recipe.replace({anew})), or sparklab train; "
            f"a resume may change {', '.join(sorted(MAY_CHANGE))}",
        )
    held = directory.lock()
    try:  # with the lock, so that of two who come at once one is refused
        recipe_change = changes_of_recipe(directory)
        if recipe_change:
            raise RunChanged(f"{directory.path}: recipe.json was changed already: {recipe_change}", "resume it with accept=('recipe',) first, or put it back")
        write_json(directory.path / "recipe.json", recipe.to_dict())
    finally:
        release(held)


def changes_of_recipe(directory: RunDirectory) -> str:
    """What stands in recipe.json that the run was not started with; "" where it is as it was."""
    return _recipe_change(directory.read_json("environment"), directory.recipe)


def accepted(directory: RunDirectory) -> list[dict[str, str]]:
    """What was accepted at each resume that accepted something, in their order."""
    found = directory.read_json("environment").get("accepted", [])
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def _recipe_change(was: dict[str, Any], recipe: Recipe) -> str:
    old = was.get("recipe")
    if not isinstance(old, dict):
        return "nobody wrote down what it was"
    now = Recipe.from_dict(recipe.to_dict()).to_dict()
    try:
        then = Recipe.from_dict(old).to_dict()
    except (SparklabError, TypeError, ValueError):
        return "what it was cannot be read"
    return "; ".join(f"{name} was {then[name]!r}, is {now[name]!r}" for name in now if now[name] != then[name])


def _data(data: str, form: str) -> dict[str, Any]:
    """What the data is: a file's size and hash, or the fingerprint of all that a directory or a hub data set holds."""
    path = Path(data)
    if not path.is_file():
        return {"path": data, "fingerprint": open_source(data, form).fingerprint}
    return {"path": str(path.resolve()), "bytes": path.stat().st_size, "sha256": _whole(path)}


def _data_change(was: Any, data: str, form: str) -> str:
    if not isinstance(was, dict) or not ("sha256" in was or "fingerprint" in was):
        return f"nobody wrote down what {data} held"
    try:
        if "fingerprint" in was:
            return "" if open_source(data, form).fingerprint == was["fingerprint"] else f"{data} holds something else"
        return _file_change(was, data)
    except OSError as error:
        return f"{data} cannot be read: {reason(error)}"
    except SparklabError as error:
        return error.fact


def _file_change(was: dict[str, Any], data: str) -> str:
    """Asks for the kind and the size first: a device has no end, and a hash of the wrong size need not be made."""
    status, size = os.stat(data), was.get("bytes")
    if not stat.S_ISREG(status.st_mode):
        return f"{data} is no file any more"
    if status.st_size != size:
        return f"{data} has {status.st_size:,} bytes, and had {size:,}" if isinstance(size, int) else f"nobody wrote down the size of {data}"
    return "" if _whole(Path(data)) == was["sha256"] else f"{data} has other content of the same size"


def _model_change(was: Any, model: str) -> str:
    if not isinstance(was, dict) or not isinstance(was.get("files"), dict):
        return f"nobody wrote down what {model} held"
    try:
        now = model_manifest(model)["files"]
    except OSError as error:
        return f"{model} cannot be read: {reason(error)}"
    if not now:
        return f"{model} is not here: fetch it, or point at its directory" if was["files"] else ""
    differing = sorted(name for name in {*now, *was["files"]} if now.get(name) != was["files"].get(name))
    return f"{model}: {', '.join(differing[:8])} {'is' if len(differing) == 1 else 'are'} not as before" if differing else ""


def _versions_change(was: Any) -> str:
    if not isinstance(was, dict):
        return "nobody wrote them down"
    return "; ".join(f"{name} was {was.get(name)}, is {version}" for name, version in versions().items() if was.get(name) != version)


def _folder(model: str) -> Path | None:
    """The directory of a model's files; of a hub model, the snapshot in the cache. None where there is none on this disk."""
    path = TINY_PATH if model == "tiny" else Path(model).expanduser()
    if path.is_dir():
        return path
    from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415 - only a hub name needs it

    try:
        cached = try_to_load_from_cache(model, "config.json")
    except ValueError:  # no name that the hub could have
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def _whole(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _pieces(file: Path, size: int) -> str:
    """A hash of the first MiB (a safetensors file's table of contents), 64 pieces spread evenly, and the end."""
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        digest.update(opened.read(MIB))
        for piece in range(_PIECES + 1):
            opened.seek((size - _PIECE_BYTES) * piece // _PIECES)
            digest.update(opened.read(_PIECE_BYTES))
    return digest.hexdigest()
