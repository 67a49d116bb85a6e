"""The box panel and the runs table in a real notebook: live, asleep while hidden, back after a reload, a picture without a kernel."""

import json

import pytest
from lab import CHROMIUM, Lab, browser, serious_faults, server, shot, write_notebook
from scenes import HOSTILE, STARTED, make_directory, start_worker, steps, write

pytestmark = [pytest.mark.browser, pytest.mark.skipif(not CHROMIUM.exists(), reason="needs Debian's chromium (apt-get install chromium)")]


@pytest.fixture
def work(tmp_path):
    folder = tmp_path / "work"
    for index, name in enumerate(("chat-1", "<img src=x onerror=alert(1)>")):
        directory = make_directory(folder / "runs" / name, learning_rate=1e-4 * (1 + index))
        write(directory, STARTED, *steps(60, loss=lambda i, index=index: (2 + index) / i ** 0.5), {"event": "eval", "step": 30, "loss": 0.6},
              {"event": "failed", "step": 60, "error": HOSTILE, "fact": HOSTILE, "fix": HOSTILE})  # fmt: skip
    write_notebook(folder / "looks.ipynb", ["import sparklab as sl\nbox = sl.monitor()\nbox", "table = sl.runs('runs')\ntable", "6 * 7"])
    return folder


def test_in_a_real_notebook(tmp_path, work):
    live = make_directory(work / "runs" / "live")
    worker = start_worker(live, "--steps", 4000, "--delay", 0.02)
    try:
        with server(tmp_path) as address, browser(tmp_path) as context:
            lab = Lab(context.new_page(), address)
            lab.open("looks.ipynb")
            lab.run(0)
            lab.until("Number($('.sl-box')?.dataset.looks) >= 4", 60)  # it ticks
            lab.until("$$('.sl-box .sl-part').length >= 2 && $('.sl-box .sl-legend').textContent.includes('page cache')")
            lab.run(1)
            lab.until("$('.sl-runs')?.dataset.rows === '3'", 60)
            before = float(lab.page.locator(".sl-runs").get_attribute("data-reached"))
            lab.until(f"Number($('.sl-runs').dataset.reached) > {before}")  # the run at work grows
            lab.run(2)
            lab.until("$$('.jp-OutputArea-output').some(output => output.textContent.trim() === '42')")
            shot(lab, "residents-live")
            assert not serious_faults(lab.page, ".sl-box") and not serious_faults(lab.page, ".sl-runs")
            toggle = lab.page.locator(".sl-runs .sl-toggle").first
            toggle.click()
            lab.until("$('.sl-runs .sl-toggle').getAttribute('aria-pressed') === 'false'")
            lab.page.locator(".sl-runs canvas").hover(position={"x": 300, "y": 60})
            lab.until("$('.sl-runs .sl-at').textContent.startsWith('step ')")
            lab.page.locator(".sl-runs button", has_text="log").click()
            lab.command("docmanager:save")
            lab.reload()
            lab.until("Number($('.sl-box')?.dataset.looks) >= 4 && $('.sl-runs')?.dataset.rows === '3'", 60)
            looks = int(lab.page.locator(".sl-box").get_attribute("data-looks"))
            lab.until(f"Number($('.sl-box').dataset.looks) > {looks}", 30)  # alive again
            lab.shut_kernels()
            worker.kill()
            lab.page.goto("about:blank")
            lab.page.goto(f"{address}doc/tree/looks.ipynb")
            lab.until("$$('.sparklab-twin img[src^=\"data:image/svg+xml;base64\"]').length === 2", 60)
            shot(lab, "residents-saved")
            assert not serious_faults(lab.page, ".sparklab-twin")
            assert not lab.strangers() and not lab.dialogs
            assert not [error for error in lab.errors if "sparklab" in error]
        saved = json.loads((work / "looks.ipynb").read_text())
        assert [set(cell["outputs"][0]["data"]) for cell in saved["cells"][:2]] == [{"text/html", "text/plain"}] * 2
    finally:
        worker.kill()
        worker.wait()
