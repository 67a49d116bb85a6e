"""Boxes: profiles, detection on machines shown as directories, and the meter."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from support import ROOT

import sparklab
from sparklab.box import Box
from sparklab.box.detect import detect_facts
from sparklab.box.live import LiveMeter
from sparklab.box.meter import read_memory, read_usable
from sparklab.box.pool import read_pool
from sparklab.errors import BoxError
from sparklab.units import GIB, KIB, is_na

MEMINFO = """MemTotal:       125829120 kB
MemFree:        10485760 kB
MemAvailable:   104857600 kB
Buffers:          102400 kB
Cached:         83886080 kB
Shmem:           1048576 kB
SReclaimable:    2097152 kB
SwapTotal:       8388608 kB
SwapFree:        8286208 kB
HugePages_Total:       0
"""
ARM = "processor\t: 0\nBogoMIPS\t: 2000.00\nFeatures\t: fp asimd bf16 i8mm\n\nprocessor\t: 1\nFeatures\t: fp asimd bf16 i8mm\n"
X86 = "processor\t: 0\nmodel name\t: Some CPU <9>\ncpu MHz\t\t: 2000.000\nflags\t\t: fpu avx2 avx512f{extra}\n\nprocessor\t: 1\nmodel name\t: Some CPU <9>\n"


def machine(root: Path, meminfo: str = MEMINFO, cpuinfo: str = "", **files: str) -> Path:
    """A directory that looks like a machine's root."""
    (root / "proc" / "pressure").mkdir(parents=True)
    (root / "proc" / "meminfo").write_text(meminfo)
    (root / "proc" / "cpuinfo").write_text(cpuinfo)
    for path, text in files.items():
        file = root / path.replace("__", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


def nothing(_: Sequence[str]) -> str:
    return ""


def smi(*rows: str) -> object:
    return lambda command: "\n".join(rows) if command[0] == "nvidia-smi" else ""


def test_a_box_may_be_given_by_name() -> None:
    spark = Box.profile("dgx-spark")
    assert Box.of("dgx-spark") == spark == Box.of(spark) and Box.of(None).name == "this"
    config = str(ROOT / "tests/planner/configs/llama-3.1-8b.json")
    assert sparklab.plan(config, method="lora", box="dgx-spark").best().box == spark
    with pytest.raises(BoxError, match=r"No box is called 'spark'[\s\S]*dgx-spark"):
        sparklab.plan(config, box="spark")
    with pytest.raises(BoxError, match="box is of type dict"):
        sparklab.plan(config, box={"memory": 128})  # type: ignore[call-overload]


def test_every_profile_is_whole() -> None:
    names = [name for name in Box.names() if name != "this"]
    assert names == ["dgx-spark", "2x-dgx-spark", "h200", "dgx-1"]
    for name in names:
        box = Box.profile(name)
        assert box.name == name
        assert box.usable_bytes == box.memory_bytes - box.reserve_bytes
        shown = [row for row in box.rows() if row[0] != "usable by a plan"]
        assert all(source in ("spec", "published", "measured", "assumed") for _, _, source in shown), box.rows()


def test_the_spark() -> None:
    box = Box.profile("dgx-spark")
    assert box.usable_bytes == pytest.approx((119.6 - 8) * GIB)
    assert box.compute_flops("auto") == box.compute_flops("bf16") == 92.3e12
    assert box.compute_flops("fp32") == 31e12
    assert repr(box) == "Box(dgx-spark: NVIDIA GB10, 112 GiB usable of 120 GiB unified)"


def test_two_sparks_are_not_one_pool() -> None:
    one, two = Box.profile("dgx-spark"), Box.profile("2x-dgx-spark")
    assert (two.devices, two.usable_bytes, two.power_watts) == (2, one.usable_bytes, 2 * one.power_watts)
    assert "not one pool" in two.describe()


def test_a_chip_without_bf16_computes_in_fp32() -> None:
    box = Box.profile("dgx-1")
    assert is_na(box.bf16_flops)
    assert not box.has_native_bf16
    assert box.resolve_dtype("auto") == "fp32"
    assert box.compute_flops("bf16") == box.fp32_flops
    with pytest.raises(BoxError, match="fp8"):
        box.compute_flops("fp8")


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(BoxError, match=r"(?s)'dgx-2'.*dgx-spark, 2x-dgx-spark, h200, dgx-1, this"):
        Box.profile("dgx-2")


def test_this_machine() -> None:
    box = Box.detect()
    assert box.name == "this" == Box.profile("this").name
    assert not is_na(box.memory_bytes) or sys.platform != "linux"
    assert "this" in box.describe()
    assert box.to_dict()["name"] == "this"


@pytest.mark.parametrize(("extra", "native", "rate"), [("", False, math.nan), (" avx512_bf16", True, 2.0), (" avx512_bf16 amx_bf16", True, 16.0)])
def test_detect_an_x86_machine(tmp_path: Path, extra: str, native: bool, rate: float) -> None:
    box = Box(**detect_facts(machine(tmp_path, cpuinfo=X86.format(extra=extra)), nothing, "Linux"))
    assert box.chip == "Some CPU <9>, 2 cores"
    assert box.memory_bytes == 120 * GIB
    assert box.available_bytes == 100 * GIB
    assert box.usable_bytes == (100 - 8) * GIB
    assert box.fp32_flops == 2 * 2e9 * 16 * 4  # cores x clock x lanes x (two multiply-adds)
    assert box.has_native_bf16 is native
    assert box.bf16_flops == rate * box.fp32_flops or (math.isnan(rate) and is_na(box.bf16_flops))
    assert not box.is_gpu
    assert "&lt;9&gt;" in box._repr_html_()
    assert "<9>" not in box._repr_html_()


def test_detect_an_arm_board(tmp_path: Path) -> None:
    box = Box(**detect_facts(machine(tmp_path, cpuinfo=ARM, **{"proc__device-tree__model": "Some Board\0"}), nothing, "Linux"))
    assert (box.chip, box.has_native_bf16) == ("Some Board, 2 cores", True)
    assert is_na(box.fp32_flops)  # no clock rate, no guess


def test_detect_stays_within_the_container(tmp_path: Path) -> None:
    limits = {"sys__fs__cgroup__memory.max": str(16 * 2**30), "sys__fs__cgroup__memory.current": str(4 * 2**30)}
    box = Box(**detect_facts(machine(tmp_path, cpuinfo=X86, **limits), nothing, "Linux"))
    assert (box.memory_bytes, box.available_bytes) == (16 * GIB, 12 * GIB)
    assert "container" in box.note
    (tmp_path / "sys__fs__cgroup__memory.stat".replace("__", "/")).write_text(f"anon 5\nactive_file {GIB}\ninactive_file {GIB}\nslab_reclaimable {GIB}\n")
    assert Box(**detect_facts(tmp_path, nothing, "Linux")).available_bytes == 15 * GIB, "page cache can go"
    spark = Box(**detect_facts(tmp_path, smi("NVIDIA GB10, [N/A], [N/A], 12.1"), "Linux"))  # type: ignore[arg-type]
    assert spark.memory_bytes == 120 * GIB, "what CUDA takes on a unified box lies outside the limit"


def test_detect_a_spark(tmp_path: Path) -> None:
    box = Box(**detect_facts(machine(tmp_path, cpuinfo=ARM), smi("NVIDIA GB10, [N/A], [N/A], 12.1"), "Linux"))  # type: ignore[arg-type]
    assert (box.chip, box.unified, box.is_gpu, box.has_native_bf16, box.devices) == ("NVIDIA GB10", True, True, True, 1)
    assert box.memory_bytes == 120 * GIB
    assert box.usable_bytes == 92 * GIB  # from MemAvailable, never from the driver
    assert box.bf16_flops == 92.3e12
    assert box.sources["bf16_flops"] == "published"


def test_detect_unknown_gpus(tmp_path: Path) -> None:
    rows = ("NVIDIA Something, 24576, 20480, 8.9", "NVIDIA Something, 24576, 24000, 8.9")
    box = Box(**detect_facts(machine(tmp_path), smi(*rows), "Linux"))  # type: ignore[arg-type]
    assert (box.devices, box.unified, box.memory_bytes, box.available_bytes) == (2, False, 24 * GIB, 20 * GIB)
    assert is_na(box.bf16_flops)
    assert is_na(box.power_watts)
    assert "not one pool" in box.note
    assert "N/A" in box.describe()


@pytest.mark.parametrize(("words", "count"), [("", 0), ("-1", 0), ("1", 1), ("1,0", 2), ("0,7,1", 1), ("GPU-8932f937", 2)])
def test_detect_what_cuda_may_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, count: int) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", words)
    rows = ("NVIDIA Something, 24576, 20480, 8.9", "NVIDIA Other, 81920, 81000, 9.0")
    box = Box(**detect_facts(machine(tmp_path, cpuinfo=ARM), smi(*rows), "Linux"))  # type: ignore[arg-type]
    assert (box.is_gpu, box.devices if box.is_gpu else 0) == (count > 0, count)
    if words[:1] == "1":
        assert box.memory_bytes == 80 * GIB


