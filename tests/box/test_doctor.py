"""The doctor: every finding on machines made up for it, what it prints, and this machine."""

import importlib.metadata
import json
import subprocess
import sys
import tomllib

import pytest
from packaging.specifiers import SpecifierSet
from support import ROOT, run_cli

from sparklab.box.doctor import Checkup, Examination, Finding, Machine, installed, torch_facts, wanted
from sparklab.units import GIB

SPARK_TORCH = {"version": "2.15.0", "cuda": "13.2", "hip": None, "available": True, "architectures": ["sm_90", "sm_120"],
               "devices": [{"name": "NVIDIA GB10", "capability": [12, 1], "integrated": True}]}  # fmt: skip
LIGER = SpecifierSet(">=0.8.5,<0.9")
CPU_TORCH = {"version": "2.13.0+cpu", "cuda": None, "hip": None, "available": False, "devices": []}
VERSIONS = {"bitsandbytes": "0.50.2", "triton": "3.9.0", "liger-kernel": "0.8.5", "ipykernel": "7.3.0", "jupyterlab": "4.6.6",
            "anywidget": "0.11.0"}  # fmt: skip
# As a DGX Spark shows it, after the published figures: 119.7 GiB seen, much of it page cache that MemFree does not count.
SPARK = {"MemTotal": 119.7, "MemFree": 41.5, "MemAvailable": 110.0, "Buffers": 0.3, "Cached": 20.0, "Shmem": 0.1, "SReclaimable": 0.4,
         "SwapTotal": 0.0, "SwapFree": 0.0}  # fmt: skip


class Made:
    """A machine of files and answers: a Spark that lacks nothing, unless told otherwise."""

    def __init__(self, root):
        self.root, self.torch, self.versions, self.environ, self.libraries = root, SPARK_TORCH, dict(VERSIONS), {}, ["130", "132"]
        self.smi, self.disk, self.free = "NVIDIA GB10, [N/A], [N/A], 12.1", None, 500 * GIB
        self.meminfo = dict(SPARK)
        self.file("proc/pressure/memory", "some avg10=0.00 avg60=0.00 avg300=0.00 total=0\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n")
        self.file("usr/local/cuda/bin/ptxas", "")

    def file(self, name, text):
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def checkup(self):
        self.file("proc/meminfo", "".join(f"{name}: {int(size * 2**20)} kB\n" for name, size in self.meminfo.items()))
        folder = self.root / "bitsandbytes"
        folder.mkdir(exist_ok=True)
        for version in self.libraries:
            (folder / f"libbitsandbytes_cuda{version}.so").touch()
        machine = Machine(self.root, lambda command: self.smi if (command[0] == "nvidia-smi" and "compute" not in command[1]) or "cap" in command[1] else "",
                          self.environ, self.versions.get, lambda name: LIGER, lambda name: folder, lambda: self.torch, lambda path: self.free)  # fmt: skip
        return Checkup(tuple(Examination(machine, self.disk).findings()))


@pytest.fixture
def made(tmp_path):
    return Made(tmp_path)


