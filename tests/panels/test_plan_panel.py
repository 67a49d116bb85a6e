"""The plan with sliders: what it says is what the planner says, hostile words stay words, and a real JupyterLab moves, reloads and saves it."""

import json
import re
import shutil
import time
import warnings

import pytest
from lab import CHROMIUM, Lab, browser, serious_faults, server, shot, write_notebook
from support import ROOT

import sparklab as sl
from sparklab.errors import RecipeError
from sparklab.units import NA, gib

LLAMA_8B = ROOT / "tests" / "planner" / "configs" / "llama-3.1-8b.json"
SPARK = sl.Box.profile("dgx-spark")
HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture
def explore():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # ipywidgets and anywidget, on import
        from sparklab.panels.plan_panel import explore
    return explore


@pytest.fixture
def panel(explore):
    """A panel with its widget, as in a notebook, and nothing behind the comm."""
    made = explore(LLAMA_8B, box=SPARK)
    made.widget = made._make_widget()
    yield made
    made.widget.close()


def test_it_starts_at_the_best_plan_and_follows_the_sliders(panel):
    best = sl.plan(LLAMA_8B, box=SPARK).best()
    assert panel.plan.recipe == best.recipe
    assert panel.widget.view["summary"].startswith(f"lora: {gib(best.peak_bytes):.3g} GiB, fits")
    for method, tokens, rank, layers in (("full", 512, 16, 32), ("qlora", 131072, 256, 0), ("lora", 12288, 1, 7)):
        panel.widget.choice = {"method": method, "tokens": tokens, "rank": rank, "layers": layers}
        expected = sl.plan(panel.recipe, box=SPARK)
        assert (panel.recipe.method, panel.recipe.micro_batch_tokens, expected.ledger.checkpointed) == (method, tokens, layers)
        assert panel.recipe.max_length == min(2048, tokens)
        assert f"{gib(expected.peak_bytes):.3g} GiB" in panel.widget.view["summary"]
        assert [row["method"] for row in panel.widget.view["methods"]] == ["full", "lora", "qlora"]
        for row in panel.widget.view["methods"]:  # every bar closes
            peak = panel.plan.replace(method=row["method"]).peak_bytes
            assert sum(part["gib"] for part in row["segments"]) == pytest.approx(gib(peak))
            assert row["gib"] == pytest.approx(gib(peak))
            assert gib(peak) <= panel.widget.view["scale"] or panel.widget.view["scale"] > 2 * gib(panel.plan.usable_bytes)
        assert bool(panel.widget.view["fixes"]) != expected.fits
        json.dumps(panel.widget.view, allow_nan=False)


def test_what_is_not_on_offer_changes_nothing(panel):
    before = panel.recipe
    sound = {"method": "lora", "tokens": 4096, "rank": 16, "layers": 0}
    for wrong in ({"tokens": 4097}, {"tokens": "4096"}, {"tokens": 4096.0}, {"tokens": [1]}, {"rank": -1}, {"rank": None}, {"rank": True},
                  {"layers": 33}, {"layers": -1}, {"layers": True}, {"method": "dora"}, {"method": ["lora"]}):  # fmt: skip
        panel.widget.choice = {**sound, **wrong}
        assert panel.recipe == before, wrong
    panel.widget.choice = {}
    assert panel.recipe == before
    panel.widget.choice = sound
    assert panel.recipe.micro_batch_tokens == 4096


def test_it_takes_whatever_can_be_planned(explore):
    recipe = sl.Recipe(model=str(LLAMA_8B), data="chats.jsonl", micro_batch_tokens=3000, max_length=3000, rank=24)
    panel = explore(recipe, box=SPARK)
    assert panel.recipe == recipe
    assert 3000 in panel._settings.tokens and 24 in panel._settings.ranks
    assert list(explore(LLAMA_8B, box=SPARK, method="qlora")._settings.bases) == ["qlora"]
    assert explore(sl.plan(LLAMA_8B, box=SPARK)["full"]).recipe.method == "full"
    unknown = explore(LLAMA_8B, box=sl.Box(name="odd", chip="odd", memory_bytes=NA, unified=False))
    assert "memory of the box unknown" in unknown._repr_html_()
    assert "N/A tokens/s" in unknown._repr_html_()
    with pytest.raises(RecipeError, match="rank is 0"):
        explore(LLAMA_8B, box=SPARK, rank=0)
    with pytest.raises(RecipeError, match="these are several"):
        explore([LLAMA_8B, "tiny"], box=SPARK)


