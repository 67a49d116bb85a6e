"""One HTML file: closed in itself, inert whatever stands in the run, the same on the command line."""

import json
import os
import re

import pytest
from lab import CHROMIUM, browser
from scenes import ARABIC, HOSTILE, PLAN, STARTED, make_directory, steps, write
from support import run_cli
from test_panel_twin import ALLOWED, inspect

import sparklab as sl
from sparklab.errors import RunError
from sparklab.run.directory import write_json


@pytest.fixture
def hostile(tmp_path):
    """A failed run with hostile text wherever text can stand, the recipe and the environment included."""
    plan = {**PLAN, "lines": [*PLAN["lines"], {"name": HOSTILE.replace("\udc80", ""), "phase": "train", "gib": 0.1, "formula": "<b>"}]}
    directory = make_directory(tmp_path / "<b onclick=alert(1)>", plan, sample_prompts=("<script>alert(3)</script>",))
    write_json(directory.path / "environment.json", {"versions": {"torch": "<script>alert(4)</script>"}, "platform": "<img src=x onerror=alert(5)>"})
    write(directory, STARTED, *steps(40), {"event": "eval", "step": 40, "loss": 0.5, "exact_match": 0.25, "n": 8},
          {"event": "sample", "step": 40, "prompt": "<script>alert(3)</script>", "text": ARABIC}, {"event": "warning", "message": HOSTILE},
          {"event": "failed", "step": 40, "error": "x", "fact": HOSTILE, "fix": HOSTILE})  # fmt: skip
    return directory


def test_it_is_one_file_and_inert(hostile, tmp_path):
    path = sl.Run.open(hostile.path).report(tmp_path / "out" / "report.html")
    text = path.read_text(encoding="utf-8")
    found = inspect(text[text.index("<main>") :].replace("</body></html>", ""))
    assert set(found.tags) <= ALLOWED | {"main", "table", "tr", "th", "td"} and not [name for name, _ in found.attributes if name.startswith("on")]
    assert not re.search(r"<script|https?:", text)
    assert "default-src 'none'" in text and "color-scheme" in text and text.count("<details open ") >= 5
    for words in ("&lt;script&gt;alert(3)", "&lt;script&gt;alert(4)", ARABIC, "What to do:", "base weights", "0.6e9 x 2 B", "learning_rate", "25.0 %"):
        assert words in text, words
    assert sl.Run.open(hostile.path).report() == hostile.path / "report.html"
    assert sorted(file.name for file in path.parent.iterdir()) == ["report.html"], "no draft is left"


def test_a_place_that_cannot_be_written_is_named(directory, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot be written"):
        sl.Run.open(directory.path).report(tmp_path / "file" / "report.html")


def test_a_run_that_goes_on_says_so_and_a_damaged_one_costs_only_its_part(directory):
    descriptor = directory.lock()
    write(directory, STARTED, *steps(5))
    assert "Picture of" in sl.Run.open(directory.path).report().read_text()
    os.close(descriptor)
    (directory.path / "plan.json").write_text("{")
    (directory.path / "environment.json").write_text("[]")
    text = sl.Run.open(directory.path).report().read_text()
    assert "Lost" in text and "<b>Plan</b>" not in text and "<b>Recipe</b>" in text


def test_the_command_line_writes_the_same(hostile, tmp_path):
    result = run_cli("report", hostile.path, "--out", tmp_path / "r.html", "--json")
    told = json.loads(result.stdout)
    assert result.returncode == 0 and told["report"] == str(tmp_path / "r.html") and told["status"] == "failed"
    assert told["bytes"] == (tmp_path / "r.html").stat().st_size > 10_000
    assert f"wrote {hostile.path / 'report.html'}" in run_cli("report", hostile.path).stdout
    assert run_cli("report", tmp_path).returncode == 2


@pytest.mark.browser
@pytest.mark.skipif(not CHROMIUM.exists(), reason="needs Debian's chromium (apt-get install chromium)")
def test_in_a_browser_without_network(hostile, tmp_path):
    path = sl.Run.open(hostile.path).report(tmp_path / "report.html")
    with browser(tmp_path) as context:
        context.set_offline(True)
        page, asked, ran = context.new_page(), [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("dialog", lambda dialog: (ran.append(dialog.message), dialog.dismiss()))
        colours = {}
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            page.goto(path.as_uri())
            assert page.evaluate("[...document.images].map(image => image.naturalWidth > 0)") == [True] * 3
            colours[scheme] = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert colours == {"light": "rgb(255, 255, 255)", "dark": "rgb(17, 17, 17)"}
        assert not ran and all(url.startswith(("file:", "data:")) for url in asked)
