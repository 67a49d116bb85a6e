"""An executed notebook as HTML, opened without a network: every panel is there."""

import json
import warnings

import nbformat
import pytest
from lab import CHROMIUM, browser
from scenes import HOSTILE, STARTED, make_directory, start_worker, steps, write
from support import ROOT, write_chats

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM.exists(), reason="needs Debian's chromium (apt-get install chromium)"),
]

LLAMA_8B = ROOT / "tests" / "planner" / "configs" / "llama-3.1-8b.json"
CELLS = {
    "run": "import sparklab as sl\nrun = sl.Run.open('runs/live')\nrun.panel()",
    "waited for": "run.wait()\nNone",
    "failed run": "sl.Run.open('runs/failed').panel()",
    "plan": "sl.plan({model!r}, box=sl.Box.profile('dgx-spark'))",
    "sliders": "sl.explore({model!r}, box=sl.Box.profile('dgx-spark'))",
    "box": "sl.monitor()",
    "runs": "sl.runs('runs')",
    "compare": "from sparklab.panels.tables import Comparison\nComparison(rows=({{'prompt': 'p', 'base': 'one', 'tuned': 'two'}},))",
    "data": "sl.inspect(sl.Recipe(model='tiny', data='chats.jsonl', micro_batch_tokens=512, max_length=512))",
}


def execute(folder):
    """The notebook, run by nbclient as a pipeline would; the worker it waits for is at work meanwhile."""
    import nbclient
    import nbconvert

    write_chats(folder / "chats.jsonl", 8)
    live, failed = make_directory(folder / "runs" / "live"), make_directory(folder / "runs" / "failed")
    write(failed, STARTED, *steps(9), {"event": "failed", "step": 9, "error": "x", "fact": HOSTILE, "fix": HOSTILE})
    worker = start_worker(live, "--steps", 60, "--delay", 0.02, "--hostile")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell.format(model=str(LLAMA_8B))) for cell in CELLS.values()])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # jupyter_client's and zmq's own, which change from release to release
        nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()
        html, _ = nbconvert.HTMLExporter().from_notebook_node(notebook)
    assert worker.wait(60) == 0
    return notebook, html


def test_every_panel_stands_in_the_page(tmp_path, monkeypatch):
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    notebook, html = execute(tmp_path)
    assert "widgets" not in notebook.metadata or not json.dumps(notebook.metadata["widgets"]).count("sparklab-twin")
    (tmp_path / "exported.html").write_text(html, encoding="utf-8")
    with browser(tmp_path) as context:
        context.set_offline(True)
        page, ran = context.new_page(), []
        page.on("dialog", lambda dialog: (ran.append(dialog.message), dialog.dismiss()))
        page.goto((tmp_path / "exported.html").as_uri())
        cells = page.locator(".jp-CodeCell")
        assert cells.count() == len(CELLS)
        for index, name in enumerate(CELLS):
            if name == "waited for":
                continue
            output = cells.nth(index).locator(".jp-OutputArea-output")
            assert output.count() >= 1 and output.last.bounding_box()["height"] > 40, name
            assert "Error" not in output.first.inner_text()[:200], name
            drawn = output.last.evaluate("node => [...node.querySelectorAll('img')].map(image => image.naturalWidth > 0)")
            assert all(drawn) and (drawn or name in ("compare", "data")), name
        assert "Finished" in cells.nth(0).inner_text(), "waiting landed the last picture in the cell that showed the run"
        assert not ran
