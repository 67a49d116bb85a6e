"""Writes each notebook anew from its source: ``python notebooks/build.py`` turns every NN_name.py into an executed NN_name.ipynb.

The source (jupytext, percent format) is what people edit and review; the .ipynb is what they open, with its outputs frozen in it.
"""

import argparse
import os
import shutil
import tempfile
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent


def sources() -> list[Path]:
    """The notebooks' sources, in the order of the course."""
    return sorted(FOLDER.glob("[0-9][0-9]_*.py"))


def execute(source: Path, folder: Path) -> nbformat.NotebookNode:
    """Runs a notebook from top to bottom in ``folder`` and returns it with its outputs; an error in a cell is raised."""
    notebook = jupytext.read(source)
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(folder)}}).execute()
    return notebook


def cleaned(notebook: nbformat.NotebookNode, folder: Path) -> nbformat.NotebookNode:
    """Without what changes from one execution to the next and helps no reader: timings, ids, widget state, the folder's name."""
    notebook.metadata.pop("widgets", None)  # GitHub refuses widget metadata without state; the panels freeze into plain HTML
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number:02d}"
        cell["metadata"] = {}
        for output in cell.get("outputs", []):
            output.pop("execution_count", None) if output.output_type != "execute_result" else None
    text = nbformat.writes(notebook).replace(str(folder) + os.sep, "")
    return nbformat.reads(text, as_version=4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.parse_args()
    for source in sources():
        folder = Path(tempfile.mkdtemp(prefix="notebook-"))
        notebook = cleaned(execute(source, folder), folder)
        nbformat.write(notebook, source.with_suffix(".ipynb"))
        shutil.rmtree(folder)
        print(f"{source.name} -> {source.with_suffix('.ipynb').name}")


if __name__ == "__main__":
    main()