def status(rss_anon_gib: int) -> str:
    return f"Name:\tx\nVmRSS:\t{99 * 2**20} kB\nRssAnon:\t{rss_anon_gib * 2**20} kB\nRssFile:\t{50 * 2**20} kB\nRssShmem:\t0 kB\n"


def test_what_stands_in_the_way_is_named(tmp_path: Path) -> None:
    files = {"proc__7__status": status(3), "proc__7__comm": "jupyter\x1b\n", "proc__8__status": status(12), "proc__8__comm": "ollama\n",
             f"proc__{os.getpid()}__status": status(40), "proc__9__status": status(0), "proc__self__status": status(9)}  # fmt: skip
    meminfo = MEMINFO.replace("SwapFree:        8286208", "SwapFree:        2097152")
    box = Box(**detect_facts(machine(tmp_path, meminfo, cpuinfo=ARM, **files), smi("NVIDIA GB10, [N/A], [N/A], 12.1"), "Linux"))  # type: ignore[arg-type]
    cache = (102400 + 83886080 + 2097152 - 1048576) * KIB
    assert box.held == {"ollama (process 8)": 12 * GIB, "jupyter (process 7)": 3 * GIB, "swap": 6 * GIB, "page cache": cache}
    assert box.usable_bytes == 92 * GIB
    assert box.in_the_way(5 * GIB) == ()  # nothing is
    (way,) = box.in_the_way(50 * GIB)
    assert way.startswith("81.1 GiB of the usable memory are page cache")
    processes, swap = box.in_the_way(100 * GIB)
    assert processes == "with nothing else running it would fit (112 GiB): memory is held by ollama (process 8) 12 GiB, jupyter (process 7) 3 GiB"
    assert swap == "6 GiB lie in swap and come back into memory when their owners run"
    assert box.in_the_way(113 * GIB) == ()  # the box itself is too small
    assert Box.profile("dgx-spark").in_the_way(50 * GIB) == ()


