"""A run as one HTML file that needs nothing else: no network, no script, light or dark as its reader's system is."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from sparklab.errors import RunError, SparklabError
from sparklab.files import reason
from sparklab.panels import facts, twin
from sparklab.panels.parts import FAINT, LINE, NUMBERS, escape, fold
from sparklab.panels.watch import Watch
from sparklab.run.directory import RunDirectory
from sparklab.run.state import RunState

NAME: Final = "report.html"

# Nothing may be loaded and nothing may run, whatever stands in the texts: the browser is told so too.
_HEAD: Final = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark"><title>%s</title>
<style>
:root { color-scheme: light dark }
body { margin: 0 auto; padding: 24px 16px; max-width: 1080px; font: 13px/1.45 system-ui, sans-serif; color: #1f2328; background: #fff }
@media (prefers-color-scheme: dark) { body { color: #e6e8eb; background: #111 } }
</style></head><body><main>
"""


def report_html(directory: RunDirectory) -> str:
    """The page: the run's twin with everything unfolded that can be, then the plan line by line, the recipe, and what it ran on."""
    watch = Watch(directory)
    state, plan = watch.refresh(), directory.plan
    name, about = facts.title(directory)
    goes_on = f"sparklab watch {directory.path}"
    panel = twin.run_html(state, plan, name, about, clip=facts.clip_norm(directory), reopen=goes_on).replace("<details ", "<details open ")
    blocks = [_evaluations(state), _plan(plan), _recipe(directory), _environment(directory)]
    return _HEAD % escape(f"{name}: {facts.word(state)}") + panel + "".join(blocks) + "\n</main></body></html>\n"


def write_report(directory: RunDirectory, path: str | os.PathLike[str] | None = None) -> Path:
    """Writes the page to ``path`` (default: ``report.html`` in the run's directory), whole or not at all, and returns where it is.

    Raises RunError where it cannot be written.
    """
    target = Path(path) if path is not None else directory.path / NAME
    if target.is_dir():
        raise RunError(f"{target} is a directory", f"name a file in it: {target / NAME}")
    content = report_html(directory)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, draft = tempfile.mkstemp(dir=target.parent, prefix=".report-")
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(content)
            os.chmod(draft, 0o644)
            os.replace(draft, target)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(draft)
            raise
    except OSError as error:
        raise RunError(f"{target} cannot be written: {reason(error)}", "choose another place: sparklab report RUN --out FILE") from error
    return target


def _table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A plain table, everything in it escaped; what is a figure stands to the right."""
    cell = "padding:2px 16px 2px 0;text-align:left;vertical-align:top;font-weight:400"
    head = "".join(f'<th style="{cell};{FAINT}">{escape(name)}</th>' for name in heads)
    body = "".join("<tr>" + "".join(f'<td style="{cell};overflow-wrap:anywhere">{escape(text)}</td>' for text in row) + "</tr>" for row in rows)
    return f'<div style="overflow-x:auto"><table style="border-collapse:collapse;margin:8px 0 0 0;{NUMBERS}"><tr>{head}</tr>{body}</table></div>'


def _block(name: str, aside: str, body: str) -> str:
    return f'<div style="padding:0 16px;border-color:{LINE}">{fold(name, escape(aside), body, is_open=True)}</div>'


def _evaluations(state: RunState) -> str:
    rows = []
    for entry in state.evals[-200:]:
        match = facts.figure(entry["exact_match"], lambda value: f"{100 * value:.1f} %")
        rows.append((facts.figure(entry["step"], lambda value: f"{value:,.0f}"), facts.figure(entry["loss"], lambda value: f"{value:.4f}"), match))
    return _block("Evaluations", str(len(state.evals)), _table(("step", "held-out loss", "exact match"), rows)) if rows else ""


def _plan(plan: dict[str, Any]) -> str:
    lines = plan.get("lines")
    known = [line for line in (lines if isinstance(lines, list) else []) if isinstance(line, dict) and isinstance(line.get("gib"), (int, float))]
    rows = [(str(line.get("phase", "")), str(line.get("name", "")), facts.size(line["gib"]), str(line.get("formula") or "")) for line in known[:400]]
    aside = f"peak {facts.size(plan.get('peak_gib'))} in {plan.get('peak_phase')}" if isinstance(plan.get("peak_gib"), (int, float)) else ""
    return _block("Plan", aside, _table(("phase", "what", "size", "where it comes from"), rows)) if rows else ""


def _recipe(directory: RunDirectory) -> str:
    try:
        values = directory.recipe.to_dict()
    except (SparklabError, TypeError, ValueError):
        return ""
    return _block("Recipe", "", _table(("field", "value"), [(name, repr(value)) for name, value in values.items()]))


def _environment(directory: RunDirectory) -> str:
    try:
        content = directory.read_json("environment")
    except SparklabError:
        return ""
    versions = content.pop("versions", {})
    rows = [(str(name), str(version)) for name, version in versions.items()] if isinstance(versions, dict) else []
    rows += [(str(name), str(value)) for name, value in content.items()]
    return _block("Environment", "", _table(("what", "value"), rows)) if rows else ""
