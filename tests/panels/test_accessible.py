"""Every static twin under axe-core, in a light and in a dark page: no serious fault, contrast of every word included."""

import pytest
from lab import CHROMIUM, browser, serious_faults
from scenes import ARABIC, HOSTILE, PLAN, STARTED, make_directory, state_of, steps, write
from support import ROOT

import sparklab as sl
from sparklab.box.meter import MemorySnapshot
from sparklab.box.pool import Holder, Pool
from sparklab.panels import box_view
from sparklab.panels.compare import comparison_html
from sparklab.panels.plan_panel import explore
from sparklab.panels.tables import Evaluation
from sparklab.panels.twin import run_html
from sparklab.units import GIB

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM.exists(), reason="needs Debian's chromium (apt-get install chromium)"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # ipywidgets and anywidget, on import
]

LLAMA_8B = ROOT / "tests" / "planner" / "configs" / "llama-3.1-8b.json"
SPARK = sl.Box.profile("dgx-spark")
PAGES = {"light": "background:#fff;color:#111", "dark": "background:#111;color:#eee"}
SCORES = {"loss": 0.5, "exact_match": 0.9, "standard_error": 0.02, "n": 200}


def twins(folder):
    """Name to HTML, something of everything in each."""
    for name in ("one", "two"):
        write(make_directory(folder / name, rank=8 if name == "one" else 16), STARTED, *steps(30), {"event": "eval", "step": 30, "loss": 0.4},
              {"event": "failed", "step": 30, "error": "x", "fact": HOSTILE, "fix": "y"})  # fmt: skip
    memory = MemorySnapshot(total_bytes=120 * GIB, available_bytes=6 * GIB, free_bytes=GIB, cached_bytes=5 * GIB, swap_used_bytes=GIB, pressure_percent=50)
    pool = Pool(memory=memory, holders=(Holder("run one", 7, 90 * GIB),), rest_bytes=24 * GIB, reserve_bytes=8 * GIB)
    reading = {"event": "memory", "process_bytes": 3e9, "peak_bytes": 3.3e9, "total_bytes": 24e9, "available_bytes": 14e9, "free_bytes": 6e9,
               "cached_bytes": 8e9, "swap_used_bytes": 0, "pressure_percent": 30.0, "others": {"java": 4e9}, "watts": 40.0}  # fmt: skip
    full = state_of(STARTED, reading, *steps(30, loss=lambda i: None if i == 7 else 2.0 / i), {"event": "eval", "step": 30, "loss": 0.4, "exact_match": 0.5},
                    {"event": "sample", "step": 30, "prompt": ARABIC, "text": ARABIC}, {"event": "warning", "message": "w"})  # fmt: skip
    rows = [{"prompt": ARABIC, "base": "one two three", "tuned": "one two four"}, {"prompt": "p", "base": "", "tuned": "t"}]
    return {
        "runs": sl.runs(folder)._repr_html_(),
        "no runs": sl.runs(folder / "one" / "commands")._repr_html_(),
        "box": box_view.twin_html(box_view.view(SPARK, pool), ""),
        "compare": comparison_html(rows),
        "evaluate": Evaluation.from_answer({"base": SCORES, "tuned": SCORES, "held_out": 200, "answered": 200})._repr_html_(),
        "plan with sliders": explore(LLAMA_8B, box=SPARK, method="lora", micro_batch_tokens=131072)._repr_html_(),
        "plans": sl.plan(LLAMA_8B, box=SPARK)._repr_html_(),
        "plan": sl.plan(LLAMA_8B, box=SPARK)["full"]._repr_html_(),
        "a box": SPARK._repr_html_(),
        "a run": run_html(full, PLAN, "chat-1", "Qwen3-0.6B · lora", clip=1.0, reopen="look again").replace("<details ", "<details open "),
        "a failed run": run_html(state_of(STARTED, *steps(30), {"event": "failed", "error": "x", "fact": HOSTILE, "fix": "y"}), PLAN, HOSTILE, "m · lora"),
        "a run that starts": run_html(state_of(STARTED), {}, "chat-1", reopen="sl.Run.open('chat-1').panel()"),
    }


def test_no_serious_fault(tmp_path):
    found = {}
    (tmp_path / "runs").mkdir()
    with browser(tmp_path) as context:
        page = context.new_page()
        for theme, style in PAGES.items():
            for name, content in twins(tmp_path / f"runs/{theme}").items():
                page.set_content(f'<!doctype html><html lang="en"><title>{name}</title><body style="{style};font:13px sans-serif"><main>{content}</main>')
                found[name, theme] = serious_faults(page, "main")
    assert len(found) == 2 * 12
    assert not {key: faults for key, faults in found.items() if faults}
