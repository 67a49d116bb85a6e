"""The doctor: what about this machine would spoil a run, each finding with its figures and the one line that mends it.

Nothing heavy is loaded here; torch is asked in a process of its own. What is known of unified boxes was published by
others and is not measured by us on one.
"""

from __future__ import annotations

import html
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from sparklab.box.box import Box
from sparklab.box.detect import Runner, detect_facts, run_command
from sparklab.box.meter import read_usable
from sparklab.box.others import CACHE, SWAP
from sparklab.box.watchdog import read_pressure, read_sizes
from sparklab.units import GIB, NA, format_bytes, is_na

Level = Literal["ok", "note", "warning", "fault"]
LEVELS: Final = ("ok", "note", "warning", "fault")
EXIT_STATUS: Final = {"ok": 0, "note": 0, "warning": 3, "fault": 4}
SECONDS_FOR_TORCH: Final = 120.0
LEAST_DISK: Final = 10 * GIB  # free on the disk where nothing is said of a run
TORCH: Final = """
import json, torch
told = {"version": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip, "available": torch.cuda.is_available(), "devices": []}
if told["available"]:
    told["architectures"] = torch.cuda.get_arch_list()
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        told["devices"].append({"name": device.name, "capability": [device.major, device.minor], "integrated": bool(getattr(device, "is_integrated", 0))})
print(json.dumps(told))
"""


@dataclass(frozen=True)
class Finding:
    """One thing looked at. ``level``: ok; note (good to know); warning (will hurt some day); fault (training will fail, or not use the GPU)."""

    name: str
    level: Level
    fact: str
    fix: str = ""
    """One line that mends it; "" where there is nothing to mend."""


