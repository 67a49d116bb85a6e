"""Every notebook runs from top to bottom, and the committed .ipynb is its source with outputs."""

import sys

import jupytext
import nbformat
import pytest
from support import ROOT

sys.path.insert(0, str(ROOT / "notebooks"))
import build

SOURCES = build.sources()


def test_there_are_notebooks():
    assert len(SOURCES) >= 1


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_the_ipynb_is_its_source_with_outputs(source):
    written = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    nbformat.validate(written)
    assert [(cell.cell_type, cell.source) for cell in written.cells] == [(cell.cell_type, cell.source) for cell in jupytext.read(source).cells]
    assert "widgets" not in written.metadata
    outputs = [output for cell in written.cells for output in cell.get("outputs", [])]
    assert outputs
    assert not any(output.output_type == "error" for output in outputs)
    pictures = [output for output in outputs if "data:image/svg+xml;base64" in output.get("data", {}).get("text/html", "")]
    assert pictures, "the panel froze into a picture"
    assert not any("application/vnd.jupyter.widget-view+json" in output.get("data", {}) for output in outputs)
    assert all(len(cell.source.splitlines()) <= 15 for cell in written.cells if cell.cell_type == "code")


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_it_runs_from_top_to_bottom(source, tmp_path):
    notebook = build.execute(source, tmp_path)
    assert any("after, on 200 held-out orders" in str(cell.get("outputs")) for cell in notebook.cells)
