"""The box: how much memory a plan may use and how fast the chip can go, each figure with its source."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from sparklab.box.calibration import calibrated
from sparklab.box.detect import detect_facts
from sparklab.box.others import CACHE, SWAP
from sparklab.box.profiles import PROFILES
from sparklab.errors import BoxError
from sparklab.units import NA, format_bytes, is_na, jsonable

_LABELS = {
    "chip": "chip",
    "memory_bytes": "memory the system sees",
    "available_bytes": "available now",
    "reserve_bytes": "kept free for the system",
    "runtime_bytes": "Python, libraries and device context",
    "bandwidth_bytes_per_second": "memory bandwidth",
    "bf16_flops": "dense bf16",
    "fp32_flops": "fp32",
    "power_watts": "power while training",
}


@dataclass(frozen=True, kw_only=True, repr=False)
class Box:
    """A machine to train on. Sizes in bytes, rates per second; ``NA`` where nobody knows.

    Memory, bandwidth and FLOP/s are those of one device; ``power_watts`` is that of all devices together. Get one from :meth:`detect` or :meth:`profile`.
    """

    name: str
    """``this`` for a detected machine, else the profile's name."""
    chip: str
    """What computes: the GPU's name, or the CPU's."""
    memory_bytes: float
    """Memory of one device, all that the system sees of it."""
    unified: bool
    """CPU and GPU share one pool of memory."""
    bandwidth_bytes_per_second: float = NA
    """Memory bandwidth of one device."""
    bf16_flops: float = NA
    """Dense bf16 FLOP/s of one device; ``NA`` where the chip does not compute in bf16."""
    fp32_flops: float = NA
    """fp32 FLOP/s of one device."""
    has_native_bf16: bool = False
    """The chip multiplies matrices in bf16; if not, a recipe's ``dtype="auto"`` means fp32."""
    power_watts: float = NA
    """Draw of the whole box while training."""
    devices: int = 1
    """How many devices work side by side. Their memory is not one pool."""
    is_gpu: bool = True
    """A GPU computes; if not, the CPU does."""
    available_bytes: float = NA
    """What was available when the box was detected; ``NA`` for a profile."""
    held: Mapping[str, float] = field(default_factory=dict)
    """What else held memory when the box was detected, in bytes: processes by name, ``swap``, ``page cache``; empty for a profile."""
    reserve_bytes: float = 0.0
    """Memory that no plan may touch, so that the system never runs dry."""
    runtime_bytes: float = 0.0
    """What Python with torch and transformers, and the device context, take before any tensor."""
    slack_share: float = NA
    """What the allocator holds beyond what comes and goes, as a share of it; ``NA`` until a rehearsal measures it."""
    compute_shares: Mapping[str, float] = field(default_factory=dict)
    """Share of the chip's FLOP/s that training reached, by method and type (``"lora bf16"``), as far as rehearsals measured it."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """Field name to ``spec``, ``published``, ``measured`` or ``assumed``."""
    note: str = ""
    """What a reader must know to read the figures rightly."""

    @classmethod
    def detect(cls) -> Box:
        """This machine, now, with what rehearsals measured on it. Reads /proc and, where present, nvidia-smi or sysctl; ``NA`` where unknown.

        Loads nothing; takes milliseconds without a GPU.
        """
        return cls(**calibrated(detect_facts()))

    @classmethod
    def profile(cls, name: str) -> Box:
        """A box by name (see :meth:`names`); ``this`` detects. Raises :class:`BoxError` for any other name."""
        if name == "this":
            return cls.detect()
        if name not in PROFILES:
            raise BoxError(f"No box is called {name!r}", f"use one of: {', '.join(cls.names())}")
        return cls(name=name, **PROFILES[name])

    @classmethod
    def of(cls, box: Box | str | None) -> Box:
        """``box`` itself, the one that is called so, or this machine for None. Raises :class:`BoxError` for anything else."""
        if isinstance(box, Box):
            return box
        if box is not None and not isinstance(box, str):
            raise BoxError(f"box is of type {type(box).__name__}", f"a sl.Box, or one of: {', '.join(cls.names())}")
        return cls.profile(box or "this")

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The names :meth:`profile` knows."""
        return (*PROFILES, "this")

    @property
    def usable_bytes(self) -> float:
        """Memory a plan may fill on one device: what is available now (a profile: all there is) less the reserve."""
        have = self.memory_bytes if is_na(self.available_bytes) else self.available_bytes
        return NA if is_na(have) else max(0.0, have - self.reserve_bytes)

    def in_the_way(self, needed_bytes: float) -> tuple[str, ...]:
        """What else holds the memory that a plan of ``needed_bytes`` would need, in words; nothing where it is not in the way."""
        idle = self.memory_bytes - self.reserve_bytes
        if is_na(idle) or needed_bytes > idle:  # too large for the box itself
            return ()
        swap, cache = self.held.get(SWAP, 0.0), self.held.get(CACHE, 0.0)
        processes = [f"{name} {format_bytes(size)}" for name, size in self.held.items() if name not in (SWAP, CACHE)]
        notes = []
        if needed_bytes > self.usable_bytes and processes:
            notes.append(f"with nothing else running it would fit ({format_bytes(idle)}): memory is held by {', '.join(processes)}")
        if swap and needed_bytes + swap > self.usable_bytes:
            notes.append(f"{format_bytes(swap)} lie in swap and come back into memory when their owners run")
        if cache and self.is_gpu and self.usable_bytes - cache < needed_bytes <= self.usable_bytes:
            notes.append(f"{format_bytes(cache)} of the usable memory are page cache, which a GPU does not always get at once: "
                         "`sudo sh -c 'sync; echo 1 > /proc/sys/vm/drop_caches'` empties it")  # fmt: skip
        return tuple(notes)

    def resolve_dtype(self, dtype: str) -> str:
        """``auto`` as ``bf16`` where the chip computes it natively, else ``fp32``; any other name unchanged."""
        return dtype if dtype != "auto" else "bf16" if self.has_native_bf16 else "fp32"

    def compute_flops(self, dtype: str) -> float:
        """FLOP/s of one device for matrices of ``dtype`` (``bf16``, ``fp32`` or ``auto``).

        bf16 on a chip without it is emulated at no more than the fp32 rate.
        """
        resolved = self.resolve_dtype(dtype)
        if resolved not in ("bf16", "fp32"):
            raise BoxError(f"compute_flops knows no type {dtype!r}", "use 'bf16', 'fp32' or 'auto'")
        return self.bf16_flops if resolved == "bf16" and not is_na(self.bf16_flops) else self.fp32_flops

    def to_dict(self) -> dict[str, Any]:
        """Fields for JSON, and ``usable_bytes``; unknown is None."""
        values: dict[str, Any] = jsonable({**asdict(self), "usable_bytes": self.usable_bytes})
        return values

    def __repr__(self) -> str:
        many = f"{self.devices} x " if self.devices > 1 else ""
        memory = f"{format_bytes(self.usable_bytes)} usable of {format_bytes(self.memory_bytes)}{' unified' if self.unified else ''}"
        return f"Box({self.name}: {many}{self.chip}, {memory})"

    def rows(self) -> list[tuple[str, str, str]]:
        """(what, figure, source) for every figure, as the tables show them."""
        rows = []
        for name, label in _LABELS.items():
            source = self.sources.get(name, "")
            if name == "available_bytes" and is_na(self.available_bytes):
                continue
            rows.append((label, self._show(name), source))
        if not is_na(self.slack_share):
            rows.append(("allocator slack", f"{self.slack_share:.1%}", self.sources.get("slack_share", "")))
        rows += [(f"compute reached, {kind}", f"{share:.1%}", self.sources.get("compute_shares", "")) for kind, share in self.compute_shares.items()]
        rows.append(("usable by a plan", format_bytes(self.usable_bytes), "computed"))
        return rows

    def _show(self, name: str) -> str:
        value = getattr(self, name)
        if name == "chip":
            return f"{self.devices} x {value}" if self.devices > 1 else str(value)
        each = " each" if self.devices > 1 and name != "power_watts" else ""
        if is_na(value):
            return "none" if name == "bf16_flops" and not self.has_native_bf16 else "N/A"
        if name == "bandwidth_bytes_per_second":
            return f"{value / 1e9:,.0f} GB/s{each}"
        if name.endswith("_flops"):
            return f"{value / 1e12:.3g} TFLOP/s{each}"
        return f"{value:.0f} W" if name == "power_watts" else format_bytes(value) + each

    def describe(self) -> str:
        """The figures with their sources, for a terminal."""
        rows = self.rows()
        wide, figure = max(len(row[0]) for row in rows), max(len(row[1]) for row in rows)
        lines = [f"{self.name}"] + [f"  {what:<{wide}}  {value:>{figure}}  {source}".rstrip() for what, value, source in rows]
        return "\n".join(lines + ([f"  {self.note}"] if self.note else []))

    def __str__(self) -> str:
        return self.describe()

    def _repr_html_(self) -> str:
        cell = 'style="text-align:left;padding:2px 12px 2px 0;border:0;background:none"'
        body = ""
        for what, value, source in self.rows():
            cells = (html.escape(what), f"<b>{html.escape(value)}</b>", f"<i>{html.escape(source)}</i>")
            body += '<tr style="background:none">' + "".join(f"<td {cell}>{content}</td>" for content in cells) + "</tr>"
        note = f'<div style="max-width:44em">{html.escape(self.note)}</div>' if self.note else ""
        return f'<div><b>{html.escape(self.name)}</b><table style="border-collapse:collapse;border:0">{body}</table>{note}</div>'
