"""The house: imports run down, never up or around; only what the worker loads may load torch; importing does nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT

PACKAGE = ROOT / "sparklab"

# Lowest first. A module belongs to the longest name it starts with.
FLOORS = [
    ["sparklab.units", "sparklab.text"],
    ["sparklab.errors", "sparklab.files"],
    ["sparklab.box", *(f"sparklab.model.{name}" for name in ("anatomy", "families", "fields", "hub", "parts", "shards", "source"))],
    ["sparklab.planner"],
    ["sparklab.data"],
    ["sparklab.model"],
    ["sparklab.engine"],
    ["sparklab.run"],
    ["sparklab.results"],
    ["sparklab.panels"],
    ["sparklab.api"],
    ["sparklab.cli"],
    ["sparklab.__main__"],
]

# What the worker loads, and nobody else.
TORCH = {
    "sparklab.engine",
    "sparklab.model.load",
    "sparklab.model.blank",
    "sparklab.model.expert_kernels",
    "sparklab.model.expert_triton",
    "sparklab.model.experts",
    "sparklab.model.stream",
    "sparklab.run.perform",
    "sparklab.run.session",
    "sparklab.run.reporter",
    "sparklab.results.answers",
}


def modules():
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found[name] = file
    assert len(found) > 40
    return found


def imports(name, file, known):
    """The modules of sparklab that a file imports anywhere in it, those for type checkers alone left out."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("sparklab"))
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            if node.module and node.module.startswith("sparklab"):
                for alias in node.names:
                    yield f"{node.module}.{alias.name}" if f"{node.module}.{alias.name}" in known else node.module


def floor_of(name):
    best = max(((len(home), level) for level, homes in enumerate(FLOORS) for home in homes if name == home or name.startswith(home + ".")), default=None)
    assert best is not None, f"{name} stands on no floor: put it in FLOORS"
    return best[1]


def folder(name):
    return name.rsplit(".", 1)[0] if name.count(".") > 1 else name


def test_imports_run_down():
    known = modules()
    arrows = [(name, target) for name, file in known.items() if name != "sparklab" for target in imports(name, file, known)]
    assert len(arrows) > 100
    up = [f"{a} -> {b}" for a, b in arrows if b == "sparklab" or (floor_of(b) >= floor_of(a) and folder(a) != folder(b) and b != folder(a))]
    assert not up, up


def test_no_module_is_part_of_a_cycle():
    known = modules()
    graph = {name: {target for target in imports(name, file, known) if target != name} for name, file in known.items() if name != "sparklab"}
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done:
            return
        path.append(name)
        for target in graph.get(name, ()):
            visit(target)
        done.add(path.pop())

    for name in graph:
        visit(name)
    assert len(done) == len(known) - 1


def test_files_and_functions_stay_readable():
    for name, file in modules().items():
        source = file.read_text()
        assert source.count("\n") <= 500, f"{name}: {source.count(chr(10))} lines"
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                size = node.end_lineno - node.lineno + 1
                assert size <= 60, f"{name}.{node.name}: {size} lines"


def test_only_the_worker_loads_torch():
    light = [name for name in modules() if not any(name == home or name.startswith(home + ".") for home in TORCH) and name != "sparklab.__main__"]
    assert len(light) > 30
    code = f"""import importlib, sys
for name in {light!r}:
    importlib.import_module(name)
    assert not {{"torch", "transformers"}} & set(sys.modules), name"""
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("absent", ["torch", "transformers", "ipywidgets", "numpy", "anywidget", "IPython", "argparse"])
def test_importing_sparklab_loads_next_to_nothing(absent):
    result = subprocess.run([sys.executable, "-X", "importtime", "-c", "import sparklab"], capture_output=True, text=True, check=True)
    loaded = {line.rsplit("|", 1)[1].strip() for line in result.stderr.splitlines() if "|" in line}
    assert "sparklab" in loaded
    assert absent not in {name.split(".")[0] for name in loaded}


def test_no_path_of_a_machine_and_nothing_unfinished():
    words = ["/ro" + "ot/", "/ho" + "me/", "TO" + "DO", "FIX" + "ME", "NotImplemented" + "Error"]
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    files = [ROOT / name for name in listed if Path(name).suffix in {".py", ".md", ".toml", ".yml", ".json", ".txt", ".ipynb", ".js", ".css"}]
    found = [f"{file}: {word}" for file in files if file.is_file() for word in words if word in file.read_text(encoding="utf-8")]
    assert not found
