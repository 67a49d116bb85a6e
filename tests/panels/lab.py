"""A real JupyterLab on 127.0.0.1 and a real Chromium that drives it, both isolated from this user's own settings."""

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

CHROMIUM = pathlib.Path("/usr/bin/chromium")
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
AXE = pathlib.Path(sys.prefix) / "node" / "node_modules" / "axe-core" / "axe.min.js"
OLD_KERNEL = pathlib.Path(sys.prefix) / "ipykernel-6.31"
"""ipykernel 6.31, which knows no subshells: put there by make, unpacked beside the latest."""
IDLE = "() => window.jupyterapp?.shell?.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
RUN_CELL = "i => { const w = jupyterapp.shell.currentWidget; w.content.activeCellIndex = i; return jupyterapp.commands.execute('notebook:run-cell'); }"


def write_notebook(path, cells, kernel="python3"):
    """A notebook of code cells, never run."""
    path.write_text(
        json.dumps(
            {
                "cells": [
                    {"cell_type": "code", "id": f"c{i}", "metadata": {}, "execution_count": None, "outputs": [], "source": source}
                    for i, source in enumerate(cells)
                ],
                "metadata": {"kernelspec": {"name": kernel, "display_name": kernel, "language": "python"}},
                "nbformat": 4,
                "nbformat_minor": 5,
            }
        )
    )


def configure(folder, *, dark=False, subshells=True):
    """What a page reads as it opens: theme, and whether widgets talk over subshells."""
    settings = {
        "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
        "apputils-extension/themes": {"theme": "JupyterLab Dark" if dark else "JupyterLab Light"},
        "notebook-extension/tracker": {} if subshells else {"commsOverSubshells": "disabled"},
    }
    for name, value in settings.items():
        file = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(value))


def offer_old_kernel(folder):
    """A kernel named ``old``: ipykernel 6.31 in the same Python, found before the latest."""
    places = ":".join([str(OLD_KERNEL), os.environ.get("PYTHONPATH", "")]).strip(":")
    spec = {
        "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "display_name": "old",
        "language": "python",
        "env": {"PYTHONPATH": places},
    }
    file = folder / "d" / "kernels" / "old" / "kernel.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(spec))


@contextlib.contextmanager
def server(folder, *, dark=False, subshells=True):
    """JupyterLab and Notebook 7 with ``folder/work`` as their root; yields the address of both."""
    configure(folder, dark=dark, subshells=subshells)
    (folder / "work").mkdir(exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    places = {"JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "ws", "JUPYTER_CONFIG_DIR": "c", "JUPYTER_DATA_DIR": "d",
              "JUPYTER_RUNTIME_DIR": "r", "IPYTHONDIR": "i"}  # fmt: skip
    command = [
        sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0",
        "--IdentityProvider.token=", "--ServerApp.password=", "--ServerApp.disable_check_xsrf=True", f"--ServerApp.root_dir={folder / 'work'}",
        "--LabApp.expose_app_in_browser=True", "--JupyterNotebookApp.expose_app_in_browser=True",
    ]  # fmt: skip
    with open(folder / "server.log", "w") as log:
        process = subprocess.Popen(
            command, env=dict(os.environ, **{key: str(folder / place) for key, place in places.items()}), stdout=log, stderr=log, start_new_session=True
        )
    address = f"http://127.0.0.1:{port}/"
    try:
        for _ in range(900):
            try:
                with urllib.request.urlopen(address + "api/status", timeout=1):
                    break
            except OSError:
                time.sleep(0.1)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:  # it waits for a build check that a page asked for and nobody needs any more
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


class Lab:
    """One page on one notebook; remembers every request and every dialog."""

    def __init__(self, page, address, app="lab"):
        self.page, self.address, self.app = page, address, app
        page.set_default_timeout(120_000)  # a loaded machine takes a minute to draw JupyterLab for the first time
        self.requests, self.dialogs, self.errors = [], [], []
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("dialog", self._answer)
        page.on("pageerror", lambda error: self.errors.append(str(error)))

    def _answer(self, dialog):
        if dialog.type == "beforeunload":  # JupyterLab's own, on leaving an unsaved notebook
            dialog.accept()
        else:
            self.dialogs.append(dialog.message)
            dialog.dismiss()

    def open(self, name):
        self.show(name)
        self.page.wait_for_function(IDLE, timeout=120_000)

    def show(self, name):
        """The notebook's page, with or without a kernel."""
        self.page.goto(f"{self.address}{'doc/tree' if self.app == 'lab' else 'notebooks'}/{name}")

    def reload(self):
        self.page.reload()
        self.page.wait_for_function(IDLE, timeout=120_000)

    def run(self, index):
        self.page.evaluate(RUN_CELL, index)

    def begin(self, index):
        """Runs a cell without waiting for its end."""
        self.page.evaluate(f"i => {{ ({RUN_CELL})(i); }}", index)

    def cell(self, index):
        return self.page.locator(".jp-Notebook .jp-CodeCell").nth(index)

    def until(self, expression, timeout_seconds=20):
        """Waits until a JavaScript expression over ``$`` (querySelector) and ``$$`` is true."""
        body = f"() => {{ const $ = s => document.querySelector(s), $$ = s => [...document.querySelectorAll(s)]; return {expression}; }}"
        self.page.wait_for_function(body, timeout=timeout_seconds * 1000)

    def command(self, name):
        self.page.evaluate("name => jupyterapp.commands.execute(name)", name)

    def strangers(self):
        """Requests that left this machine: there must be none."""
        return [url for url in self.requests if not url.startswith((self.address, self.address.replace("http", "ws"), "data:", "blob:", "about:"))]

    def shut_kernels(self):
        with urllib.request.urlopen(self.address + "api/sessions") as answer:
            sessions = json.load(answer)
        for session in sessions:
            urllib.request.urlopen(urllib.request.Request(f"{self.address}api/sessions/{session['id']}", method="DELETE")).close()


@contextlib.contextmanager
def browser(folder, *, width=1000, height=900):
    """A fresh Chromium profile; yields its context."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            str(folder / "chromium"), executable_path=str(CHROMIUM), headless=True, chromium_sandbox=False, args=list(FLAGS),
            viewport={"width": width, "height": height},
        )  # fmt: skip
        try:
            yield context
        finally:
            context.close()


def shot(lab, name):
    """A picture for people, where SPARKLAB_SHOTS names a folder."""
    if folder := os.environ.get("SPARKLAB_SHOTS"):
        lab.page.screenshot(path=f"{folder}/{name}.png")


def serious_faults(page, selector):
    """What axe-core finds wrong inside ``selector`` that it calls serious or critical, as (rule, element)."""
    if not AXE.exists():
        pytest.skip("needs axe-core (npm, then make test)")
    page.evaluate(AXE.read_text())
    found = page.evaluate("selector => axe.run(selector, {resultTypes: ['violations']})", selector)
    assert found["passes"], "nothing was looked at"
    return [(fault["id"], node["html"]) for fault in found["violations"] if fault["impact"] in ("serious", "critical") for node in fault["nodes"]]
