"""The run panel in a real JupyterLab and a real Notebook 7, with and without subshells, in the latest ipykernel and the last one without them.

One server and one browser for all: what a page reads as it opens is written anew before each.
"""

import json
import time
from urllib.parse import quote

import pytest
from lab import CHROMIUM, IDLE, OLD_KERNEL, Lab, browser, configure, offer_old_kernel, serious_faults, server, shot, write_notebook
from scenes import PLAN, start_worker

import sparklab as sl
from sparklab.run.directory import RunDirectory

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM.exists(), reason="needs Debian's chromium (apt-get install chromium)"),
]

SHOW = "import sparklab as sl\nrun = sl.Run.open({!r})\nrun.panel()"
VERSION = "import ipykernel\nprint(6 * 7, ipykernel.__version__)"
BLOCK = "import pathlib, time\nwhile not pathlib.Path('go on').exists():\n    time.sleep(0.02)\nprint('went on')"
LIVE = ".sparklab"
PICTURE = '.sparklab-twin img[src^="data:image/svg+xml;base64"]'
NAME = "<img src=x onerror=alert(1)>"
PROMPTS = ("Greet the world in Arabic.", "Three apples and a cup of tea, please.")
MATRIX = [(app, subshells, kernel) for app in ("lab", "notebook") for subshells in (True, False) for kernel in ("python3", "old")]
VERSIONS = {"python3": "42 7.", "old": "42 6.31."}


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """One server and one Chromium, the folder that is theirs."""
    folder = tmp_path_factory.mktemp("desk")
    (folder / "work").mkdir()
    offer_old_kernel(folder)
    with server(folder) as address, browser(folder) as context:
        yield folder, address, context


@pytest.fixture
def play(desk):
    """``play(name, app, ...)``: a page on a notebook beside a slow run full of hostile text; nothing may have run or left when the test is over."""
    folder, address, context = desk
    workers, labs = [], []

    def begin(name, app="lab", *, subshells=True, kernel="python3", worker=("--steps", 4000, "--delay", 0.03)):
        configure(folder, subshells=subshells)
        work = folder / "work" / name
        work.mkdir()
        recipe = sl.Recipe(model=f"models/{NAME}", data=f"{NAME}.jsonl", sample_prompts=PROMPTS)
        directory = RunDirectory.create(work / NAME, recipe, PLAN, {})
        write_notebook(work / f"{NAME}.ipynb", [SHOW.format(NAME), VERSION, BLOCK, SHOW.format(NAME)], kernel)
        workers.append(start_worker(directory, *worker, "--hostile"))
        labs.append(Lab(context.new_page(), address, app))
        labs[-1].open(f"{name}/{quote(NAME)}.ipynb")
        return labs[-1], directory

    try:
        yield begin
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
        for lab in labs:
            lab.page.close()
        for lab in labs[:1]:
            lab.shut_kernels()
    for lab in labs:
        assert not lab.strangers(), "a request left this machine"
        assert not lab.dialogs, "hostile text ran"
        assert not [error for error in lab.errors if "sparklab" in error]


def rows(lab, index=0):
    return int(lab.page.locator(LIVE).nth(index).get_attribute("data-rows"))


def echo_seconds(lab):
    """How long page, server and kernel take for a cell that does next to nothing: what a loaded machine adds to every click."""
    begin = time.monotonic()
    lab.run(1)
    lab.until("$$('.jp-OutputArea-output').some(output => output.textContent.startsWith('42 '))", 60)
    return time.monotonic() - begin


def press(lab, command, index=0):
    """Presses a button of a panel and returns the seconds until the worker's answer stands there."""
    lab.page.evaluate(f"document.querySelectorAll('{LIVE}')[{index}].querySelector('.sl-ack').textContent = ''")  # an earlier answer is none
    begin = time.monotonic()
    lab.page.locator(LIVE).nth(index).locator(f"button[data-command={command}]").click()
    lab.until(f"$$('{LIVE}')[{index}]?.querySelector('.sl-ack').textContent.startsWith('{command}:')", 60)
    return time.monotonic() - begin


