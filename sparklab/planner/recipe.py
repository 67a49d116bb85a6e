"""The recipe: everything one training run depends on, in one frozen value whose ``repr`` is valid Python.

A default lives here and nowhere else: the CLI's flags, the named recipes and the docs derive from these fields.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import hashlib
import inspect
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from sparklab.errors import RecipeError

Method = Literal["full", "lora", "qlora"]
DType = Literal["auto", "bf16", "fp32"]
Loss = Literal["chunked", "full"]
Engine = Literal["fast", "stock"]
Optimizer = Literal["adamw", "adamw_8bit"]
Schedule = Literal["cosine", "linear", "constant"]
Retry = Literal["none", "smaller"]
OnLong = Literal["truncate", "split", "drop", "error"]
Format = Literal["auto", "messages", "sharegpt", "prompt", "instruction", "text", "preference", "chosen"]
Template = Literal["auto", "none", "chatml", "llama2", "llama3", "mistral", "gemma", "phi3", "zephyr", "vicuna"]
Learn = Literal["assistant", "completion", "last", "all"]
OnBad = Literal["error", "skip"]
Overrule = Literal["mismatch", "special_text"]

METHODS: tuple[Method, ...] = get_args(Method)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to train, on what, and how. Frozen; change it with :meth:`replace`.

    Raises :class:`RecipeError` on construction, naming every field that cannot be.
    """

    model: str
    """A directory with config, weights and tokenizer; a hub name; or ``"tiny"``, the bundled model."""
    data: str
    """Records: a JSONL, JSON, CSV, TSV, Parquet, Arrow or text file, a directory of texts, or a hub data set; ``#split`` at the end names one of several."""
    method: Method = "lora"
    """``full`` trains every weight; ``lora`` adapters on a frozen base; ``qlora`` adapters on a 4-bit (NF4) base."""

    # adapters (ignored by full)
    rank: int = 16
    """Rank of the adapters."""
    alpha: float = 32.0
    """LoRA scaling numerator: the adapter's product is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Dropout on the adapters' input, 0 to 1."""
    targets: str | tuple[str, ...] = "all-linear"
    """``"all-linear"``, ``"attention"`` or the names of the linear layers to adapt."""
    adapter_dtype: DType = "auto"
    """Type of the adapters' weights; auto is the type the base computes in."""
    rank_stabilized: bool = False
    """Scale by alpha / sqrt(rank) instead of alpha / rank (rsLoRA), so that a high rank learns no slower."""
    dora: bool = False
    """Learn the length of each of a weight's rows apart from its direction (DoRA): one more number an output, and a slower step."""
    expert_adapters: bool = False
    """In a mixture, adapt the experts too: each has an A and a B of its own for gate and up, and for down."""
    double_quantization: bool = True
    """QLoRA: quantise the NF4 constants too (0.516 instead of 0.563 bytes a parameter)."""

    # the batch, in tokens
    micro_batch_tokens: int = 2048
    """Tokens in one packed row, the unit of memory: documents stand in it back to back."""
    micro_batches_per_update: int = 1
    """Packed rows whose gradients are summed before the weights move."""
    max_length: int = 2048
    """Longest document in tokens."""
    on_long: OnLong = "truncate"
    """What to do with a longer one."""

    # what is learned from the data
    format: Format = "auto"
    """What the records are; auto recognises them; ``chosen`` trains on the chosen answers of preference pairs alone."""
    template: Template = "auto"
    """Chat template; auto is the tokenizer's own, ``none`` lays prompt and completion end to end, a name is for tokenizers that have none."""
    learn: Learn = "assistant"
    """``assistant``: every turn of the assistant; ``completion``: what follows the last question; ``last``: the last turn; ``all``: every token."""
    on_bad: OnBad = "error"
    """Records that cannot be used: ``error`` refuses the data and names them, ``skip`` writes them to skipped.jsonl in the run directory."""
    overrule: tuple[Overrule, ...] = ()
    """Refusals not to heed: ``mismatch`` trains on text that generation is not prompted with, ``special_text`` makes special tokens of plain text."""

    # the optimisation
    optimizer: Optimizer = "adamw"
    """``adamw`` keeps its two moments in the type of the weights they move; ``adamw_8bit`` in 8 bits with a scale for every 256 (bitsandbytes)."""
    epochs: float = 1.0
    """Passes over the training rows."""
    max_steps: int | None = None
    """Stop after so many updates; a run that ``epochs`` ends sooner is not made longer."""
    learning_rate: float = 2e-4
    """Peak learning rate."""
    schedule: Schedule = "cosine"
    """Shape of the learning rate after warm-up; cosine and linear end at zero."""
    warmup_share: float = 0.03
    """Share of the updates over which the learning rate rises from zero."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the two moments."""
    clip_norm: float = 1.0
    """Gradients longer than this (global L2 norm) are shortened to it."""
    skip_bad_updates: int = 0
    """Updates in a row that are left out when their loss or a gradient is NaN or infinite, before the run stops; 0: it stops at the first."""
    seed: int = 0
    """Seeds adapters, order of rows, dropout and the held-out split."""

    # memory against time
    dtype: DType = "auto"
    """Type the base is held and computed in; auto: bf16 where the chip computes it natively, else fp32."""
    checkpoint_layers: int | Literal["all", "none"] = "none"
    """Layers that recompute their activations in the backward pass instead of keeping them."""
    loss: Loss = "chunked"
    """``chunked`` never holds the [tokens, vocabulary] logits; ``full`` does, as stock transformers."""
    engine: Engine = "fast"
    """``fast``: sparklab's own kernels; ``stock``: the libraries' own code, slower and the reference."""

    # looking on
    held_out: float | str = 0.1
    """Share of the records kept out of training, or data of their own, as ``data`` names it."""
    eval_every: int | None = None
    """Updates between two held-out losses; None: about ten over the run."""
    answer_held_out: int = 0
    """How many held-out records are answered greedily before and after training and compared with the true answer, letter by letter."""
    answer_tokens: int = 128
    """Longest generated answer, in tokens."""
    sample_prompts: tuple[str, ...] = ()
    """Prompts answered at every evaluation, to watch the model change."""
    save_every: int | None = None
    """Updates between two checkpoints; None: about four over the run."""
    keep_checkpoints: int = 2
    """How many checkpoints stay on disk, the newest ones."""
    retry: Retry = "none"
    """Where memory runs out in forward, backward or evaluation: ``none`` ends the run, its last checkpoint kept; ``smaller`` halves what goes through
    the model at once, at equal tokens per update, and goes on from the last update."""
    keep_best: bool = False
    """Save a checkpoint whenever a held-out loss is the lowest so far, and keep the best one beside the newest."""

    # the guard against exhausting the memory of the whole box
    guard: bool = True
    """Save a checkpoint and stop where the system's available memory falls below a floor; be ended below a lower one."""
    soft_floor_gib: float | None = None
    """Available memory in GiB below which a checkpoint is saved and the run stops; None: the box's own."""
    hard_floor_gib: float | None = None
    """Available memory in GiB below which the worker is ended at once; None: the box's own, half the soft one."""

    def __post_init__(self) -> None:
        # JSON and notebooks hand over lists and paths; the frozen value holds tuples and strings.
        for name in ("targets", "betas", "sample_prompts", "overrule"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("model", "data", "held_out"):
            if isinstance(getattr(self, name), Path):
                object.__setattr__(self, name, str(getattr(self, name)))
        faults = list(_faults(self))
        if faults:
            raise RecipeError("This recipe cannot be:\n" + "\n".join(f"  - {fault}" for fault in faults), "change the fields named above")

    def replace(self, **changes: Any) -> Recipe:
        """The same recipe with some fields changed; unknown names raise :class:`RecipeError`."""
        return Recipe(**{**self.to_dict(), **_known(changes)})

    def to_dict(self) -> dict[str, Any]:
        """Field names to values, ready for JSON."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recipe:
        """The inverse of :meth:`to_dict`; unknown names raise :class:`RecipeError`."""
        return cls(**_known(values))

    @property
    def fingerprint(self) -> str:
        """Twelve hex digits that change when any field does."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:12]


@functools.cache
def field_help() -> dict[str, str]:
    """The sentence under each field, for command-line help and docs: it is written once, in the class."""
    (recipe,) = (node for node in ast.parse(inspect.getsource(Recipe)).body if isinstance(node, ast.ClassDef))
    texts: dict[str, str] = {}
    for node, after in itertools.pairwise(recipe.body):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            texts[node.target.id] = str(after.value.value)
    return texts


def _known(values: dict[str, Any]) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(Recipe)]
    unknown = sorted(set(values) - set(names))
    if unknown:
        near = [close for name in unknown for close in difflib.get_close_matches(str(name), names, n=1)]
        fix = f"use {' and '.join(near)}" if len(near) == len(unknown) else f"use one of: {', '.join(names)}"
        raise RecipeError(f"A recipe has no field {', '.join(map(repr, unknown))}", fix)
    return values


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _faults(recipe: Recipe) -> list[str]:
    """Every field that cannot be, in the user's words."""
    faults = []
    for name, choices in (("method", METHODS), ("adapter_dtype", get_args(DType)), ("dtype", get_args(DType)), ("loss", get_args(Loss)),
                          ("optimizer", get_args(Optimizer)), ("engine", get_args(Engine)), ("schedule", get_args(Schedule)), ("on_long", get_args(OnLong)),
                          ("format", get_args(Format)), ("template", get_args(Template)), ("learn", get_args(Learn)), ("on_bad", get_args(OnBad)),
                          ("retry", get_args(Retry))):  # fmt: skip
        if getattr(recipe, name) not in choices:
            faults.append(f"{name} is {getattr(recipe, name)!r}; choose one of {', '.join(choices)}")
    for name, least in (("rank", 1), ("micro_batch_tokens", 1), ("micro_batches_per_update", 1), ("max_length", 1), ("answer_held_out", 0),
                        ("answer_tokens", 1), ("keep_checkpoints", 1), ("seed", 0), ("skip_bad_updates", 0)):  # fmt: skip
        value = getattr(recipe, name)
        if not _is_int(value) or value < least:
            faults.append(f"{name} is {value!r}; it must be a whole number of at least {least}")
    for name in ("max_steps", "eval_every", "save_every"):
        value = getattr(recipe, name)
        if value is not None and (not _is_int(value) or value < 1):
            faults.append(f"{name} is {value!r}; it must be None or a whole number of at least 1")
    for name in ("alpha", "epochs", "learning_rate", "clip_norm"):
        value = getattr(recipe, name)
        if not _is_number(value) or value <= 0:
            faults.append(f"{name} is {value!r}; it must be a number above 0")
    for name in ("dropout", "warmup_share"):
        value = getattr(recipe, name)
        if not _is_number(value) or not 0 <= value < 1:
            faults.append(f"{name} is {value!r}; it must be from 0 up to (not including) 1")
    if not _is_number(recipe.weight_decay) or recipe.weight_decay < 0:
        faults.append(f"weight_decay is {recipe.weight_decay!r}; it must be 0 or more")
    if not (isinstance(recipe.betas, tuple) and len(recipe.betas) == 2 and all(_is_number(beta) and 0 <= beta < 1 for beta in recipe.betas)):
        faults.append(f"betas is {recipe.betas!r}; it must be two numbers from 0 up to 1")
    faults.extend(_faults_between_fields(recipe))
    return faults


