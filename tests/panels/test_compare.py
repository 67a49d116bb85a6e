"""Answers side by side: what differs is marked, nothing is lost or gained by the marks, and nothing in an answer runs."""

import html
import re

from hypothesis import given
from hypothesis import strategies as st
from scenes import ARABIC, HOSTILE, assert_inert

from sparklab.panels.compare import LEAST_ALIKE, comparison_html, differences

WORDS = st.lists(st.sampled_from(["red", "blue", " ", ", ", "kites", "12", ARABIC, "{", '"to"', "\n", "日本"]), max_size=12).map("".join)


@given(WORDS, WORDS)
def test_the_pieces_are_the_texts(base, tuned):
    found = differences(base, tuned)
    if found is None:
        assert base != tuned
        return
    for pieces, text, other in zip(found, (base, tuned), (tuned, base), strict=True):
        assert "".join(piece for piece, _ in pieces) == text
        assert all(piece in other for piece, differs in pieces if not differs)
    assert (base == tuned) == (not any(differs for pieces in found for _, differs in pieces))


def test_only_what_differs_is_marked():
    content = comparison_html([{"prompt": "When?", "base": "Sent on Friday.", "tuned": "Sent on <b>Monday</b>."}])
    assert re.findall(r"<del [^>]*>([^<]*)</del>", content) == ["Friday"]
    assert html.unescape("".join(re.findall(r"<ins [^>]*>([^<]*)</ins>", content))) == "<b>Monday</b>"


def test_where_little_is_alike_nothing_is_marked_and_the_same_is_said():
    assert "<ins" not in comparison_html([{"prompt": "p", "base": "Understood, Cairo on Friday.", "tuned": '{"item":"red kites","qty":12}'}])
    assert differences("alpha beta gamma", "un deux trois quatre cinq") is None and LEAST_ALIKE > 0
    assert "The same answer." in comparison_html([{"prompt": "p", "base": "yes ", "tuned": "yes"}])
    assert "same answer" not in comparison_html([{"prompt": "p", "base": "", "tuned": ""}])
    assert differences("word " * 3000, "word " * 3000) is None  # long answers take no time


def test_marks_let_no_code_through():
    content = comparison_html([{"prompt": HOSTILE, "base": "x" + HOSTILE, "tuned": ARABIC + HOSTILE}])
    assert_inert(content, "div", "ins", "del")
    assert "\x1b" not in content and "\u202e" not in content