def save(lab, path, *words):
    """Saves the notebook and waits until the file says it."""
    deadline = time.monotonic() + 60
    while True:
        lab.command("docmanager:save")
        notebook = json.loads(path.read_text())
        text = json.dumps(notebook, ensure_ascii=False)
        if all(word in text for word in words):
            return notebook
        assert time.monotonic() < deadline, "the notebook was not saved"
        lab.page.wait_for_timeout(200)


@pytest.mark.parametrize(("app", "subshells", "kernel"), MATRIX, ids=[f"{app}-{'subshells' if on else 'one shell'}-{kernel}" for app, on, kernel in MATRIX])
def test_a_life(play, app, subshells, kernel):
    if kernel == "old" and not OLD_KERNEL.exists():
        pytest.fail(f"{OLD_KERNEL} is not there: make puts it there")
    lab, directory = play(f"{app}-{subshells}-{kernel}", app, subshells=subshells, kernel=kernel)
    it_advances_beside_other_cells(lab, kernel)
    every_button_acts_and_says_so(lab, directory)
    a_reload_brings_it_back(lab, directory)
    if subshells and kernel == "python3":
        buttons_act_while_a_cell_blocks(lab, directory)  # after a reload, where ipykernel's own guess at the subshell would be a dead one
    a_restart_leaves_the_picture_until_it_is_opened_again(lab)
    the_end_freezes(lab, directory)


def it_advances_beside_other_cells(lab, kernel):
    lab.run(0)
    lab.until(f"$('{LIVE}')?.dataset.rows > 5", 60)
    before = rows(lab)
    lab.until(f"$('{LIVE}').dataset.rows > {before + 10}", 60)
    lab.run(1)
    lab.until(f"$$('.jp-OutputArea-output').some(output => output.textContent.startsWith('{VERSIONS[kernel]}'))", 60)


def every_button_acts_and_says_so(lab, directory):
    """Two seconds from the click to the worker's answer, and what this machine takes for a cell that does nothing, three times over."""
    allowed = 2 + 3 * echo_seconds(lab)
    seconds = {command: press(lab, command) for command in ("sample", "checkpoint", "evaluate", "pause")}
    lab.until(f"$('{LIVE}').dataset.status === 'paused'")
    seconds["resume"] = press(lab, "resume")
    lab.until(f"$('{LIVE}').dataset.status === 'running'")
    print({command: round(taken, 2) for command, taken in seconds.items()}, "seconds, allowed", round(allowed, 2))
    assert max(seconds.values()) < allowed, (seconds, allowed)
    assert len(directory.state.checkpoints) == 1
    lab.until("$('.sl-list').textContent.includes('مرحبا بالعالم')")
    lab.page.get_by_label("Ask the model as it is now").fill("What is LoRA?")
    lab.page.keyboard.press("Enter")
    lab.until("$('.sl-list').textContent.includes('You asked: What is LoRA?')", 60)
    lab.page.get_by_label("Change the learning rate").click()
    lab.page.keyboard.type("3e-5")
    lab.page.keyboard.press("Enter")
    lab.until("$('.sl-ack').textContent === 'learning_rate: 2e-4 → 3e-05'", 60)


def buttons_act_while_a_cell_blocks(lab, directory):
    """With subshells the page's messages pass a cell that is running."""
    lab.begin(2)
    lab.page.wait_for_function(IDLE.replace("=== 'idle'", "=== 'busy'"))
    press(lab, "checkpoint")
    before = rows(lab)
    lab.until(f"$('{LIVE}').dataset.rows > {before}", 60)
    went_on = "$$('.jp-OutputArea-output').some(output => output.textContent.startsWith('went on'))"
    lab.until(f"!{went_on}")  # the cell is at it still
    (directory.path.parent / "go on").touch()
    lab.until(went_on, 60)


def a_reload_brings_it_back(lab, directory):
    save(lab, directory.path.with_name(f"{NAME}.ipynb"), "sparklab-twin")
    before = rows(lab)
    lab.reload()
    lab.until(f"$('{LIVE}')?.dataset.rows > {before}", 60)  # the same output, the whole history, no cell run again
    press(lab, "sample")
    press(lab, "checkpoint")