def _nameless(recipe: Recipe) -> Iterator[str]:
    for name in ("model", "data"):
        value = getattr(recipe, name)
        if not isinstance(value, str):
            how = "; sl.recipes.lora(model, records) writes records from memory to a file" if name == "data" else ""
            yield f"{name} is of type {type(value).__name__}; it must be a path or a name{how}"
        elif not value:
            yield f"{name} is ''; it must be a path or a name"


def _faults_between_fields(recipe: Recipe) -> list[str]:
    """Faults of fields with a form of their own, or that only show beside another."""
    faults = []
    for name in ("soft_floor_gib", "hard_floor_gib"):
        value = getattr(recipe, name)
        if value is not None and (not _is_number(value) or value <= 0):
            faults.append(f"{name} is {value!r}; it must be None or a number of GiB above 0")
    soft, hard = recipe.soft_floor_gib, recipe.hard_floor_gib
    if _is_number(soft) and _is_number(hard) and soft < hard:  # type: ignore[operator]
        faults.append(f"soft_floor_gib ({soft}) is below hard_floor_gib ({hard}): the run would be ended before it could save")
    if any(word in str(recipe.optimizer).lower() for word in ("paged", "offload")):
        faults.append("paging and offloading an optimizer move it to another pool of memory, and here there is one: adamw_8bit makes it smaller instead")
    unknown = [name for name in recipe.overrule if name not in get_args(Overrule)] if isinstance(recipe.overrule, tuple) else [recipe.overrule]
    if unknown:
        faults.append(f"overrule is {recipe.overrule!r}; it must be a tuple of {', '.join(get_args(Overrule))}")
    layers = recipe.checkpoint_layers
    if layers not in ("all", "none") and (not _is_int(layers) or int(layers) < 0):
        faults.append(f"checkpoint_layers is {layers!r}; it must be 'all', 'none' or a whole number of at least 0")
    if not isinstance(recipe.held_out, str) and (not _is_number(recipe.held_out) or not 0 <= recipe.held_out < 1):
        faults.append(f"held_out is {recipe.held_out!r}; it must be a share from 0 up to 1, or a file of records")
    if _is_int(recipe.max_length) and _is_int(recipe.micro_batch_tokens) and recipe.max_length > recipe.micro_batch_tokens > 0:
        faults.append(f"max_length ({recipe.max_length}) is longer than a packed row (micro_batch_tokens {recipe.micro_batch_tokens})")
    if recipe.expert_adapters and recipe.method != "full":
        for name, given in (("dropout", recipe.dropout), ("dora", recipe.dora)):
            if given:
                faults.append(f"{name} is {given!r} beside expert_adapters; PEFT has no {name} for experts: leave one of the two out")
    faults.extend(_nameless(recipe))
    return faults
