"""What the run panel's page does by itself, in Chromium without Jupyter: reads off values, keeps still, answers keys, draws any length."""

import base64
import warnings

import pytest
from lab import CHROMIUM, browser, serious_faults
from scenes import HOSTILE, PLAN, STARTED, state_of, steps
from shots import SPARK, memory_event, run_of, step_event
from stage import split, stage, tell

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM.exists(), reason="needs Debian's chromium (apt-get install chromium)"),
]


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("page")) as context:
        yield context


@pytest.fixture
def make(widget_class, context):
    """``make(state, plan, **look)``: widget and page; the page must have been still and inert when the test is over."""
    made = []

    def show(state, plan=PLAN, content="", home="", **look):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            widget = widget_class(name=["chat-1", "tiny · lora"], clip=1.0, home=home)
        widget.update(state, plan)
        page = stage(context, widget, content, **look)
        page.wait_for_function("document.querySelector('.sparklab')?.dataset.rows !== undefined")
        made.append((widget, page))
        return widget, page

    yield show
    for widget, page in made:
        assert not page.faults and not page.dialogs and not page.strangers
        page.close()
        widget.close()


def text(page, selector):
    return page.locator(selector).first.inner_text()


def draw(page, widget, rows=None):
    """Brings the page up to date with the widget, new rows as the kernel sends them, and waits until it is drawn."""
    tell(page, widget)
    if rows:
        first, data = rows
        page.evaluate("([from, stride, text]) => model.say({kind: 'rows', from, stride}, text)", [first, widget.series.stride, base64.b64encode(data).decode()])
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def test_values_are_read_off_by_pointer_and_by_keys(make):
    _, page = make(run_of(400), SPARK)
    canvas = page.locator(".sl-plot")
    box = canvas.bounding_box()
    canvas.hover(position={"x": 46 + (box["width"] - 56) * 200 / 500, "y": 60})
    page.wait_for_function("document.querySelector('.sl-at').textContent === 'at step 200'")
    held_out = step_event(200)["loss"] + 0.08 + 8e-7 * 200**2
    assert float(text(page, ".sl-key-heldOut .sl-value")) == pytest.approx(held_out, abs=5e-4), "held-out as it was at that step, not the last"
    assert float(text(page, ".sl-key-raw .sl-value")) == pytest.approx(step_event(200)["loss"], abs=5e-4)
    canvas.focus()
    page.keyboard.press("End")
    page.wait_for_function("document.querySelector('.sl-at').textContent === 'at step 400'")
    page.keyboard.press("ArrowLeft")
    page.wait_for_function("document.querySelector('.sl-at').textContent === 'at step 399'")
    assert "at step 399" in canvas.get_attribute("aria-label") and canvas.get_attribute("role") == "img"
    page.keyboard.press("Escape")
    page.wait_for_function("document.querySelector('.sl-at').textContent === ''")


def test_scale_and_smoothing_change_the_picture(make):
    _, page = make(run_of(400), SPARK)
    before = page.locator(".sl-plot").evaluate("canvas => canvas.toDataURL()")
    page.get_by_role("button", name="log scale").click()
    page.wait_for_function("before => document.querySelector('.sl-plot').toDataURL() !== before", arg=before)
    assert page.get_by_role("button", name="log scale").get_attribute("aria-pressed") == "true"
    smoothed = text(page, ".sl-key-smooth .sl-value")
    slider = page.get_by_label("Smoothing of the loss")
    slider.focus()
    page.keyboard.press("Home")
    page.wait_for_function("() => document.querySelector('.sl-range').getAttribute('aria-valuetext') === 'none'")
    assert text(page, ".sl-key-smooth .sl-value") == text(page, ".sl-key-raw .sl-value") != smoothed, "no smoothing is the value itself"


def test_nothing_moves_as_it_updates(make):
    state = run_of(400)
    widget, page = make(state, SPARK)
    places = """() => [...document.querySelectorAll(".sparklab section, .sl-tile, .sl-fold, .sl-keys button, .sl-key, .sl-stackbar")].map((node) => {
      const box = node.getBoundingClientRect();
      return [node.className, box.x, box.y, box.width];
    })"""
    before = page.evaluate(places)
    for step in range(401, 440):
        state.add(step_event(step, loss=10.0 ** (step % 3 - 1), tokens=10 ** (step % 4 + 1), grad_norm=10.0 ** (step % 5 - 3)))
        state.add({**memory_event(step), "process_bytes": 1e9 * (step % 3 + 0.5), "available_bytes": 1e9 * (step % 7 + 9)})
        widget.send = lambda *_, **__: None
        rows = widget.series.updates, None
        widget.update(state, SPARK)
        draw(page, widget, (rows[0], widget.series.all()[rows[0] * 36 :]))
        assert page.evaluate(places) == before, step
    assert page.locator(".sparklab").get_attribute("data-rows") == "439"