def a_restart_leaves_the_picture_until_it_is_opened_again(lab):
    before = rows(lab)
    lab.page.evaluate("() => jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart()")
    lab.until(f"!$('{LIVE}') && $('{PICTURE}')", 60)
    lab.page.wait_for_function(IDLE, timeout=120_000)
    lab.run(0)
    lab.until(f"$('{LIVE}')?.dataset.rows > {before}", 60)


def the_end_freezes(lab, directory):
    said = lab.page.evaluate("document.querySelector('button[data-command=stop]').click(), document.querySelector('.sl-ack').textContent")
    assert said == "Stopping…", "said at once, before any answer"
    lab.until(f"!$('{LIVE}') && $('{PICTURE}') && $('.sparklab-twin').textContent.includes('Stopped')", 60)
    assert directory.state.status == "stopped"
    notebook = save(lab, directory.path.with_name(f"{NAME}.ipynb"), "Stopped")
    (output,) = notebook["cells"][0]["outputs"]
    assert set(output["data"]) == {"text/plain", "text/html"} and "widgets" not in notebook["metadata"]


@pytest.mark.parametrize("app", ["lab", "notebook"])
def test_the_picture_outlives_kernel_and_trust(play, app):
    lab, directory = play(f"picture-{app}", app, worker=("--steps", 400, "--delay", 0.005, "--fail-at", 150, "--nan-at", 149))
    lab.run(0)
    lab.until(f"!$('{LIVE}') && $('.sparklab-twin')?.textContent.includes('Failed')", 60)
    file = directory.path.with_name(f"{NAME}.ipynb")
    notebook = save(lab, file, "cannot be trusted")
    notebook["cells"][1]["source"] = "changed by a stranger: the signature no longer holds"
    file.with_name("untrusted.ipynb").write_text(json.dumps(notebook))
    lab.shut_kernels()
    for name in (file.name, "untrusted.ipynb"):
        lab.page.goto("about:blank")
        lab.show(f"{file.parent.name}/{quote(name)}")
        lab.page.wait_for_selector(PICTURE)
        seen = lab.page.locator(PICTURE).first.evaluate("image => [image.naturalWidth > 0, image.clientHeight, image.clientWidth > 300]")
        assert seen == [True, 190, True], name
        assert "cannot be trusted<img src=x" in lab.page.locator(".sparklab-twin").inner_text()
        shot(lab, f"{app}-{name.split('.')[0] if name != file.name else 'saved'}")
    trusted = lab.page.evaluate("() => jupyterapp.shell.currentWidget.content.model.cells.get(0).trusted")
    assert trusted is False, "the second notebook was meant to be untrusted"


HIDE = """() => {
  Object.defineProperty(document, "hidden", { get: () => true, configurable: true });
  document.dispatchEvent(new Event("visibilitychange"));
}"""
UNHIDE = "() => { delete document.hidden; document.dispatchEvent(new Event('visibilitychange')); }"


def test_two_notebooks_at_once_and_a_page_out_of_sight(play, desk):
    lab, directory = play("two")
    lab.run(0)
    lab.until(f"$('{LIVE}')?.dataset.rows > 5", 60)
    assert not serious_faults(lab.page, LIVE)
    other = Lab(desk[2].new_page(), lab.address, "notebook")
    write_notebook(directory.path.with_name("other.ipynb"), [SHOW.format(NAME)])
    other.open("two/other.ipynb")
    other.run(0)
    other.until(f"$('{LIVE}')?.dataset.rows > 5", 60)
    press(other, "pause")
    lab.page.bring_to_front()
    lab.until(f"$('{LIVE}').dataset.status === 'paused'", 60)
    press(lab, "resume")
    lab.page.evaluate(HIDE)
    before = rows(lab)
    lab.page.wait_for_timeout(1000)
    assert rows(lab) <= before + 2, "nothing is drawn where nobody looks"
    lab.page.evaluate(UNHIDE)
    lab.until(f"$('{LIVE}').dataset.rows > {before + 20}", 60)
    assert not other.dialogs and not other.strangers()
    other.page.close()