def test_a_spark_that_lacks_nothing(made):
    made.environ = {"TRITON_PTXAS_PATH": str(made.root / "usr/local/cuda/bin/ptxas"), "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    checkup = made.checkup()
    assert {finding.name: finding.level for finding in checkup.findings} == {
        "torch": "ok", "sm_121 warning": "note", "bitsandbytes": "ok", "Liger": "ok", "ptxas": "ok", "expandable segments": "ok", "memory": "ok",
        "other tenants": "ok", "swap": "ok", "page cache": "note", "guard": "ok", "disk": "ok", "Jupyter": "ok",
    }  # fmt: skip
    assert (checkup.worst, checkup.exit_status) == ("note", 0)
    assert "false alarm" in checkup["sm_121 warning"].fact
    assert "as used in torch.cuda.mem_get_info" in checkup["page cache"].fact


def set_(**changes):
    def change(made):
        for name, value in changes.items():
            setattr(made, name, value)

    return change


def memory(**sizes):
    return lambda made: made.meminfo.update(sizes)


def tenant(made):
    made.file("proc/77/status", f"Name:\tollama\nRssAnon:\t{14 * 2**20} kB\nRssShmem:\t0 kB\n")
    made.file("proc/77/comm", "ollama\x1b[31m\n")


def in_a_container(made):
    made.file("sys/fs/cgroup/memory.max", str(64 * 2**30))
    made.file("sys/fs/cgroup/memory.current", str(60 * 2**30))
    made.file("sys/fs/cgroup/memory.stat", f"anon {10 * 2**30}\nactive_file {30 * 2**30}\ninactive_file {4 * 2**30}\n")


def thor(made):
    made.smi, made.environ = "NVIDIA Thor, [N/A], [N/A], 11.0", {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}


CASES = [
    (
        set_(torch=CPU_TORCH),
        "torch",
        "fault",
        "built for CPUs alone, and there is a GPU: NVIDIA GB10",
        "pip install --force-reinstall --no-deps torch==2.13.0 ",
    ),
    (set_(torch={**SPARK_TORCH, "available": False, "devices": []}), "torch", "fault", "cannot use the GPU that nvidia-smi sees", "driver"),
    (set_(torch={"error": "ImportError: libcudart.so.13"}), "torch", "fault", "libcudart.so.13", "pip install"),
    (set_(torch=CPU_TORCH, smi=""), "torch", "ok", "no GPU here", ""),
    (set_(torch={**SPARK_TORCH, "cuda": "12.8"}), "CUDA version", "warning", "built for CUDA 12.8", "pip install --upgrade torch"),
    (set_(torch={**SPARK_TORCH, "cuda": "13.1"}), "bitsandbytes", "fault", "no library for CUDA 131, only for 130, 132", "export BNB_CUDA_VERSION=132"),
    (set_(torch={**SPARK_TORCH, "cuda": "13.1"}, libraries=["124", "130"]), "bitsandbytes", "fault", "no library for CUDA 131", "export BNB_CUDA_VERSION=130"),
    (set_(torch={**SPARK_TORCH, "cuda": "13.1"}, environ={"BNB_CUDA_VERSION": "130"}), "bitsandbytes", "ok", "for CUDA 130 (BNB_CUDA_VERSION)", ""),
    (set_(environ={"BNB_CUDA_VERSION": "129"}), "bitsandbytes", "fault", "no library for CUDA 129 (BNB_CUDA_VERSION)", "BNB_CUDA_VERSION=132"),
    (set_(libraries=[]), "bitsandbytes", "fault", "only for none", "pip install --upgrade"),
    (lambda made: made.versions.pop("bitsandbytes"), "bitsandbytes", "fault", "not installed", "pip install bitsandbytes"),
    (lambda made: made.versions.pop("liger-kernel"), "Liger", "note", "liger-kernel is not installed", "pip install 'sparklab[gpu]'"),
    (
        lambda made: made.versions.update({"liger-kernel": "0.6.1"}),
        "Liger",
        "note",
        f"0.6.1 is not one that sparklab was written against ({LIGER})",
        "pip install 'sparklab[gpu]'",
    ),
    (set_(), "ptxas", "warning", "sm_121a is not defined", "export TRITON_PTXAS_PATH=/usr/local/cuda/bin/ptxas"),
    (lambda made: (made.root / "usr/local/cuda/bin/ptxas").unlink(), "ptxas", "warning", "sm_121a", "install the CUDA toolkit"),
    (set_(environ={"TRITON_PTXAS_PATH": "nowhere/ptxas"}), "ptxas", "warning", "'nowhere/ptxas', which does not exist", "export"),
    (set_(), "expandable segments", "note", "off", "export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"),
    (thor, "expandable segments", "fault", "must be off on this chip (NVIDIA Thor)", "unset PYTORCH_CUDA_ALLOC_CONF"),
    (memory(MemAvailable=7.0), "memory", "fault", "7 GiB available of 120 GiB; 8 GiB stay free", "close"),
    (memory(MemAvailable=12.0), "memory", "warning", "12 GiB available", "close"),
    (tenant, "other tenants", "warning", "12% of memory is held by ollama[31m (process 77) 14 GiB", "close what is not needed"),
    (memory(SwapTotal=16.0, SwapFree=15.0), "swap", "warning", "16 GiB on, 1 GiB used: a unified box", "sudo swapoff -a"),
    (lambda made: (set_(torch=CPU_TORCH, smi="")(made), memory(SwapTotal=16.0, SwapFree=15.0)(made)), "swap", "note", "1 GiB lie in swap", "swapoff"),
    (lambda made: (set_(torch=CPU_TORCH, smi="")(made), memory(SwapTotal=16.0, SwapFree=16.0)(made)), "swap", "ok", "16 GiB on, 0 B used", ""),
    (lambda made: (made.root / "proc/pressure/memory").unlink(), "guard", "note", "PSI", "psi=1"),
    (lambda made: made.meminfo.clear(), "guard", "warning", "cannot watch", "Linux"),
    (lambda made: made.meminfo.clear(), "memory", "note", "does not tell", ""),
    (in_a_container, "container", "note", "may have 64 GiB, of which 38 GiB are left; that limit does not hold what CUDA takes", ""),
    (set_(free=3 * GIB), "disk", "warning", "3 GiB free here", "free some space"),
    (lambda made: set_(disk=(made.root / "runs" / "a", 600 * GIB))(made), "disk", "fault", "500 GiB free on the disk of", "keep_checkpoints"),
    (lambda made: set_(disk=(made.root / "runs" / "a", 300 * GIB))(made), "disk", "warning", "take up to 300 GiB", "keep_checkpoints"),
    (lambda made: set_(disk=(made.root / "runs" / "a", 100 * GIB))(made), "disk", "ok", "take up to 100 GiB", ""),
    (lambda made: made.versions.update(ipykernel="7.4.0"), "Jupyter", "note", "a shell that is gone after a reload", "pip install --upgrade ipykernel"),
    (lambda made: made.versions.pop("ipykernel"), "Jupyter", "note", "no ipykernel here", ""),
    (lambda made: made.versions.pop("anywidget"), "Jupyter", "fault", "cannot be drawn", "pip install anywidget"),
]


@pytest.mark.parametrize(("change", "name", "level", "word", "fix"), CASES, ids=[f"{case[1]} {case[2]} {case[3][:20]}" for case in CASES])
def test_findings(made, change, name, level, word, fix):
    change(made)
    found = made.checkup()[name]
    assert (found.level, word in found.fact) == (level, True), found
    assert fix in found.fix
    assert bool(found.fix) == bool(fix)
    assert "\x1b" not in found.fact
    assert "\n" not in found.fact + found.fix


def test_which_liger_is_wanted_is_said_in_pyproject_alone(monkeypatch):
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["gpu"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["torch>=2.11", *(f'{line}; extra == "gpu"' for line in asked)])
    assert [wanted("liger-kernel").contains(version) for version in ("0.8.4", "0.8.5", "0.8.17", "0.9.0")] == [False, True, True, False]
    assert wanted("torch").contains("2.11") and wanted("numpy") == SpecifierSet(), "any, where nothing is asked"

    def not_installed(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", not_installed)
    assert wanted("liger-kernel") == SpecifierSet()


def test_what_it_says_and_exits_with():
    ok, warning, fault = Finding("a", "ok", "fine"), Finding("bb", "warning", "<b>x</b>", "do this"), Finding("c", "fault", "broken", "do that")
    assert [Checkup(found).exit_status for found in ((), (ok,), (ok, Finding("n", "note", "")), (ok, warning), (fault, warning))] == [0, 0, 0, 3, 4]
    both = Checkup((ok, warning))
    assert repr(both) == "Checkup(1 warning, 1 ok)"
    assert str(both) == "ok       a   fine\nwarning  bb  <b>x</b>\n             Fix: do this"
    html = both._repr_html_()
    assert "&lt;b&gt;x&lt;/b&gt;" in html and "<b>x" not in html
    assert not any(word in html for word in ("<style", "<script", "class=", "onclick"))
    assert both.to_dict()["worst"] == "warning"
    assert both["a"] == ok


def test_this_machine(tmp_path):
    result = run_cli("doctor", "--json", cwd=tmp_path)
    told = json.loads(result.stdout)
    assert result.returncode == {"ok": 0, "note": 0, "warning": 3, "fault": 4}[told["worst"]]
    names = [finding["name"] for finding in told["findings"]]
    assert {"torch", "bitsandbytes", "memory", "swap", "guard", "disk", "Jupyter"} <= set(names)
    import torch

    assert torch.__version__ in told["findings"][names.index("torch")]["fact"]


def test_a_torch_that_does_not_load_is_a_finding(monkeypatch):
    monkeypatch.setattr("sparklab.box.doctor.TORCH", "raise ImportError('libcudart.so.13: cannot open shared object file')")
    assert torch_facts() == {"error": "ImportError: libcudart.so.13: cannot open shared object file"}
    monkeypatch.setattr("sparklab.box.doctor.TORCH", "pass")
    assert "error" in torch_facts()
    assert installed("no-such-package") is None


def test_a_run_and_a_recipe_are_looked_at_for_their_disk(small_recipe, tmp_path):
    import sparklab as sl
    from sparklab.api import written_bytes
    from sparklab.run.directory import RunDirectory
    from sparklab.units import format_bytes

    recipe = small_recipe()
    needed = format_bytes(written_bytes(sl.plan(recipe), recipe))
    RunDirectory.create(tmp_path / "run", recipe, {}, {})
    assert f"take up to {needed}" in sl.doctor(recipe)["disk"].fact
    assert f"the disk of {tmp_path / 'run'}" in sl.doctor(tmp_path / "run")["disk"].fact
    assert json.loads(run_cli("doctor", tmp_path / "nothing", "--json", cwd=tmp_path).stdout)["error"] == "RunNotFound"


@pytest.mark.slow
def test_the_drill(tmp_path):
    import sparklab as sl

    checkup = sl.doctor(drill=True)
    soft, hard = checkup["drill, soft floor"], checkup["drill, hard floor"]
    assert (soft.level, hard.level) == ("ok", "ok"), (soft, hard)
    assert "stopped, with a checkpoint of step" in soft.fact
    assert "the worker was gone and its reason left" in hard.fact


def test_the_parent_loads_no_torch():
    code = "import sys, sparklab.box.doctor, sparklab.run.drill; print({'torch', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"