def test_the_twin_is_inert_and_says_the_same(explore, tmp_path):
    model = tmp_path / HOSTILE
    model.mkdir()
    shutil.copy(LLAMA_8B, model / "config.json")
    panel = explore(str(model), box=SPARK, method="lora", micro_batch_tokens=65536, checkpoint_layers="none")
    content = panel._repr_html_()
    assert set(re.findall(r"<(\w+)", content)) <= {"div", "span", "b", "img"}
    assert "&lt;img src=x onerror" in content
    assert not re.search(r"<[^>]* on\w+=", content)
    assert "does not fit" in content and "Any one of these fits" in content
    assert str(panel) == str(panel.plan)


def test_the_page_code_is_offline_and_builds_no_markup_from_text(panel):
    code = str(panel.widget._esm)
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "http:", "https:", "fetch(", "import("):
        assert word not in code, word


@pytest.mark.browser
@pytest.mark.skipif(not CHROMIUM.exists(), reason="needs Debian's chromium (apt-get install chromium)")
def test_in_a_real_notebook(tmp_path):
    work = tmp_path / "work"
    (work / HOSTILE).mkdir(parents=True)
    shutil.copy(LLAMA_8B, work / HOSTILE / "config.json")
    cells = [f"import sparklab as sl\npanel = sl.explore({HOSTILE!r}, box=sl.Box.profile('dgx-spark'))\npanel", "print(panel.recipe.micro_batch_tokens)"]
    write_notebook(work / "plan.ipynb", cells)
    best = sl.plan(LLAMA_8B, box=SPARK, method="lora").best().replace(micro_batch_tokens=4096)
    small = f"qlora: {gib(best.replace(method='qlora').peak_bytes):.3g} GiB"
    with server(tmp_path) as address, browser(tmp_path) as context:
        lab = Lab(context.new_page(), address)
        lab.open("plan.ipynb")
        lab.run(0)
        lab.until(f"$('.sl-plan .sl-summary')?.textContent.startsWith('lora: {gib(best.peak_bytes):.3g} GiB, fits')", 60)
        shot(lab, "plan-live")
        assert not serious_faults(lab.page, ".sl-plan")
        lab.page.locator(".sl-plan input[aria-label='Tokens a row']").focus()
        lab.page.keyboard.press("ArrowLeft")
        lab.until("$('.sl-plan').dataset.seen.startsWith('\"3,072 tokens')")
        lab.until("document.activeElement.matches('.sl-plan input')")
        time.sleep(2)  # the twin is written anew meanwhile: the slider must not lose the keyboard over it
        lab.page.keyboard.press("ArrowRight")
        lab.until("$('.sl-plan').dataset.seen.startsWith('\"4,096 tokens')")
        lab.page.locator(".sl-plan input[value=qlora]").check()
        lab.until(f"$('.sl-plan .sl-summary').textContent.startsWith('{small}')")
        lab.run(1)
        lab.until("$$('.jp-OutputArea-output').some(output => output.textContent.trim() === '4096')")
        time.sleep(2)
        lab.command("docmanager:save")
        time.sleep(1)
        lab.reload()
        lab.until(f"$('.sl-plan .sl-summary')?.textContent.startsWith('{small}')", 60)
        lab.page.locator(".sl-plan input[aria-label='Rank']").press("End")
        lab.until("$('.sl-plan').dataset.seen.includes('rank 256')")
        saved = json.loads((work / "plan.ipynb").read_text())
        (output,) = saved["cells"][0]["outputs"]
        assert set(output["data"]) == {"text/html", "text/plain"}
        assert small in "".join(output["data"]["text/html"])
        lab.shut_kernels()
        lab.page.goto("about:blank")
        lab.page.goto(f"{address}doc/tree/plan.ipynb")
        lab.page.wait_for_selector('.sparklab-twin img[src^="data:image/svg+xml;base64"]')
        shot(lab, "plan-saved")
        assert not serious_faults(lab.page, ".sparklab-twin")
        assert not lab.strangers() and not lab.dialogs
        assert not [error for error in lab.errors if "sparklab" in error]