def test_a_hundred_thousand_steps_are_drawn_whole(make):
    spike = {70_000: 9.0, 80_000: None}
    state = state_of(STARTED, *steps(100_000, total=100_000, loss=lambda i: spike.get(i, 1.0 + 1e-5 * i % 2)))
    widget, page = make(state)
    assert page.locator(".sparklab").get_attribute("data-rows") == "100000" and page.locator(".sparklab").get_attribute("data-points") == "1563"
    assert text(page, ".sl-badge") == "1 NaN, first at step 80,000; 1 spike, last at step 70,000"
    box = page.locator(".sl-plot").bounding_box()
    page.locator(".sl-plot").hover(position={"x": 46 + (box["width"] - 56) * 0.7, "y": 60})
    page.wait_for_function("document.querySelector('.sl-at').textContent.includes('to 9.000')")
    assert text(page, ".sl-at").startswith("steps 69,9")
    for event in steps(20, first=100_001, total=100_100):
        state.add(event)
    widget.send = lambda content, buffers=None: setattr(widget, "told", (content["from"], buffers[0]))
    widget.update(state, PLAN)
    draw(page, widget, widget.told)
    assert page.locator(".sparklab").get_attribute("data-points") == "1563", "the last point grew"
    assert page.evaluate("window.sent.filter((content) => content.command === 'history').length") == 0


def test_a_page_that_missed_rows_asks_for_all_of_them(make):
    widget, page = make(state_of(STARTED, *steps(20)))
    page.evaluate("model.say({kind: 'rows', from: 25, stride: 1}, '')")
    page.wait_for_function("window.sent.some((content) => content.command === 'history')")
    draw(page, widget, (0, widget.series.all()))
    assert page.locator(".sparklab").get_attribute("data-rows") == "20"


def test_out_of_sight_it_tells_the_kernel_and_rests(make):
    _, page = make(state_of(STARTED, *steps(20)), height=400)
    page.evaluate("document.body.style.paddingTop = '5000px'")
    page.wait_for_function("window.sent.some((content) => content.command === 'seen' && content.seen === false)")
    page.evaluate("window.scrollTo(0, 5000)")
    page.wait_for_function("window.sent.filter((content) => content.command === 'seen').at(-1).seen === true")
    pages = {content["page"] for content in page.evaluate("window.sent") if content.get("command") == "seen"}
    assert len(pages) == 1


def test_hostile_text_is_text_and_the_end_takes_the_buttons(make, full_state):
    widget, page = make(full_state)
    assert "<script>alert(2)</script>" in text(page, ".sl-trouble") and page.locator(".sparklab script, .sparklab img").count() == 0
    assert page.locator(".sl-keys").evaluate("node => getComputedStyle(node).visibility") == "hidden"
    assert not page.get_by_label("Ask the model as it is now").is_visible()
    assert split(widget)[0]["head"]["over"] is True


def test_it_stands_in_its_twins_place_and_goes_when_the_kernel_does(make):
    _, page = make(state_of(STARTED, *steps(20)), content='<div class="sparklab-twin home-1"><b>the picture</b></div>', home="home-1")
    assert page.locator(".home-1 .sparklab").count() == 1 and page.get_by_text("the picture").count() == 0
    page.evaluate("document.querySelector('.home-1').outerHTML = '<div class=\"sparklab-twin home-1\"><b>a newer picture</b></div>'")
    page.wait_for_function("document.querySelector('.home-1 .sparklab') && !document.body.textContent.includes('newer')")
    page.evaluate("[...window.model.heard?.get('comm_live_update') || []].forEach((one) => one())")
    page.evaluate("window.leave()")
    assert page.locator(".sparklab").count() == 0 and page.get_by_text("a newer picture").count() == 1


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_nothing_serious_for_axe(make, dark):
    _, page = make(run_of(229, step_event(230, loss=None), {"event": "warning", "message": HOSTILE}), SPARK, dark=dark, width=480)
    page.evaluate("document.querySelectorAll('details').forEach((fold) => { fold.open = true; })")
    page.get_by_label("Change the learning rate").click()
    assert not serious_faults(page, ".sparklab")
