"""The frozen surface: what users type. A change here is a change for them and belongs in CHANGELOG.md."""

import argparse
import dataclasses
import inspect
import json
import os
from pathlib import Path

import pytest

import sparklab as sl
from sparklab import Recipe, cli
from sparklab.cli import build_parser

FROZEN = Path(__file__).parent / "surface.json"


def signatures():
    found = {}
    for name in sorted(sl.__all__):
        value = getattr(sl, name)
        if inspect.ismodule(value):
            found[name] = sorted(
                each
                for each in vars(value)
                if not each.startswith("_") and callable(vars(value)[each]) and getattr(vars(value)[each], "__module__", "") == value.__name__
            )
        elif inspect.isclass(value):
            methods = {
                each: str(inspect.signature(member))
                for each, member in inspect.getmembers(value, lambda member: inspect.isfunction(member) or inspect.ismethod(member))
                if not each.startswith("_") and each in dir(value)
            }
            found[name] = {"methods": methods, "fields": [field.name for field in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else []}
        else:
            found[name] = str(inspect.signature(value))
    return found


def flags():
    found = {}
    (verbs,) = (action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction))
    for name, parser in verbs.choices.items():
        found[name] = sorted(option for action in parser._actions for option in (action.option_strings or [action.dest]) if option not in ("-h", "--help"))
        assert "--json" in found[name], name
    return found


def test_the_surface_is_what_it_was():
    """Set SPARKLAB_FREEZE=1 to write it anew after a change that is meant."""
    now = {"exports": signatures(), "flags": flags()}
    if os.environ.get("SPARKLAB_FREEZE"):
        FROZEN.write_text(json.dumps(now, indent=1, sort_keys=True) + "\n")
    assert json.loads(json.dumps(now)) == json.loads(FROZEN.read_text())
    assert len(now["flags"]) >= 11


def test_help_says_what_a_flag_takes_and_what_it_is_without_it():
    (verbs,) = (action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction))
    seen = 0
    for name, parser in verbs.choices.items():
        for action in parser._actions:
            assert action.help and "``" not in action.help, (name, action.dest)
            if action.dest.startswith("recipe_") and name != "resume":
                field = Recipe.__dataclass_fields__[action.dest.removeprefix("recipe_")]
                assert (
                    f"(default: {field.default}" in action.help
                    or isinstance(field.default, (bool, tuple))
                    or field.name in cli.CHOSEN
                    or field.name == "method"
                )
                assert "(default: " in action.help and not (action.metavar or "").startswith("RECIPE_"), (name, action.dest)
                seen += 1
    assert seen > 4 * 35
    text = " ".join(verbs.choices["train"].format_help().split())
    assert "--schedule {cosine,linear,constant}" in text and "--checkpoint-layers N|{all,none}" in text and "--betas X [X ...]" in text
    assert "[default" not in text and "(default: the fastest that fits)" in text and "--retry" not in verbs.choices["train"].format_usage()
    assert "(default: 2048)" in " ".join(verbs.choices["inspect"].format_help().split()), "an inspection has no planner"


def test_every_export_loads_and_has_a_docstring():
    assert set(sl.__all__) <= set(dir(sl))
    assert len(sl.__all__) >= 10
    for name in sl.__all__:
        assert inspect.getdoc(getattr(sl, name)), name


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nonsense"):
        _ = sl.nonsense


def test_recipe_repr_is_python():
    recipe = Recipe(model="m", data="d.jsonl", targets=("q_proj", "v_proj"), seed=3)
    assert eval(repr(recipe)) == recipe
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
