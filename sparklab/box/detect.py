"""Finding out what this machine is, from what the system tells any program: /proc, /sys, the device tree, nvidia-smi, sysctl.

Everything takes the root directory and the command runner as arguments, so a test can show it any machine.
"""

from __future__ import annotations

import itertools
import os
import platform
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sparklab.box.meter import read_memory, read_usable
from sparklab.box.others import held_by_others, held_on_gpus
from sparklab.box.profiles import CHIPS, PROFILES
from sparklab.units import GIB, MIB, NA, is_na

Runner = Callable[[Sequence[str]], str]

# Peak resident size of a worker beyond its tensors, x86-64 with avx512_bf16, torch 2.13, measured by us: 0.54 GiB after the first updates of next to no
# model, 0.60 of one with 41M parameters, 0.66 after the quickstart with its evaluations and samples (oneDNN keeps a kernel a shape).
CPU_RUNTIME_BYTES = 0.65 * GIB
SECONDS_PER_COMMAND = 5.0  # a broken driver makes nvidia-smi hang; a box that cannot answer in this time counts as without GPU


def run_command(command: Sequence[str]) -> str:
    """What the command prints, or "" where it is missing, fails or takes longer than five seconds."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_PER_COMMAND, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout if done.returncode == 0 else ""


def detect_facts(root: Path = Path("/"), run: Runner = run_command, system: str | None = None) -> dict[str, Any]:
    """The fields of the Box that this machine is; ``NA`` where unknown. Never raises."""
    system = system or platform.system()
    if system == "Darwin":
        return _mac(run)
    return _gpu(root, run) or _cpu(root)


def _gpu(root: Path, run: Runner) -> dict[str, Any] | None:
    """The NVIDIA GPUs that nvidia-smi lists and this process may use; None where there is none."""
    text = run(("nvidia-smi", "--query-gpu=name,memory.total,memory.free,compute_cap", "--format=csv,noheader,nounits"))
    rows = _visible([[word.strip() for word in line.split(",")] for line in text.splitlines() if line.count(",") == 3])
    if not rows:
        return None
    name, total, _, capability = rows[0]
    known = next((PROFILES[profile] for word, profile in CHIPS.items() if word in name), None)
    # A unified chip has no memory of its own to report: nvidia-smi says [N/A] or "Not Supported".
    unified = bool(known and known["unified"]) or not _is_number(total)
    memory = read_memory(root / "proc")
    facts = _rates(known)
    reserve = 8.0 * GIB if unified else 1.0 * GIB
    facts.update(
        name="this",
        chip=name,
        unified=unified,
        memory_bytes=memory.total_bytes if unified else float(total) * MIB,
        available_bytes=memory.available_bytes if unified else min((float(row[2]) * MIB for row in rows if _is_number(row[2])), default=NA),
        has_native_bf16=_is_number(capability) and float(capability) >= 8.0,
        devices=len(rows),
        held=held_by_others(root / "proc", memory) if unified else held_on_gpus(root / "proc", run),
        reserve_bytes=reserve,
        runtime_bytes=2.0 * GIB if unified else 0.6 * GIB,
    )
    facts["power_watts"] = facts["power_watts"] * len(rows)
    facts["sources"] = {**facts["sources"], "chip": "measured", "memory_bytes": "measured", "available_bytes": "measured",
                        "has_native_bf16": "spec", "reserve_bytes": "assumed", "runtime_bytes": "assumed"}  # fmt: skip
    if len(rows) > 1:
        facts["note"] = f"{len(rows)} devices are not one pool of memory: with data parallelism each holds the whole plan, and only the speed multiplies."
    return facts


def _visible(rows: list[list[str]]) -> list[list[str]]:
    """Of all GPUs those that CUDA shows: what CUDA_VISIBLE_DEVICES numbers up to the first that there is not, as CUDA reads it; all where it gives names."""
    words = os.environ.get("CUDA_VISIBLE_DEVICES")
    if words is None or any(letter.isalpha() for letter in words):
        return rows
    numbers = [int(word) if _is_number(word) else -1 for word in words.split(",")]
    there = itertools.takewhile(lambda number: 0 <= number < len(rows), numbers)
    return [rows[number] for number in there]


def _rates(known: dict[str, Any] | None) -> dict[str, Any]:
    """Speed and power of one device of a known chip; NA for an unknown one, which is better than a guess."""
    names = ("bandwidth_bytes_per_second", "bf16_flops", "fp32_flops", "power_watts")
    if known is None:
        return {**dict.fromkeys(names, NA), "sources": {}}
    rates: dict[str, Any] = {name: known[name] for name in names}
    rates["power_watts"] /= known["devices"]
    return {**rates, "sources": {name: known["sources"][name] for name in names}}


def _cpu(root: Path) -> dict[str, Any]:
    """This machine's processor and its memory, within the limit of the container it runs in."""
    memory = read_usable(root / "proc", unified=False)
    info = _first_fields(root / "proc" / "cpuinfo")
    flags = set((info.get("flags") or info.get("Features") or "").split())
    cores = _count_cores(root / "proc" / "cpuinfo")
    total = memory.total_bytes
    native_bf16 = bool(flags & {"amx_bf16", "avx512_bf16", "bf16"})
    fp32_flops = _cpu_flops(info, flags, cores)
    return {
        "name": "this",
        "chip": f"{_chip_name(root, info)}, {cores} cores" if cores else _chip_name(root, info),
        "is_gpu": False,
        "unified": False,
        "memory_bytes": total,
        "available_bytes": memory.available_bytes,
        "fp32_flops": fp32_flops,
        # AMX tiles do 16 times the work of a 512-bit vector; plain bf16 vectors do twice that of fp32.
        "bf16_flops": fp32_flops * (16 if "amx_bf16" in flags else 2) if native_bf16 else NA,
        "has_native_bf16": native_bf16,
        "held": held_by_others(root / "proc", memory),
        "reserve_bytes": NA if is_na(total) else min(8.0 * GIB, 0.1 * total),
        "runtime_bytes": CPU_RUNTIME_BYTES,
        "sources": {"chip": "measured", "memory_bytes": "measured", "available_bytes": "measured", "has_native_bf16": "measured",
                    "fp32_flops": "assumed", "bf16_flops": "assumed", "reserve_bytes": "assumed", "runtime_bytes": "measured"},
        "note": "Within the memory limit of this container." if not is_na(memory.limit_bytes) else "",
    }  # fmt: skip


