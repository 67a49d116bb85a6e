"""Pictures of the run panel for people to look at: every state, light and dark, narrow and wide, live and as a twin. The runs are made up.

python tests/panels/shots.py FOLDER
python tests/panels/shots.py docs --docs               the two that the README shows
python tests/panels/shots.py FOLDER --run RUN          a real run's panel as it was two thirds through
"""

import argparse
import math
import pathlib
import tempfile
import time
import warnings

from lab import browser
from scenes import ARABIC, PLAN, STARTED, state_of
from stage import paper, stage

from sparklab.panels import facts, twin
from sparklab.run.directory import RunDirectory
from sparklab.run.events import EventReader
from sparklab.run.state import RunState

BEGAN = time.time() - 1000
LINES = {"weights": 1.2, "adapters": 0.1, "optimizer": 0.2, "activations kept": 1.0, "loss tile": 0.1, "allocator slack": 0.1, "runtime": 0.5}
SPARK = {
    **PLAN, "tokens_per_second": [1200, 9000.0], "wh": [3.0, 9.0],
    "lines": [{"name": name, "phase": "train", "gib": size, "formula": ""} for name, size in LINES.items()],
}  # fmt: skip
GUARD = (
    "3.9 GiB were available, below the soft floor of 4.0 GiB, and falling by 0.6 GiB a second; ollama (process 812) grew by 9.2 GiB. "
    "A checkpoint was saved at step 311."
)


def loss_at(step):
    return 2 * math.exp(-step / 100) + 0.4 + 0.13 * math.sin(step * 1.7) * math.cos(step * 0.3)


def step_event(step, total=1000, **changes):
    return {"event": "step", "time": BEGAN + step, "step": step, "steps": total, "epoch": 3 * step / total, "loss": loss_at(step), "tokens": 2000 + step % 7,
            "learning_rate": 2e-4 * min(1, step / 30) * (1 - step / total), "seconds": 0.9 + 0.02 * math.sin(step), "wait_seconds": 0.004,
            "grad_norm": 0.6 + 0.4 * math.sin(step / 3) + 2 * math.exp(-step / 9) + (0.9 if step % 37 == 0 else 0), **changes}  # fmt: skip


def memory_event(step):
    return {"event": "memory", "time": BEGAN + step, "process_bytes": 3e9 + 1e8 * math.sin(step / 20), "peak_bytes": 3.3e9, "available_bytes": 15.2e9,
            "total_bytes": 25.2e9, "free_bytes": 6.1e9, "cached_bytes": 9.4e9, "swap_used_bytes": 0.0, "pressure_percent": 0.0, "watts": 41.0,
            "others": {"ollama (process 812)": 3.1e9, "jupyter-lab (process 77)": 6e8}}  # fmt: skip


def run_of(steps, *last):
    """A run of so many steps with everything a run can have, and what comes last."""
    state = state_of({**STARTED, "time": BEGAN}, {"event": "eval", "time": BEGAN, "step": 0, "loss": 2.6, "exact_match": 0.01, "n": 200})
    for step in range(1, steps + 1):
        state.add(step_event(step))
        if step % 10 == 0:
            state.add(memory_event(step))
        if step % 50 == 0:
            held_out = {"event": "eval", "time": BEGAN + step, "step": step, "loss": loss_at(step) + 0.08 + 8e-7 * step * step}
            arabic = {"event": "sample", "time": BEGAN + step, "step": step, "prompt": "Greet the world in Arabic.", "text": ARABIC if step > 100 else "مر مر"}
            order = {"event": "sample", "time": BEGAN + step, "step": step, "prompt": "Three apples and a cup of tea, please.",
                     "text": '{"apples": 3, "tea": 1}' if step > 150 else "apples, tea and"}  # fmt: skip
            for event in (held_out, arabic, order):
                state.add(event)
        if step % 250 == 0:
            state.add({"event": "checkpoint", "time": BEGAN + step, "step": step, "path": f"checkpoints/step-{step:06d}"})
    for event in ({"event": "phase", "phase": "train"}, *last):
        state.add({"time": BEGAN + steps + 1, **event})
    return state