def test_a_discrete_gpu_counts_its_own_memory(tmp_path: Path) -> None:
    def run(command: Sequence[str]) -> str:
        return "8, 9000\n7, 100\nnonsense\n8, 1240" if "compute-apps" in command[1] else "NVIDIA Something, 24576, 14000, 8.9"

    root = machine(tmp_path, **{"proc__8__comm": "ollama", "proc__7__status": status(30)})
    box = Box(**detect_facts(root, run, "Linux"))
    assert box.held == {"ollama (process 8)": 10 * GIB}
    assert box.usable_bytes == 14000 * 2**20 - 1 * GIB
    (way,) = box.in_the_way(20 * GIB)
    assert "ollama (process 8) 10 GiB" in way


def test_detect_with_nothing_to_read(tmp_path: Path) -> None:
    box = Box(**detect_facts(tmp_path / "empty", nothing, "Linux"))
    assert is_na(box.memory_bytes)
    assert is_na(box.usable_bytes)
    assert box.to_dict()["memory_bytes"] is None
    assert "N/A" in box.describe()
    assert "N/A" in repr(box)


def test_detect_a_mac(tmp_path: Path) -> None:
    answers = {"hw.memsize": str(64 * 2**30) + "\n", "machdep.cpu.brand_string": "Apple M9\n"}
    box = Box(**detect_facts(tmp_path, lambda command: answers.get(command[-1], ""), "Darwin"))
    assert (box.chip, box.unified, box.memory_bytes) == ("Apple M9", True, 64 * GIB)
    assert box.usable_bytes == 56 * GIB
    assert is_na(Box(**detect_facts(tmp_path, nothing, "Darwin")).usable_bytes)


