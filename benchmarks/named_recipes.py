"""Plans the named recipes for a DGX Spark from the shapes under tests/planner/configs and writes README's table of them.

    python benchmarks/named_recipes.py            # writes the table into README.md
    python benchmarks/named_recipes.py --print    # shows it

Nothing is measured here: a row says "planned" until somebody has run it on such a box.
"""

from __future__ import annotations

import sys
from pathlib import Path

import sparklab as sl
from sparklab.planner.render import settings, span
from sparklab.units import format_count, gib

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "tests" / "planner" / "configs"
BEGIN, END = "<!-- named recipes: begin, made by benchmarks/named_recipes.py -->", "<!-- named recipes: end -->"

SHAPES = {
    "full_1b": "llama-3.2-1b",
    "full_3b": "llama-3.2-3b",
    "full_4b": "qwen3-4b",
    "lora_8b": "llama-3.1-8b",
    "lora_14b": "qwen3-14b",
    "lora_32b": "qwen3-32b",
    "lora_30b_a3b": "qwen3-30b-a3b",
    "qlora_70b": "llama-3.3-70b",
}
"""Recipe to the file with its model's shapes."""


def planned(name: str) -> sl.Plan:
    """The plan of a named recipe on a DGX Spark."""
    recipe = getattr(sl.recipes, name)("chats.jsonl", model=CONFIGS / f"{SHAPES[name]}.json")
    return sl.plan(recipe, box=sl.Box.profile("dgx-spark"))


def table() -> str:
    """README's lines, markers included."""
    rows = ["| recipe | model | method | peak GiB | settings | tokens/s | |", "|---|---|---|---|---|---|---|"]
    for name in SHAPES:
        plan, model = planned(name), getattr(sl.recipes, name)("chats.jsonl").model
        rows.append(
            f"| `{name}` | {model} ({format_count(plan.anatomy.parameters)}) | {plan.recipe.method} | {gib(plan.peak_bytes):.1f} | {settings(plan)} "
            f"| {span(plan.tokens_per_second)} | planned |"
        )
    return "\n".join([BEGIN, *rows, END])


def main() -> None:
    """Writes the table between its markers."""
    if "--print" in sys.argv:
        print(table())
        return
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    readme.write_text(before + table() + after)


if __name__ == "__main__":
    main()