def _cpu_flops(info: dict[str, str], flags: set[str], cores: int) -> float:
    """Cores x clock x FLOPs a clock (two fused multiply-adds of the widest vector). A ceiling, hence "assumed"; NA without a clock rate."""
    if not _is_number(info.get("cpu MHz", "")) or not cores:
        return NA
    lanes = 16 if "avx512f" in flags else 8 if "avx2" in flags else 4
    return cores * float(info["cpu MHz"]) * 1e6 * lanes * 4


def _chip_name(root: Path, info: dict[str, str]) -> str:
    """The processor's own name; on Arm, where /proc/cpuinfo has none, the board's."""
    for path in ("sys/class/dmi/id/product_name", "proc/device-tree/model"):
        if "model name" in info:
            return info["model name"]
        try:
            board = (root / path).read_text(encoding="utf-8", errors="replace").strip("\0\n ")
        except OSError:
            continue
        if board:
            return board
    return info.get("model name") or platform.machine() or "unknown processor"


def _first_fields(path: Path) -> dict[str, str]:
    """``key : value`` lines of the first processor in a cpuinfo file."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    first = text.split("\n\n", 1)[0]
    return {key.strip(): value.strip() for key, found, value in (line.partition(":") for line in first.splitlines()) if found}


def _count_cores(path: Path) -> int:
    try:
        return len(re.findall(r"^processor\s*:", path.read_text(encoding="utf-8", errors="replace"), re.MULTILINE))
    except OSError:
        return 0


def _mac(run: Runner) -> dict[str, Any]:
    """A Mac: total memory and chip from sysctl. Its speed stays unknown."""
    size, chip = run(("sysctl", "-n", "hw.memsize")).strip(), run(("sysctl", "-n", "machdep.cpu.brand_string")).strip()
    total = float(size) if _is_number(size) else NA
    return {
        "name": "this",
        "chip": chip or platform.machine() or "unknown processor",
        "is_gpu": False,
        "unified": "Apple" in chip,
        "memory_bytes": total,
        "reserve_bytes": NA if is_na(total) else min(8.0 * GIB, 0.2 * total),
        "runtime_bytes": CPU_RUNTIME_BYTES,
        "sources": {"chip": "measured", "memory_bytes": "measured", "reserve_bytes": "assumed", "runtime_bytes": "assumed"},
    }


def _is_number(text: str) -> bool:
    return re.fullmatch(r"\d+(\.\d+)?", text.strip()) is not None
