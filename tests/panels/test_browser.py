"""The panel in a real JupyterLab and a real Chromium: it lives, obeys, survives a reload, freezes, and lets nothing out or in."""

import os

import pytest
from lab import CHROMIUM, Lab, browser, server, write_notebook
from scenes import make_directory, start_worker

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM.exists(), reason="needs Debian's chromium (apt-get install chromium)"),
]

CELLS = [
    "from sparklab.run.directory import RunDirectory\nfrom sparklab.panels.run_panel import show\npanel = show(RunDirectory('live'))",
    "6 * 7",
    "again = show(RunDirectory('live'))",
]
PANEL = ".jp-OutputArea-output .sl-panel"


@pytest.fixture(scope="module")
def playground(tmp_path_factory):
    """A JupyterLab, a Chromium, and a slow hostile run in the notebook's folder."""
    folder = tmp_path_factory.mktemp("lab")
    (folder / "work").mkdir()
    write_notebook(folder / "work" / "t.ipynb", CELLS)
    directory = make_directory(folder / "work" / "live", sample_prompts=("Greet the world in Arabic.",))
    with server(folder) as address, browser(folder) as context:
        worker = start_worker(directory, "--steps", 4000, "--delay", 0.05, "--hostile")
        try:
            yield Lab(context.new_page(), address), directory
        finally:
            worker.kill()
            worker.wait()


def shot(lab, name):
    """A picture for people, where SPARKLAB_SHOTS names a folder."""
    if folder := os.environ.get("SPARKLAB_SHOTS"):
        lab.page.screenshot(path=f"{folder}/{name}.png")


def test_a_life_of_a_panel(playground):
    lab, directory = playground
    lab.open("t.ipynb")
    lab.run(0)
    lab.until("$('[data-rows]')?.dataset.rows > 5", 60)
    before = int(lab.page.locator("[data-rows]").first.get_attribute("data-rows"))
    lab.until(f"$('[data-rows]').dataset.rows > {before + 10}", 60)

    lab.run(1)  # the kernel is free
    lab.until("document.body.innerText.includes('42')")

    lab.page.click("button[data-command=sample]")
    lab.until("document.body.textContent.includes('مرحبا بالعالم')")
    lab.page.click("button[data-command=pause]")
    lab.until("$('[data-rows]').dataset.status === 'paused'")
    lab.page.click("button[data-command=resume]")
    lab.until("$('[data-rows]').dataset.status === 'running'")
    shot(lab, "lab-running")

    lab.command("docmanager:save")
    lab.reload()  # the display link is gone: open it again from its files
    lab.run(2)
    lab.until(f"[...$$('[data-rows]')].some(panel => panel.dataset.rows > {before})", 60)

    lab.page.locator("button[data-command=stop]").last.click()
    lab.until("$$('img[src^=\"data:image/svg+xml;base64\"]').length > 0", 60)
    assert directory.state.status == "stopped"
    shot(lab, "lab-stopped")

    lab.command("docmanager:save")
    lab.page.wait_for_timeout(1000)
    lab.shut_kernels()
    lab.page.goto("about:blank")
    lab.page.goto(f"{lab.address}doc/tree/t.ipynb")
    lab.page.wait_for_selector('img[src^="data:image/svg+xml;base64"]', timeout=60_000)
    assert lab.page.locator('img[src^="data:image/svg+xml;base64"]').first.evaluate("image => image.naturalWidth") > 100
    shot(lab, "lab-reopened")

    assert not lab.strangers()
    assert not lab.dialogs, "hostile text ran"
