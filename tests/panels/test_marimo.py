"""The panels in marimo, which has no output that a kernel could come back to: each shows its widget, and a run shows itself."""

import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from lab import CHROMIUM, browser
from scenes import STARTED, make_directory, start_worker, steps, write

pytestmark = [pytest.mark.browser, pytest.mark.skipif(not CHROMIUM.exists(), reason="needs Debian's chromium (apt-get install chromium)")]

APP = """import marimo
app = marimo.App()
@app.cell
def _():
    import sparklab as sl
    sl.monitor()
    return (sl,)
@app.cell
def _(sl):
    sl.runs("runs")
    return
@app.cell
def _(sl):
    sl.explore("tiny")
    return
@app.cell
def _(sl):
    sl.Run.open("runs/live").panel()
    return
@app.cell
def _(sl):
    sl.Run.open("runs/over").panel()
    return
if __name__ == "__main__":
    app.run()
"""
# marimo keeps widgets in shadow trees
FIND = """const found = []; const walk = (node) => { for (const child of node.children || []) { if (child.matches(selector)) found.push(child); walk(child); }
  if (node.shadowRoot) walk(node.shadowRoot); }; walk(document.body);"""


def test_every_panel_is_live(tmp_path):
    live, over = (make_directory(tmp_path / "runs" / name) for name in ("live", "over"))
    write(over, STARTED, *steps(20), {"event": "finished", "step": 20, "seconds": 9})
    (tmp_path / "app.py").write_text(APP)
    worker = start_worker(live, "--steps", 4000, "--delay", 0.02)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "marimo", "-q", "run", "app.py", "--headless", "--host", "127.0.0.1", "--port", str(port), "--no-token"]
    server = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(port)
        with browser(tmp_path, height=2400) as context:
            page = context.new_page()
            strangers, faults = [], []
            page.on("request", lambda request: strangers.append(request.url) if "//" in request.url and f"127.0.0.1:{port}" not in request.url else None)
            page.on("pageerror", lambda error: faults.append(str(error)))
            page.goto(f"http://127.0.0.1:{port}/")

            def until(selector, condition):
                page.wait_for_function(f"(selector) => {{ {FIND} return {condition}; }}", arg=selector, timeout=60_000)

            until(".sl-box", "found.length === 1 && Number(found[0].dataset.looks) >= 3")
            until(".sl-runs", "found.length === 1 && found[0].dataset.rows === '2'")
            until(".sl-plan .sl-summary", "found.length === 1 && found[0].textContent.includes('fits')")
            until(".sparklab-twin", "found.some(node => node.textContent.includes('Finished'))")
            until("[aria-label='Training run'] .sl-word", "found.length === 1 && found[0].textContent === 'Training'")
            page.evaluate(f"(selector) => {{ {FIND} found[0].click(); }}", "button[data-command=stop]")
            until("[aria-label='Training run'] .sl-word, .sparklab-twin b", "found.some(node => node.textContent.includes('Stopped'))")
            assert worker.wait(30) == 0
            assert not [url for url in strangers if not url.startswith(("data:", "blob:"))] and not faults
    finally:
        server.terminate()
        server.wait()
        worker.kill()
        worker.wait()


def wait_for(port):
    for _ in range(600):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
