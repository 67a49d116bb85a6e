"""The inspector: its numbers are arithmetic, its verdict is training's own, hostile words stay words, and a real Chromium pages through it."""

import json
import re
import subprocess
import sys
import warnings

import hostile_data
import pytest
import stage
from lab import CHROMIUM, browser, serious_faults
from support import run_cli, write_chats

import sparklab as sl
from sparklab.data import prepare, store
from sparklab.data.inspection import look
from sparklab.data.pages import TOKENS, paragraphs
from sparklab.errors import DataError, ModelNotFound
from sparklab.model.hub import TINY_PATH
from sparklab.panels import data_view
from sparklab.planner.recipe import Recipe
from sparklab.run import inspecting

HOSTILE = hostile_data.HOSTILE


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return hostile_data.write(tmp_path_factory.mktemp("data") / "chats.jsonl")


@pytest.fixture(scope="module")
def seen(data):
    """The hostile file, its faults skipped; one process for all tests."""
    return sl.inspect(data, on_bad="skip", max_length=512, held_out=0)


def text_of(row, kinds=("text", "special", "escape")):
    return "".join(piece["t"] if piece["k"] != "break" else "\n" for line in row["lines"] for piece in line if piece["k"] in (*kinds, "break"))


def test_the_numbers_are_those_of_training(data, seen):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TINY_PATH)
    report = prepare(seen.recipe, tokenizer).report
    found = seen.numbers["report"]
    assert found == {name: value for name, value in report.to_dict().items() if name in found}
    assert (found["records"], found["documents"], found["skipped"], found["truncated"], found["duplicates"]) == (16, 16, 3, 1, 1)
    assert found["ignored_fields"] == {"id": 6}
    flags = seen.numbers["flags"]
    assert flags == {"nothing_learned": 0, "no_end": 0, "double_bos": 0, "empty_turn": 1, "spells": 1, "refused": 0}
    assert seen.numbers["scripts"] == {"Latin": 14, "Arabic": 1, "Han": 1}
    assert sum(seen.numbers["lengths"]["counts"]) == 16
    assert seen.numbers["lengths"]["max"] == found["longest"]
    assert seen.numbers["faults"]["records"] == 3
    assert (seen.verdict, len(seen.numbers["refusals"])) == ("ready with warnings", 0)
    assert seen.check() is seen
    assert json.loads(json.dumps(seen.to_dict(), allow_nan=False))["stands_in"]


def test_every_record_reads_as_its_tokens_do(seen):
    rows = seen.page("all", 0, 100)
    assert [row["where"] for row in rows] == [f"chats.jsonl:{line}" for line in (*range(1, 11), *range(14, 20))]
    first = rows[0]
    assert text_of(first) == "<|bos|><|system|>You are brief.<|end|><|user|>What is 7 times 6?<|end|><|assistant|>It is 42.<|end|>"
    learned = [piece for line in first["lines"] for piece in line if piece.get("l")]
    assert [(piece["t"], piece["k"]) for piece in learned] == [("It is 42.", "text"), ("<|end|>", "special")]
    assert len(first["lines"]) == 3  # a turn a line
    assert hostile_data.ARABIC in text_of(rows[1])
    assert text_of(rows[2]).count(HOSTILE) == 2
    controls = rows[3]
    assert [piece["t"] for line in controls["lines"] for piece in line if piece["k"] == "escape"] == [
        "\\x1b",
        "\\x1b",
        "\\u202e",
        "\\u202c",
        "\\u202e",
        "\\u202c",
        "\\x07",
    ]
    spelled = rows[5]
    assert [piece["t"] for line in spelled["lines"] for piece in line if piece["k"] == "text"] == ["I write <|assistant|> in my text", "and <|end|> in mine"]
    long = rows[7]
    assert long["flags"] == ["longer than 512: cut"]
    assert long["lines"][-1] == [{"t": f"… {long['tokens'] - TOKENS:,} more tokens", "k": "note"}]
    cut = "".join(piece["t"] for line in long["lines"] for piece in line if not piece.get("x") and piece["k"] != "note")
    assert 100 < len(cut) < len(text_of(long))


