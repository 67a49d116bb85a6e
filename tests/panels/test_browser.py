"""The panel in a real JupyterLab and a real Chromium: it lives, obeys, survives a reload, freezes, and lets nothing out or in."""

import json
import os
import time

import pytest
from lab import CHROMIUM, Lab, browser, server, write_notebook
from scenes import make_directory, start_worker

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM.exists(), reason="needs Debian's chromium (apt-get install chromium)"),
]

SHOW = "from sparklab.run.directory import RunDirectory\nfrom sparklab.panels.run_panel import show\n{} = show(RunDirectory({!r}))"
PICTURE = '.sparklab-twin img[src^="data:image/svg+xml;base64"]'


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """One JupyterLab and one Chromium for all tests, with the folder its notebooks and runs lie in."""
    folder = tmp_path_factory.mktemp("lab")
    (folder / "work").mkdir()
    with server(folder) as address, browser(folder) as context:
        yield Lab(context.new_page(), address), folder / "work"


@pytest.fixture
def playground(desk, request):
    """A notebook and a slow run full of hostile text, named after the test; nothing may have run or left when the test is over."""
    lab, work = desk
    name = request.node.name.removeprefix("test_")
    write_notebook(work / f"{name}.ipynb", [SHOW.format("panel", name), "6 * 7", SHOW.format("again", name)])
    directory = make_directory(work / name)
    worker = start_worker(directory, "--steps", 4000, "--delay", 0.03, "--hostile")
    try:
        lab.open(f"{name}.ipynb")
        lab.run(0)
        lab.until("$('.sparklab')?.dataset.rows > 5", 60)
        yield lab, directory
    finally:
        worker.kill()
        worker.wait()
    assert not lab.strangers(), "a request left this machine"
    assert not lab.dialogs, "hostile text ran"
    assert not [error for error in lab.errors if "sparklab" in error]


def rows(lab, index=0):
    return int(lab.page.locator(".sparklab").nth(index).get_attribute("data-rows"))


def press(lab, command, index=0):
    """Presses a button of a panel and returns the seconds until the worker's answer stands there."""
    begin = time.monotonic()
    lab.page.locator(".sparklab").nth(index).locator(f"button[data-command={command}]").click()
    lab.until(f"$('.sparklab-twin') || $$('.sparklab')[{index}]?.querySelector('.sl-ack').textContent.startsWith('{command}:')")
    return time.monotonic() - begin


def shot(lab, name):
    """A picture for people, where SPARKLAB_SHOTS names a folder."""
    if folder := os.environ.get("SPARKLAB_SHOTS"):
        lab.page.screenshot(path=f"{folder}/{name}.png")


def test_it_lives_and_obeys(playground):
    lab, directory = playground
    before = rows(lab)
    lab.until(f"$('.sparklab').dataset.rows > {before + 10}")
    lab.run(1)  # the kernel is free
    lab.until("document.body.innerText.includes('42')")

    seconds = {command: press(lab, command) for command in ("sample", "checkpoint", "pause")}
    lab.until("$('.sparklab').dataset.status === 'paused'")
    seconds["resume"] = press(lab, "resume")
    lab.until("$('.sparklab').dataset.status === 'running'")
    lab.until("$('.sl-list').textContent.includes('مرحبا بالعالم')")
    assert max(seconds.values()) < 10, seconds  # 2 s on a machine that does nothing else
    assert len(directory.state.checkpoints) == 1

    lab.page.evaluate("document.querySelector('button[data-command=stop]').click(); window.said = document.querySelector('.sl-ack').textContent")
    assert lab.page.evaluate("window.said") == "Stopping…", "said at once, before any answer"
    lab.page.wait_for_selector(PICTURE)
    assert directory.state.status == "stopped" and lab.page.locator(".sparklab").count() == 0
    shot(lab, "lab-stopped")


def test_a_reload_brings_it_back_whole(playground):
    lab, directory = playground
    lab.until("$('.sparklab').dataset.rows > 60")
    lab.command("docmanager:save")
    before = rows(lab)
    lab.reload()
    lab.until(f"$('.sparklab')?.dataset.rows > {before}", 60)  # the same output, full history, nothing run again
    lab.run(2)
    lab.until("$$('.sparklab').length === 2")
    lab.page.locator(".sparklab").nth(1).scroll_into_view_if_needed()  # out of sight nothing is drawn
    lab.until(f"$$('.sparklab')[1].dataset.rows > {before}")  # a second panel, from the files alone
    assert press(lab, "sample", 0) < 10 and press(lab, "sample", 1) < 10
    shot(lab, "lab-reloaded")
    press(lab, "stop", 1)
    lab.page.wait_for_selector(PICTURE)  # the second one's display link is this page's own, so its twin lands
    lab.until("$('.sparklab').dataset.status === 'stopped'")  # the first cannot be replaced, and says that it is over
    assert directory.state.status == "stopped"


def test_the_picture_outlives_kernel_and_trust(playground):
    lab, directory = playground
    press(lab, "stop")
    lab.page.wait_for_selector(PICTURE)
    lab.command("docmanager:save")
    file = directory.path.with_name(f"{directory.path.name}.ipynb")
    deadline = time.monotonic() + 20
    while "sparklab-twin" not in file.read_text() and time.monotonic() < deadline:
        time.sleep(0.1)
    notebook = json.loads(file.read_text())
    assert [set(output["data"]) for output in notebook["cells"][0]["outputs"]] == [{"text/plain", "text/html"}]
    notebook["cells"][1]["source"] = "changed by a stranger: the signature no longer holds"
    (directory.path.parent / "untrusted.ipynb").write_text(json.dumps(notebook))
    lab.shut_kernels()
    for name in (file.name, "untrusted.ipynb"):
        lab.page.goto("about:blank")
        lab.page.goto(f"{lab.address}doc/tree/{name}")
        lab.page.wait_for_selector(PICTURE)
        seen = lab.page.locator(PICTURE).first.evaluate("image => [image.naturalWidth > 0, image.clientHeight, image.clientWidth > 300]")
        assert seen == [True, 190, True], name
        shot(lab, f"lab-{name.split('.')[0]}")
    trusted = lab.page.evaluate("() => jupyterapp.shell.currentWidget.content.model.cells.get(0).trusted")
    assert trusted is False, "the second notebook was meant to be untrusted"
