"""pyproject.toml, constraints.txt and environment.yml say the same; the wheel holds what it needs; the README's commands exist."""

import re
import subprocess
import sys
import tomllib
import zipfile

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from support import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#"))


def test_every_dependency_is_pinned_inside_its_range():
    wanted = [Requirement(text) for text in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"] + PROJECT["optional-dependencies"]["lab"]]
    assert len(wanted) >= 16
    for requirement in wanted:
        assert requirement.specifier.contains(Version(PINS[requirement.name])), requirement
    assert PINS["torch"] == "2.13.0"


def test_liger_is_tested_inside_its_range():
    """In a folder of its own: what trains on a CPU installs no Triton."""
    (requirement,) = map(Requirement, PROJECT["optional-dependencies"]["gpu"])
    tested = dict(re.findall(r"(triton|liger-kernel)==(\S+)", (ROOT / "Makefile").read_text()))
    assert set(tested) == {"triton", "liger-kernel"} and requirement.specifier.contains(Version(tested["liger-kernel"]))
    assert not set(tested) & set(PINS)


def test_conda_users_get_the_same():
    text = (ROOT / "environment.yml").read_text()
    assert "--constraint constraints.txt" in text
    assert "--editable .[dev]" in text
    assert f"python{PROJECT['requires-python']}" in text.replace(" ", "")


def test_every_dependency_earns_its_line_in_contributing():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for requirement in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"] + PROJECT["optional-dependencies"]["gpu"]:
        assert f"`{Requirement(requirement).name}`" in text, requirement


def test_version_is_said_once_more_only_where_it_must():
    import sparklab

    assert sparklab.__version__ == PROJECT["version"]
    assert f"## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_readme_says_only_commands_that_exist():
    readme = (ROOT / "README.md").read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = set(re.findall(r"(?:^|`)make ([a-z-]+)", readme, re.MULTILINE))
    assert {"quickstart", "test"} <= used <= targets
    from test_surface import flags

    verbs = set(re.findall(r"^(?:\.venv/bin/)?sparklab ([a-z]+)", readme, re.MULTILINE))
    assert verbs
    assert verbs <= set(flags())
    for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL):
        compile(block, "README.md", "exec")


@pytest.mark.slow
def test_the_wheel_builds_and_works_alone(tmp_path):
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, ROOT], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("sparklab-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for needed in ("sparklab/py.typed", "sparklab/model/tiny/model.safetensors", "sparklab/model/tiny/tokenizer.json", "sparklab/cli.py"):
        assert needed in names
    assert any(name.startswith("sparklab/panels/assets/") and name.endswith(".js") for name in names)
    assert not any(name.startswith(("tests/", "notebooks/", "examples/")) for name in names)
    zipfile.ZipFile(wheel).extractall(tmp_path / "alone")
    code = "import sparklab as sl; print(sl.__file__, sl.plan('tiny').best().fits)"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "alone", capture_output=True, text=True, check=True)
    assert str(tmp_path) in result.stdout
    assert "True" in result.stdout
