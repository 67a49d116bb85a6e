"""The static twin: everything the live panel says, in HTML that cannot do anything."""

import base64
import html.parser
import re

import pytest
from scenes import ARABIC, HOSTILE, PLAN, STARTED, state_of, steps

from sparklab.panels.twin import run_html


class Inspector(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.depth, self.text = [], [], 0, ""

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        self.depth += tag not in ("img", "br")

    def handle_endtag(self, _tag):
        self.depth -= 1

    def handle_data(self, data):
        self.text += data


def inspect(content):
    inspector = Inspector()
    inspector.feed(content)
    assert inspector.depth == 0, "every tag is closed"
    return inspector


ALLOWED = {"div", "span", "b", "img", "details", "summary"}


def test_hostile_text_stays_text(full_state):
    content = run_html(full_state, PLAN, HOSTILE, HOSTILE)
    found = inspect(content)
    assert set(found.tags) <= ALLOWED and len(found.tags) > 40
    assert not [name for name, _ in found.attributes if name.startswith("on")]
    assert {name for name, _ in found.attributes} <= {"class", "style", "dir", "src", "alt", "height"}
    assert all(value.startswith("data:image/svg+xml;base64,") for name, value in found.attributes if name == "src")
    assert not re.search("[\x00-\x08\x1b\u202e\ud800-\udfff]", content)
    assert found.text.count("<script>alert(2)</script>") >= 6  # name, about, reason, fix, sample, message: seen, not run


def test_pictures_hold_shapes_only(full_state):
    pictures = [base64.b64decode(data).decode() for data in re.findall(r"base64,([^\"]+)\"", run_html(full_state, PLAN, "chat-1"))]
    assert len(pictures) == 3
    for picture in pictures:
        assert not re.search(r"<(script|style|text|image|foreignObject)|href|nan|inf", picture)


def test_it_says_what_the_live_panel_says(full_state):
    text = inspect(run_html(full_state, PLAN, "chat-1", "Qwen3-0.6B · lora")).text
    for words in (
        "Failed",
        "chat-1",
        "Qwen3-0.6B · lora",
        "step 60 of 100",
        "best 0.400 at step 60",
        "1 NaN, first at step 7",
        "2 % → 94 %",
        "of 200 held-out answers",
        "3.20 GiB",
        "peak 3.07 GiB",
        "usable 21.4 GiB",
        "base weights",
        "What to do:",
        ARABIC,
        "Samples",
        "Messages",
    ):
        assert words in text, words


@pytest.mark.parametrize(
    "state",
    [
        state_of(),
        state_of(STARTED),
        state_of(STARTED, *steps(1)),
        state_of(STARTED, *steps(3, loss=lambda _: None)),
        state_of(STARTED, *steps(2, loss=lambda _: 0.0)),
    ],
    ids=["empty", "started", "one step", "nothing but NaN", "flat"],
)
@pytest.mark.parametrize("plan", [PLAN, {}], ids=["planned", "unplanned"])
def test_it_draws_whatever_there_is(state, plan):
    assert set(inspect(run_html(state, plan)).tags) <= ALLOWED


def test_a_long_run_is_a_small_picture():
    content = run_html(state_of(STARTED, *steps(30_000, total=30_000, loss=lambda i: 2 + (i * 7919 % 101) / 100)), PLAN)
    assert len(content) < 120_000
