"""The widget without a browser: what it sends, how often, and what its buttons do."""

import array

import pytest
from scenes import HOSTILE, PLAN, STARTED, state_of, steps

from sparklab.run.events import Event


def rows(data, width=9):
    flat = array.array("f", data)
    return [tuple(flat[i : i + width]) for i in range(0, len(flat), width)]


@pytest.fixture
def panel(widget_class):
    widget = widget_class(name=["chat-1", "tiny · lora"])
    widget.sent = []
    widget.send = lambda content, buffers=None: widget.sent.append((content, buffers))
    yield widget
    widget.close()


def test_rows_come_once_and_in_full(panel):
    state = state_of(STARTED, *steps(3))
    panel.update(state, PLAN)
    for event in steps(2, first=4):
        state.add(event)
    panel.update(state, PLAN)
    panel.update(state, PLAN)
    assert [content for content, _ in panel.sent] == [{"kind": "rows", "from": 0, "stride": 1}, {"kind": "rows", "from": 3, "stride": 1}]
    first, second = (rows(buffers[0]) for _, buffers in panel.sent)
    assert [row[0] for row in first + second] == [1, 2, 3, 4, 5]
    assert first[1] == pytest.approx((2, 1.0, 1.0, 1.0, 0, 1e-4, 0.5, 0.5, 100 / 0.010002), rel=1e-6)
    assert rows(panel.get_state()["history"]) == first + second


def test_the_history_is_not_sent_with_anything_else(panel):
    panel.update(state_of(STARTED, *steps(3)), PLAN)
    assert panel.get_state("head").keys() == {"head"} and panel.history == b""
    assert len(panel.get_state(["history"])["history"]) == 3 * 9 * 4


def test_a_resume_sends_the_history_anew(panel):
    state = state_of(STARTED, *steps(6))
    panel.update(state, PLAN)
    state.add({**STARTED, "resumed_from": 4})
    panel.update(state, PLAN)
    for event in steps(4, first=5, seconds=0.02):  # past where it was: shorter is not the only sign
        state.add(event)
    panel.update(state, PLAN)
    assert [content["from"] for content, _ in panel.sent] == [0, 0, 4]
    assert [row[0] for row in rows(panel.get_state()["history"])] == list(range(1, 9))


def test_a_resume_between_two_looks_is_noticed_though_nothing_is_shorter(panel):
    state = state_of(STARTED, *steps(6))
    panel.update(state, PLAN)
    state.add({**STARTED, "resumed_from": 4})
    for event in steps(4, first=5, seconds=0.02):
        state.add(event)
    panel.update(state, PLAN)
    assert panel.sent[-1][0]["from"] == 0 and len(rows(panel.sent[-1][1][0])) == 8


def test_figures_no_float_holds_do_not_break_a_row(panel):
    panel.update(state_of(STARTED, *steps(1), {**steps(1, first=2)[0], "loss": 1e300, "seconds": 0, "step": 2**52}), PLAN)
    assert len(rows(panel.get_state()["history"])) == 2


def test_an_unchanged_state_sends_nothing(panel):
    state = state_of(STARTED, *steps(3), {"event": "finished", "time": 1010.0, "step": 3})
    panel.update(state, PLAN)
    panel.sent.clear()
    messages = []
    panel.comm.send = lambda *arguments, **options: messages.append((arguments, options)) if panel.comm else None
    for _ in range(5):
        panel.update(state, PLAN)
    assert panel.sent == [] and messages == []


def test_what_reaches_the_page_is_cleaned_and_json(panel, full_state: Event):
    panel.update(full_state, PLAN)
    seen = repr([panel.head, panel.samples, panel.notes, panel.memory, panel.curve, panel.figures])
    assert "alert(2)" in seen and "nan" not in seen.replace("NaN", "")
    assert not set("\x1b\x00\u202e\udc80") & set(repr(panel.samples) + panel.head["reason"] + panel.notes[0]["text"])
    assert HOSTILE not in panel.head["reason"]


def test_buttons_reach_the_handler_and_are_counted(widget_class):
    asked = []
    widget = widget_class(on_command=lambda command, details: asked.append((command, details)))
    widget._receive(widget, {"command": "stop"}, [])
    widget._receive(widget, {"command": "history"}, [])
    for rubbish in ("stop", {}, {"command": 3}, None):
        widget._receive(widget, rubbish, [])
    assert asked == [("stop", {})] and widget.ack["count"] == 1
    widget.acknowledge("Stopping…", ["stop"])
    assert widget.ack == {"text": "Stopping…", "waiting": ["stop"], "count": 1}
    widget.close()


def test_ipykernels_subshell_guess_is_undone(widget_class, monkeypatch):
    import comm

    class Comm(comm.base_comm.BaseComm):
        def _reply_subshell_for(self, data, default):
            return "a shell that is gone"

        def publish_msg(self, *arguments, **options):
            pass

    monkeypatch.setattr(comm, "create_comm", Comm)
    widget = widget_class()
    assert widget.comm._reply_subshell_for({}, "the page's own") == "the page's own"
    widget.close()


def test_the_page_code_is_offline_and_builds_no_markup_from_text(widget_class):
    code = str(widget_class._esm) + str(widget_class._css)
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "http:", "https:", "@import", "url(", "fetch(", "import("):
        assert word not in code, word