def test_records_are_paged_and_filtered(seen):
    assert [row["where"] for row in seen.page("all", 14, 5)] == ["chats.jsonl:18", "chats.jsonl:19"]
    assert seen.page("all", 99) == []
    wheres = {wanted: [row["where"].split(":")[1].split(",")[0] for row in seen.page(wanted)] for wanted in data_view.FILTERS}
    assert wheres["odd"] == ["5", "6", "8", "9", "10"]
    assert (wheres["empty_turn"], wheres["spells"], wheres["long"], wheres["repeated"]) == (["5"], ["6"], ["8"], ["9", "10"])
    assert wheres["unusable"] == ["11", "12", "13"]
    assert wheres["held_out"] == wheres["no_end"] == []
    with pytest.raises(DataError, match="cannot be filtered by 'nonsense'"):
        seen.page("nonsense")


def test_lines_break_where_turns_do():
    def special(text):
        return {"t": text, "k": "special"}

    said, end = {"t": "a", "k": "text"}, {"t": "\u21b5", "k": "break"}
    chatml = [special("<s>"), said, end, said, special("<e>"), end, special("<s>"), said]
    assert paragraphs(chatml) == [chatml[:3], chatml[3:6], chatml[6:]]
    assert paragraphs([]) == []


REFUSED = {
    "a line that is no JSON": ({}, ["{broken"], "1 of 9 records cannot be used"),
    "pairs": ({}, [json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"})] * 30, None),
    "too long is an error": ({"on_long": "error", "max_length": 20, "micro_batch_tokens": 64}, [], "longer than max_length 20"),
    "nothing within max_length": ({"max_length": 4, "micro_batch_tokens": 64}, [], "not one token to learn"),
    "one record": ({"format": "messages"}, None, "none can be held out"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_it_refuses_what_training_refuses(tmp_path, case):
    from transformers import AutoTokenizer

    changes, lines, fact = REFUSED[case]
    file = tmp_path / "chats.jsonl"
    good = [hostile_data.chat(f"Question number {number}, and some words?", f"Answer {number}") for number in range(8)]
    file.write_text("\n".join(good[:1] if lines is None else lines + good if case != "pairs" else lines) + "\n", encoding="utf-8")
    recipe, tokenizer = Recipe(model="tiny", data=str(file), **changes), AutoTokenizer.from_pretrained(TINY_PATH)
    found = look(recipe, tokenizer, tmp_path)  # what the inspecting process does
    assert found["verdict"] == "refuse"
    with pytest.raises(DataError) as there:
        prepare(recipe, tokenizer)
    assert there.value.fact in [one["fact"] for one in found["refusals"]]
    assert (fact or "preference pairs") in there.value.fact


def test_a_tokenizer_without_a_template_is_refused_but_the_rest_is_said(tmp_path, data):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (bare / name).write_bytes((TINY_PATH / name).read_bytes())
    settings = json.loads((TINY_PATH / "tokenizer_config.json").read_text())
    (bare / "tokenizer_config.json").write_text(json.dumps({name: value for name, value in settings.items() if name != "chat_template"}))
    seen = sl.inspect(data, model=bare, on_bad="skip")
    assert seen.verdict == "refuse" and str(seen).startswith("Training would refuse this")
    with pytest.raises(DataError, match="chat template"):
        seen.check()
    assert "chat template" in seen.numbers["refusals"][0]["fact"]
    assert (seen.numbers["report"]["records"], seen.numbers["report"]["duplicates"], seen.numbers["flags"]["empty_turn"]) == (16, 1, 1)
    assert seen.page("all") == []
    assert "Latin (14)" in str(seen)
    assert seen._repr_html_()


def test_errors_of_data_and_model(tmp_path, data):
    with pytest.raises(ModelNotFound, match="tokenizer of"):
        inspecting.answer({"recipe": Recipe(model=str(tmp_path), data=str(data)).to_dict(), "folder": str(tmp_path)})


def test_nothing_heavy_is_loaded_here():
    """Records from memory, and no data at all: in a process that loads neither torch nor transformers."""
    code = """import sys, sparklab as sl
from sparklab.errors import DataNotFound
records = [{"prompt": f"q {number}", "completion": f"a {number}"} for number in range(4)]
heard = []
seen = sl.inspect(records, on_progress=lambda done, total: heard.append(done))
assert (seen.numbers["report"]["records"], seen.numbers["sources"][0]["format"], seen.verdict) == (4, "prompt", "ready"), seen
assert seen.page()[3]["learned"] and set(heard) <= {4}
try:
    sl.inspect("nowhere.jsonl")
except DataNotFound as error:
    print(error.fact, sorted({"torch", "transformers", "ipywidgets", "pandas"} & set(sys.modules)))"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "No data file nowhere.jsonl []", result.stderr


def test_the_command_line(data, tmp_path):
    refused = run_cli("inspect", data)
    assert refused.returncode == 2
    assert "\x1b" not in refused.stdout and "\u202e" not in refused.stdout  # no escape of the data's reaches the terminal
    assert "{+It is 42.+}" in refused.stdout
    paged = run_cli("inspect", data, "--on-bad", "skip", "--max-length", "512", "--show", "unusable", "--json")
    assert paged.returncode == 0
    assert [row["where"] for row in json.loads(paged.stdout)["records"]] == ["chats.jsonl:11", "chats.jsonl:12, messages", "chats.jsonl:13, messages"]


def test_a_terminal_is_shown_the_beginning_of_a_long_record(seen):
    (row,) = seen.page("long")
    glance = data_view.rows_text([row], colour=False, characters=120)
    assert glance.endswith("…") and len(glance) < 400
    assert len(data_view.rows_text([row], colour=False)) > 1500
    assert len(str(seen)) < 8000


def test_colour_in_the_terminal_is_ours_alone(seen):
    painted = seen.text(colour=True)
    assert "\x1b[32;4mIt is 42.\x1b[0m" in painted
    assert {code for code in re.findall(r"\x1b[^m]*m", painted) if not re.fullmatch(r"\x1b\[[0-9;]+m", code)} == set()
    assert re.sub(r"\x1b\[[0-9;]+m", "", painted).isprintable() or "\x1b" not in re.sub(r"\x1b\[[0-9;]+m", "", painted)


def test_the_cache_serves_the_training_to_come(data, tmp_path, monkeypatch):
    """The key that the inspecting process finds is the one that the worker asks for."""
    from transformers import AutoTokenizer

    from sparklab.data import Encoder

    monkeypatch.setenv(store.SWITCH, str(tmp_path / "cache"))
    recipe = Recipe(model="tiny", data=str(data), on_bad="skip")
    sl.inspect(recipe)
    monkeypatch.setattr(Encoder, "encode", None)  # whoever encodes now fails
    assert prepare(recipe, AutoTokenizer.from_pretrained(TINY_PATH)).report.records == 16


def test_the_twin_is_inert(seen):
    content = seen._repr_html_()
    assert set(re.findall(r"<(\w+)", content)) <= {"div", "span", "b", "bdi", "img", "details", "summary"}
    assert "&lt;script&gt;" in content
    assert not re.search(r"<[^>]* on\w+=", content)
    assert "\u202e" not in content and "\x1b" not in content
    assert hostile_data.ARABIC.split("!")[0] in content


@pytest.fixture
def widget(seen):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # ipywidgets and anywidget, on import
        seen._home = "sparklab-data-home"
        seen.widget = seen._make_widget()
    yield seen.widget
    seen.widget.close()
    seen.widget = None


def test_the_page_asks_and_is_answered(seen, widget):
    assert (widget.page["filter"], widget.page["total"], len(widget.page["rows"])) == ("odd", 5, 5)
    seen._hear(widget, {"filter": "all", "first": 10}, [])
    assert (widget.page["first"], widget.page["total"]) == (10, 16)
    seen._hear(widget, {"filter": "all", "first": 10**9}, [])
    assert widget.page["first"] == 15
    seen._hear(widget, {"filter": "all", "first": -3}, [])
    assert widget.page["first"] == 0
    before = widget.page
    for wrong in ({"filter": "x", "first": 0}, {"filter": "all", "first": "0"}, {"filter": "all", "first": True}, {"filter": "all"}, "all", None):
        seen._hear(widget, wrong, [])
        assert widget.page == before, wrong
    json.dumps([widget.view, widget.page], allow_nan=False)


def test_the_page_code_is_offline_and_builds_no_markup_from_text(widget):
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "http:", "https:", "fetch(", "import("):
        assert word not in str(widget._esm), word


@pytest.mark.browser
@pytest.mark.skipif(not CHROMIUM.exists(), reason="needs Debian's chromium (apt-get install chromium)")
def test_in_a_real_browser(seen, widget, tmp_path):
    """Both themes, narrow and wide: nothing of the data runs, Arabic reads from the right, keys page, and axe finds no serious fault."""
    twin = seen._repr_html_()
    with browser(tmp_path) as context:
        for dark, width in ((False, 480), (True, 1600)):
            seen._hear(widget, {"filter": "all", "first": 0}, [])
            page = stage.stage(context, widget, twin, dark=dark, width=width)
            page.wait_for_selector(".sl-data .sl-record")
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.evaluate("document.querySelectorAll('.sl-data img, .sl-data script').length") == 0
            assert HOSTILE in page.inner_text(".sl-data")
            arabic = page.locator(".sl-tokens > div", has_text="وهل وصلت").first
            assert arabic.evaluate("node => getComputedStyle(node).direction") == "rtl"
            page.locator(".sl-pager button", has_text="Next").focus()
            page.keyboard.press("Enter")
            assert page.evaluate("window.sent.at(-1)") == {"filter": "all", "first": 5}
            seen._hear(widget, page.evaluate("window.sent.at(-1)"), [])
            page.evaluate("page => window.model.set('page', page)", widget.page)
            assert page.inner_text(".sl-pager .sl-dim") == "6 to 10 of 16"
            page.locator(".sl-finding", has_text="repeating").locator("button").click()
            assert page.evaluate("window.sent.at(-1)") == {"filter": "repeated", "first": 0}
            page.select_option(".sl-pager select", "unusable")
            assert page.evaluate("window.sent.at(-1)") == {"filter": "unusable", "first": 0}
            assert not serious_faults(page, ".sl-data")
            assert not page.dialogs and not page.faults and not page.strangers
            page.close()
            page = stage.paper(context, twin, dark=dark, width=width)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert not serious_faults(page, ".sparklab-twin")
            assert not page.dialogs and not page.faults and not page.strangers
            page.close()


def test_a_recipe_is_taken_as_it_is(tmp_path):
    recipe = Recipe(model="tiny", data=str(write_chats(tmp_path / "chats.jsonl", 40)), held_out=str(write_chats(tmp_path / "held.jsonl", 8, "held_out")))
    seen = sl.inspect(recipe)
    assert seen.recipe is recipe
    assert not seen.to_dict()["stands_in"]
    assert [source["name"].rsplit("/", 1)[-1] for source in seen.numbers["sources"]] == ["chats.jsonl", "held.jsonl"]
    assert len(seen.page("held_out", 0, 100)) == 8
    assert seen.page("all", 40, 1)[0]["where"] == "held.jsonl:1"