@dataclass(frozen=True, repr=False)
class Checkup:
    """All findings. ``exit_status``: 0 nothing to mend, 3 warnings, 4 faults (1 and 2 are the command line's own)."""

    findings: tuple[Finding, ...]

    @property
    def worst(self) -> Level:
        """The gravest level there is."""
        return max((finding.level for finding in self.findings), key=LEVELS.index, default="ok")

    @property
    def exit_status(self) -> int:
        """What the command line exits with."""
        return EXIT_STATUS[self.worst]

    def __getitem__(self, name: str) -> Finding:
        """The finding of a name; KeyError where it was not looked at."""
        return {finding.name: finding for finding in self.findings}[name]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"worst": self.worst, "findings": [asdict(finding) for finding in self.findings]}

    def __repr__(self) -> str:
        counts = ", ".join(f"{count} {level}" for level in reversed(LEVELS) if (count := sum(finding.level == level for finding in self.findings)))
        return f"Checkup({counts})"

    def __str__(self) -> str:
        wide, level = max(len(finding.name) for finding in self.findings), max(len(finding.level) for finding in self.findings)
        lines = []
        for finding in self.findings:
            lines.append(f"{finding.level:<{level}}  {finding.name:<{wide}}  {finding.fact}")
            if finding.fix:
                lines.append(f"{'':<{level}}  {'':<{wide}}  Fix: {finding.fix}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        cell = 'style="text-align:left;vertical-align:top;padding:2px 12px 2px 0;border:0;background:none"'
        body = ""
        for finding in self.findings:
            fix = f'<br><code style="user-select:all">{html.escape(finding.fix)}</code>' if finding.fix else ""
            mark = f"<b>{finding.level}</b>" if finding.level in ("warning", "fault") else finding.level
            cells = (mark, html.escape(finding.name), html.escape(finding.fact) + fix)
            body += '<tr style="background:none">' + "".join(f"<td {cell}>{content}</td>" for content in cells) + "</tr>"
        return f'<table style="border-collapse:collapse;border:0">{body}</table>'


def installed(name: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def wanted(name: str) -> SpecifierSet:
    """The versions of a package that this sparklab asks for, also by an extra, as its own metadata says; any where it says nothing."""
    try:
        asked = map(Requirement, importlib.metadata.requires("sparklab") or ())
        return next((one.specifier for one in asked if canonicalize_name(one.name) == name), SpecifierSet())
    except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
        return SpecifierSet()


def home_of(name: str) -> Path | None:
    """The directory of a package, which is not loaded for it."""
    found = importlib.util.find_spec(name)
    return Path(found.origin).parent if found is not None and found.origin else None


def torch_facts() -> dict[str, Any]:
    """What torch says of itself and its devices, in a process of its own; ``{"error": last line}`` where it cannot be loaded."""
    try:
        done = subprocess.run([sys.executable, "-c", TORCH], capture_output=True, text=True, timeout=SECONDS_FOR_TORCH, check=False)
        if done.returncode == 0:
            told: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
            return told
        return {"error": (done.stderr.strip().splitlines() or ["no word"])[-1][:300]}
    except (OSError, ValueError, IndexError, subprocess.SubprocessError) as error:
        return {"error": str(error)[:300]}


def free_disk(path: Path) -> float:
    """Bytes that are free on the disk of a path."""
    return float(shutil.disk_usage(path).free)


@dataclass(frozen=True)
class Machine:
    """What the checks look at; each part can be another machine's, for tests."""

    root: Path = Path("/")
    run: Runner = run_command
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    version: Callable[[str], str | None] = installed
    wanted: Callable[[str], SpecifierSet] = wanted
    folder: Callable[[str], Path | None] = home_of
    ask_torch: Callable[[], dict[str, Any]] = torch_facts
    free_disk: Callable[[Path], float] = free_disk


class Examination:
    """All checks on one machine; :meth:`findings` makes them. ``disk``: where a run will write and how much, in bytes."""

    def __init__(self, machine: Machine, disk: tuple[Path, float] | None = None) -> None:
        self.machine, self.disk = machine, disk
        self.box = Box(**detect_facts(machine.root, machine.run))
        self.memory = read_usable(machine.root / "proc", unified=self.box.unified)
        self.torch = machine.ask_torch()
        devices = self.torch.get("devices") or []
        self.capability = tuple(devices[0]["capability"]) if devices else (0, 0)

    def findings(self) -> list[Finding]:
        """Every check, in the order people mend things."""
        checks = (self._torch, self._false_warning, self._bitsandbytes, self._liger, self._ptxas, self._segments, self._available, self._tenants, self._swap,
                  self._cache, self._guard, self._container, self._disk, self._jupyter)  # fmt: skip
        return [finding for check in checks for finding in check()]

    # what computes

    def _torch(self) -> Iterator[Finding]:
        told = self.torch
        if "error" in told:
            yield Finding("torch", "fault", f"torch cannot be loaded: {told['error']}", "pip install --force-reinstall torch")
            return
        gpu, version = self.box.is_gpu, told["version"]
        if told["available"]:
            yield Finding("torch", "ok", f"torch {version} (CUDA {told['cuda'] or told['hip']}) sees {len(told['devices'])} x {told['devices'][0]['name']}")
            if told["cuda"] and int(told["cuda"].split(".")[0]) < 13 and self.capability >= (12, 1):
                yield Finding("CUDA version", "warning", f"torch {version} was built for CUDA {told['cuda']}; on this chip CUDA 13 was published to be 2.86 "
                              "times as fast", "pip install --upgrade torch")  # fmt: skip
        elif gpu and told["cuda"] is None:
            yield Finding("torch", "fault", f"torch {version} is built for CPUs alone, and there is a GPU: {self.box.chip}",
                          f"pip install --force-reinstall --no-deps torch=={version.partition('+')[0]}  # the default wheel has CUDA")  # fmt: skip
        elif gpu:
            yield Finding("torch", "fault", f"torch {version} (CUDA {told['cuda']}) cannot use the GPU that nvidia-smi sees: {self.box.chip}",
                          "update the NVIDIA driver to one for this CUDA, or start the container with --gpus all")  # fmt: skip
        else:
            yield Finding("torch", "ok", f"torch {version}; no GPU here, the CPU computes")

    def _false_warning(self) -> Iterator[Finding]:
        if self.capability == (12, 1) and "sm_121" not in self.torch.get("architectures", []):
            yield Finding("sm_121 warning", "note", "torch warns of 'capability 12.1' and a maximum of 12.0: a false alarm, code for sm_120 runs on sm_121")

    def _bitsandbytes(self) -> Iterator[Finding]:
        version, folder = self.machine.version("bitsandbytes"), self.machine.folder("bitsandbytes")
        if version is None or folder is None:
            yield Finding("bitsandbytes", "fault", "bitsandbytes is not installed; NF4 (qlora) and 8-bit AdamW need it", "pip install bitsandbytes")
            return
        cuda = self.torch.get("cuda")
        if not cuda or not self.torch.get("available"):
            yield Finding("bitsandbytes", "ok", f"bitsandbytes {version}")
            return
        there = sorted(match[1] for path in folder.glob("libbitsandbytes_cuda*") if (match := re.match(r"libbitsandbytes_cuda(\d+)\.", path.name)))
        asked = self.machine.environ.get("BNB_CUDA_VERSION", "")
        wanted = asked or cuda.replace(".", "")
        if wanted in there:
            yield Finding("bitsandbytes", "ok", f"bitsandbytes {version} with its library for CUDA {wanted}{' (BNB_CUDA_VERSION)' if asked else ''}")
            return
        nearest = max((one for one in there if one[:2] == wanted[:2]), default=max(there, default=""))
        fact = f"bitsandbytes {version} has no library for CUDA {wanted}{' (BNB_CUDA_VERSION)' if asked else ''}, only for {', '.join(there) or 'none'}"
        yield Finding("bitsandbytes", "fault", fact, f"export BNB_CUDA_VERSION={nearest}" if nearest else "pip install --upgrade bitsandbytes")

    def _liger(self) -> Iterator[Finding]:
        if not self.torch.get("cuda") or not self.torch.get("available"):
            return
        version, wanted = self.machine.version("liger-kernel"), self.machine.wanted("liger-kernel")
        if version is None:
            yield Finding("Liger", "note", "CUDA here, and liger-kernel is not installed: norms, rotary positions and SwiGLU run in sparklab's own PyTorch",
                          "pip install 'sparklab[gpu]'")  # fmt: skip
        elif not wanted.contains(version, prereleases=True):
            yield Finding("Liger", "note", f"liger-kernel {version} is not one that sparklab was written against ({wanted}); it is tried before it is used",
                          "pip install 'sparklab[gpu]'")  # fmt: skip
        else:
            yield Finding("Liger", "ok", f"liger-kernel {version}")

    def _ptxas(self) -> Iterator[Finding]:
        if self.machine.version("triton") is None or self.capability < (12, 1):
            return
        asked = self.machine.environ.get("TRITON_PTXAS_PATH", "")
        toolkit = "/usr/local/cuda/bin/ptxas"
        if asked and Path(asked).is_file():
            yield Finding("ptxas", "ok", f"TRITON_PTXAS_PATH is {asked}")
        else:
            fact = f"TRITON_PTXAS_PATH is {asked!r}, which does not exist" if asked else "triton's own ptxas may not know this chip ('sm_121a is not defined')"
            has = (self.machine.root / toolkit.lstrip("/")).is_file()
            yield Finding("ptxas", "warning", fact, f"export TRITON_PTXAS_PATH={toolkit}" if has else "install the CUDA toolkit, then export TRITON_PTXAS_PATH")

    def _segments(self) -> Iterator[Finding]:
        if not self.torch.get("available"):
            return
        name = "PYTORCH_CUDA_ALLOC_CONF"
        said = self.machine.environ.get(name, "") or self.machine.environ.get("PYTORCH_ALLOC_CONF", "")
        on = "expandable_segments:true" in said.lower()
        tegra = (self.machine.root / "etc/nv_tegra_release").exists() or any(word in self.box.chip for word in ("Thor", "Orin"))
        if tegra and on:
            yield Finding("expandable segments", "fault", f"they must be off on this chip ({self.box.chip})", f"unset {name}")
        elif not on and not tegra and self.box.unified:
            yield Finding("expandable segments", "note", "off; on unified boxes most report less fragmentation with them, some the opposite",
                          f"export {name}=expandable_segments:True")  # fmt: skip
        else:
            yield Finding("expandable segments", "ok", "on" if on else "off")

    # the pool

    def _available(self) -> Iterator[Finding]:
        available, total, reserve = self.memory.available_bytes, self.memory.total_bytes, self.box.reserve_bytes
        if is_na(available):
            yield Finding("memory", "note", "the system does not tell how much memory is available")
            return
        fact = f"{format_bytes(available)} available of {format_bytes(total)}; {format_bytes(reserve)} stay free for the system"
        level: Level = "fault" if available < reserve else "warning" if available < 2 * reserve else "ok"
        yield Finding("memory", level, fact, "" if level == "ok" else "close what is named below")

    def _tenants(self) -> Iterator[Finding]:
        held = {name: size for name, size in self.box.held.items() if name not in (SWAP, CACHE)}
        where = "memory" if self.box.unified or not self.box.is_gpu else "the GPU's memory"
        if not held:
            yield Finding("other tenants", "ok", f"no other process holds 0.5 GiB of {where}")
            return
        share = sum(held.values()) / self.box.memory_bytes
        told = ", ".join(f"{name} {format_bytes(size)}" for name, size in held.items())
        yield Finding("other tenants", "warning" if share >= 0.1 else "note", f"{share:.0%} of {where} is held by {told}", "close what is not needed")

    def _swap(self) -> Iterator[Finding]:
        used = self.memory.swap_used_bytes
        total = _swap_total(self.machine.root)
        if not total:
            yield Finding("swap", "ok", "off" if total == 0 else "unknown")
        elif self.box.unified:
            yield Finding("swap", "warning", f"{format_bytes(total)} on, {format_bytes(used)} used: a unified box that runs out of memory freezes in it, where "
                          "without swap only the job would die", "sudo swapoff -a")  # fmt: skip
        elif used >= 0.5 * GIB:
            yield Finding(
                "swap", "note", f"{format_bytes(used)} lie in swap and come back into memory when their owners run", "sudo swapoff -a && sudo swapon -a"
            )
        else:
            yield Finding("swap", "ok", f"{format_bytes(total)} on, {format_bytes(used)} used")

    def _cache(self) -> Iterator[Finding]:
        cached = self.memory.cached_bytes
        if self.box.unified and cached > 0.1 * self.memory.total_bytes:
            yield Finding("page cache", "note", f"{format_bytes(cached)} are page cache: they count as available here and as used in torch.cuda.mem_get_info",
                          "sudo sh -c 'sync; echo 1 > /proc/sys/vm/drop_caches'  # where a plan says it stands in its way")  # fmt: skip
        else:
            yield Finding("page cache", "ok", f"{format_bytes(cached)}, given back when asked")

    def _guard(self) -> Iterator[Finding]:
        if is_na(self.memory.available_bytes) or not hasattr(os, "pidfd_open"):
            yield Finding(
                "guard", "warning", "the guard cannot watch the memory here: it needs Linux and /proc/meminfo", "train on Linux, or watch it yourself"
            )
        elif is_na(read_pressure(self.machine.root / "proc/pressure/memory")["full"]):
            yield Finding("guard", "note", "the kernel does not tell how long tasks wait for memory (PSI); the guard goes by MemAvailable and swap alone",
                          "boot with psi=1")  # fmt: skip
        else:
            yield Finding("guard", "ok", "it can read MemAvailable, swap traffic and PSI")

    def _container(self) -> Iterator[Finding]:
        limit, room = self.memory.limit_bytes, self.memory.room_bytes
        if is_na(limit):
            return
        told = f"this container may have {format_bytes(limit)}, of which {format_bytes(room)} are left"
        if self.box.unified and self.box.is_gpu:
            yield Finding("container", "note", f"{told}; that limit does not hold what CUDA takes on a unified box, the guard does")
        else:
            yield Finding("container", "ok", f"{told}: plans and guard go by that")

    # where it is written and shown

    def _disk(self) -> Iterator[Finding]:
        path, needed = self.disk or (Path.cwd(), 0.0)
        existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        free = self.machine.free_disk(existing)
        if self.disk is None:
            level: Level = "warning" if free < LEAST_DISK else "ok"
            yield Finding(
                "disk", level, f"{format_bytes(free)} free here", "" if level == "ok" else "free some space: checkpoints are written whole beside the old ones"
            )
            return
        level = "fault" if free < needed else "warning" if free < 2 * needed else "ok"
        fact = f"{format_bytes(free)} free on the disk of {path}; checkpoints and result take up to {format_bytes(needed)}"
        yield Finding("disk", level, fact, "" if level == "ok" else "free some space, choose another disk, or keep fewer checkpoints (keep_checkpoints)")

    def _jupyter(self) -> Iterator[Finding]:
        kernel, lab, widgets = (self.machine.version(name) for name in ("ipykernel", "jupyterlab", "anywidget"))
        if kernel is None:
            yield Finding("Jupyter", "note", "no ipykernel here: panels need a notebook; `sparklab watch` needs none")
            return
        told = f"ipykernel {kernel}, JupyterLab {lab or 'not installed here'}, anywidget {widgets or 'not installed'}"
        if widgets is None:
            yield Finding("Jupyter", "fault", f"{told}: panels cannot be drawn", "pip install anywidget")
        elif kernel.startswith("7.4."):
            yield Finding("Jupyter", "note", f"{told}: this ipykernel can send a button's click to a shell that is gone after a reload; ours work "
                          "round it, other widgets' may hang", "pip install --upgrade ipykernel")  # fmt: skip
        else:
            yield Finding("Jupyter", "ok", told)


def _swap_total(root: Path) -> float:
    """Bytes of swap there are; NA where the system does not tell."""
    return read_sizes(root / "proc/meminfo").get("SwapTotal", NA)