def test_meter_reads_what_is_there(tmp_path: Path) -> None:
    pressure = "some avg10=1.25 avg60=0.00 avg300=0.00 total=9\nfull avg10=0.50 avg60=0.0 avg300=0.0 total=1\n"
    process = "Name:\tpython\nVmHWM:\t  2048 kB\nVmRSS:\t  1024 kB\nRssAnon:\t700 kB\nRssShmem:\t24 kB\nThreads:\t3\n"
    proc = machine(tmp_path, proc__pressure__memory=pressure, proc__77__status=process) / "proc"
    seen = read_memory(proc, pid=77)
    assert seen.to_dict() == {
        "total_bytes": 125829120 * KIB,
        "available_bytes": 104857600 * KIB,
        "free_bytes": 10485760 * KIB,
        "cached_bytes": (102400 + 83886080 + 2097152 - 1048576) * KIB,
        "swap_used_bytes": 102400 * KIB,
        "pressure_percent": 1.25,
        "stalled_percent": 0.5,
        "limit_bytes": None,
        "room_bytes": None,
        "limit_free_bytes": None,
        "rss_bytes": 1024 * KIB,
        "rss_peak_bytes": 2048 * KIB,
        "own_bytes": 724 * KIB,
    }


def test_the_limit_of_a_container_is_for_boxes_with_memory_of_their_own(tmp_path: Path) -> None:
    limits = {"sys__fs__cgroup__memory.max": str(4 * GIB), "sys__fs__cgroup__memory.current": str(GIB), "sys__fs__cgroup__memory.stat": "anon 5\n"}
    proc = machine(tmp_path, cpuinfo=X86, **limits) / "proc"
    whole, within = read_usable(proc, unified=True), read_usable(proc, unified=False)
    assert (whole.total_bytes, whole.available_bytes, whole.limit_bytes) == (120 * GIB, 100 * GIB, 4 * GIB)
    assert (within.total_bytes, within.available_bytes, within.free_bytes, within.cached_bytes) == (4 * GIB, 3 * GIB, 3 * GIB, 0)
    looks = [LiveMeter(unified, proc).look().memory.total_bytes for unified in (True, False)]
    assert looks == [read_pool(0.0, proc, unified=unified).memory.total_bytes for unified in (True, False)] == [120 * GIB, 4 * GIB]


@pytest.mark.parametrize("broken", ["", "MemTotal\n:::\nMemAvailable: many kB\n"])
def test_meter_says_na_for_what_is_not(tmp_path: Path, broken: str) -> None:
    seen = read_memory(machine(tmp_path, meminfo=broken, proc__pressure__memory="some\n") / "proc", pid=1)
    assert set(seen.to_dict().values()) == {None}
    assert set(read_memory(tmp_path / "nowhere").to_dict().values()) == {None}


@pytest.mark.skipif(sys.platform != "linux", reason="reads the real /proc")
def test_meter_on_this_machine() -> None:
    seen = read_memory()
    assert 0 < seen.available_bytes <= seen.total_bytes
    assert 2**20 < seen.rss_bytes <= seen.rss_peak_bytes


def test_importing_loads_nothing_heavy() -> None:
    code = "import sys, sparklab.box, sparklab.box.meter; print(sorted({'torch', 'numpy', 'transformers', 'huggingface_hub'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