def scenes():
    """Name to state and plan."""
    nan = "loss nan and gradient norm nan at step 230: the update cannot be trusted"
    fix = "resume from the last checkpoint with a lower learning rate"
    guard = {"event": "stopped", "step": 310, "by": "guard", "reason": GUARD, "fix": "free memory (ollama holds 12.3 GiB), then resume: nothing is lost"}
    loading = {"event": "phase", "phase": "load", "time": time.time(), "detail": "12.4 of 40.1 GiB, 2.1 GB/s"}
    return {
        "training": (run_of(400), SPARK),
        "paused": (run_of(300, {"event": "phase", "phase": "paused"}), SPARK),
        "failed": (run_of(229, step_event(230, loss=None), {"event": "failed", "error": "RunFailed", "fact": nan, "fix": fix}), SPARK),
        "guard": (run_of(310, {"event": "warning", "kind": "guard", "message": GUARD}, guard), SPARK),
        "finished": (run_of(1000, {"event": "eval", "step": 1000, "loss": 0.5, "exact_match": 0.985, "n": 200}, {"event": "finished", "step": 1000}), SPARK),
        "empty": (RunState(), {}),
        "starting": (state_of({**STARTED, "time": time.time() - 3}, loading), SPARK),
    }


def as_it_was(directory, share):
    """The state of a run as its first events tell it."""
    events = list(EventReader(directory.events_path).read_new())
    state = RunState()
    for event in events[: int(share * len(events))]:
        state.add(event)
    now = state.last_time
    state.started_time += time.time() - now  # "so far" is counted to the present
    return state


def show(context, state, plan, path, *, title, clip=1.0, dark=False, width=1000, unfold=False, form="live"):
    """One picture: the live panel drawn once, or its twin."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # ipywidgets and anywidget, on import
        from sparklab.panels.widget import RunPanel
    if form == "live":
        widget = RunPanel(name=list(title), clip=clip)
        widget.update(state, plan)
        page = stage(context, widget, dark=dark, width=width)
        page.wait_for_function("document.querySelector('.sparklab')?.dataset.rows !== undefined")
        widget.close()
    else:
        page = paper(context, twin.run_html(state, plan, *title, clip=clip), dark=dark, width=width)
    if unfold:
        page.evaluate("document.querySelectorAll('details').forEach((fold) => { fold.open = true; })")
    page.wait_for_timeout(100)
    page.set_viewport_size({"width": width, "height": 200})
    page.set_viewport_size({"width": width, "height": min(1600, page.evaluate("document.documentElement.scrollHeight"))})
    page.wait_for_timeout(100)
    page.screenshot(path=path)
    assert not page.faults and not page.strangers, (page.faults, page.strangers)
    page.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--run")
    parser.add_argument("--docs", action="store_true")
    parser.add_argument("--share", type=float, default=0.67)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile, browser(pathlib.Path(profile)) as context:
        if options.run:
            directory = RunDirectory(options.run)
            for dark in (False, True):
                show(context, as_it_was(directory, options.share), directory.plan, options.folder / f"run-{'dark' if dark else 'light'}.png",
                     title=facts.title(directory), clip=facts.clip_norm(directory), dark=dark, width=980)  # fmt: skip
            return
        if options.docs:
            for dark in (False, True):
                path = options.folder / f"run-{'dark' if dark else 'light'}.png"
                show(context, *scenes()["training"], path, title=("chat-1", "Qwen3-0.6B · lora"), dark=dark, width=980)
            return
        for name, (state, plan) in scenes().items():
            for form in ("live", "twin"):
                for width, dark in ((480, False), (480, True), (1600, False), (1600, True)):
                    path = options.folder / f"{name}-{form}-{width}-{'dark' if dark else 'light'}.png"
                    show(context, state, plan, path, title=("chat-1", "Qwen3-0.6B · lora"), dark=dark, width=width, unfold=True, form=form)


if __name__ == "__main__":
    main()
