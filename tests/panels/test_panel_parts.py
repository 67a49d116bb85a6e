"""The shared parts: escaping, ticks, smoothing, pictures, and the words and figures every panel says."""

import base64
import math
import re
import subprocess
import sys

import pytest
from scenes import ARABIC, HOSTILE, PLAN, STARTED, state_of, steps

from sparklab.panels import facts, parts
from sparklab.panels.compare import comparison_html, comparison_text
from sparklab.panels.memory_facts import memory, memory_words
from sparklab.panels.series import MOST_ROWS, Series, stride_of


def test_importing_panels_loads_no_widgets():
    code = "import sys, sparklab.panels, sparklab.panels.run_panel, sparklab.panels.terminal, sparklab.panels.compare; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "ipywidgets", "anywidget", "traitlets", "IPython"} & set(loaded)


def test_cleaning_takes_codes_controls_and_overrides_and_keeps_the_words():
    assert parts.clean("a\x1b[31;1mb\x1b]0;title\x07c\x00\u202e\udc80d\r\ne") == "abcd\ne"
    assert parts.clean(ARABIC) == ARABIC
    assert parts.clean("x" * 50, 10) == "x" * 9 + "…"
    assert parts.one_line(" a \n\t b ") == "a b"
    assert len(parts.clean("\x1b" * 10**7)) == 0


def test_escaping_leaves_no_markup():
    escaped = parts.escape(HOSTILE + "\"'&")
    assert not set("<>\"'") & set(escaped) and "&lt;script&gt;" in escaped


@pytest.mark.parametrize(("low", "high", "expected"), [(0.13, 1.9, [0, 0.5, 1, 1.5, 2]), (0, 100, [0, 25, 50, 75, 100]), (-1, 1, [-1, -0.5, 0, 0.5, 1])])
def test_ticks_are_round_and_enclose(low, high, expected):
    assert parts.ticks(low, high) == expected


@pytest.mark.parametrize("low", [-1e9, -3.0, 0.0, 1e-9, 7.0, 1e300])
@pytest.mark.parametrize("span", [0.0, 1e-9, 0.3, 5.0, 1e12])
def test_ticks_enclose_whatever_comes(low, span):
    found = parts.ticks(low, low + span)
    assert 2 <= len(found) <= 8
    assert found[0] <= low + 1e-9 * max(abs(low), span) + 1e-12  # but for rounding
    assert found[-1] >= low + span - 1e-6 * abs(low + span) - 1e-12


def test_tick_labels_have_the_decimals_they_need():
    assert [parts.tick_label(tick, 0.5) for tick in (0, 0.5, 1)] == ["0.0", "0.5", "1.0"]
    assert [parts.tick_label(tick, 0.25) for tick in (0.25, 0.5)] == ["0.25", "0.50"]
    assert [parts.tick_label(tick, 25) for tick in (0, 25)] == ["0", "25"]


def test_the_step_axis_moves_rarely():
    ends = [parts.axis_end(last, 1000) for last in range(1, 1001)]
    assert all(end >= last for last, end in enumerate(ends, 1)) and ends == sorted(ends) and ends[-1] == 1000 and len(set(ends)) < 20
    assert parts.axis_end(10**300, 0) == 10**300


def test_smoothing_has_no_bias_and_no_lag():
    assert parts.smooth([3.0] * 50, 0.95) == pytest.approx([3.0] * 50)
    line = [10.0 - 0.1 * i for i in range(200)]
    assert parts.smooth(line, 0.9) == pytest.approx(line), "also at both ends"
    assert parts.smooth([5.0], 0.9) == [5.0] and parts.smooth([], 0.9) == []


def test_smoothing_takes_noise_away():
    noisy = [1.0 + (-1) ** i * 0.5 for i in range(200)]
    assert max(abs(value - 1) for value in parts.smooth(noisy, 0.9)[20:-20]) < 0.05


def test_smoothing_passes_over_what_is_not_a_number():
    smoothed = parts.smooth([4.0, 3.0, math.nan, 1.0, math.inf], 0.9)
    assert smoothed[:2] + smoothed[3:4] == pytest.approx([4.0, 3.0, 1.0]) and math.isnan(smoothed[2]) and math.isnan(smoothed[4])
    assert all(math.isnan(value) for value in parts.smooth([math.nan] * 3, 0.9))


def test_smoothing_at_some_places_is_by_all_values():
    values = [math.sin(index * 7.1) + 30 / (index + 1) for index in range(200)] + [math.nan, 2.0]
    places = [0, 1, 60, 120, 180, 201]
    assert parts.smooth(values, 0.9, places) == [parts.smooth(values, 0.9)[place] for place in places] and parts.smooth(values, 0.9, []) == []


def test_a_chart_of_many_points_is_small_and_keeps_its_spikes():
    values = [1.0] * 100_000
    values[54_321] = 9.0
    chart = parts.Chart(x_range=(0, 1e5), y_ticks=(0, 10), curves=(parts.Curve(xs=range(100_000), ys=values, colour="red"),))
    svg = chart.svg()
    assert len(svg) < 40_000 and " 100.0" in svg  # y of 9 on 0..10


def test_an_image_decodes_to_its_svg():
    tag = parts.image("<svg/>", 'a "quoted" <alt>', 20)
    assert base64.b64decode(re.search(r"base64,([^\"]+)", tag)[1]) == b"<svg/>" and "<alt>" not in tag


# words and figures


def test_memory_closes_its_books_on_the_plan():
    state = state_of(STARTED, {"event": "memory", "process_bytes": 1.5 * 2**30, "peak_bytes": 2 * 2**30})
    view = memory(state, PLAN)
    assert sorted(segment["gib"] for segment in view["segments"]) == [0.4, 0.5, 1.1, 1.2]  # the load phase is not in it
    assert sum(segment["gib"] for segment in view["segments"]) == pytest.approx(view["planned"])
    assert (view["now"], view["peak"], view["usable"]) == (1.5, 2.0, 21.4)
    assert view["line"] is None, "a line six times beyond the plan would squeeze it"
    assert memory(state, {**PLAN, "usable_gib": 4.0})["line"] == 4.0


def test_a_peak_above_the_plan_is_said():
    state = state_of(STARTED, {"event": "memory", "process_bytes": 3.9 * 2**30, "peak_bytes": 4 * 2**30})
    assert memory(state, PLAN)["measured_text"] == "peak 4.00 GiB, above the plan"
    assert memory(state, {**PLAN, "peak_gib": 3.9})["measured_text"] == "3.90 GiB now, peak 4.00 GiB" and memory(state, {})["above"] is False


def test_a_gpu_of_its_own_is_held_against_the_plan_and_the_process_against_the_pool():
    view = memory(state_of(STARTED, reading(process_bytes=2 * 2**30, held_bytes=1.5 * 2**30, peak_bytes=1.75 * 2**30)), PLAN)
    assert (view["now"], view["peak"]) == (1.5, 1.75)
    assert view["pool"]["segments"][0] == {**view["pool"]["segments"][0], "name": "this run", "gib": 2.0}


def test_many_lines_are_summed_and_a_gap_is_named():
    lines = [{"name": f"line {i}", "phase": "train", "gib": 1.0 + i / 100} for i in range(12)]
    view = memory(state_of(), {"peak_gib": 15.0, "peak_phase": "train", "lines": lines})
    assert len(view["segments"]) == 8 and view["segments"][-1]["name"] == "everything else"
    assert sum(segment["gib"] for segment in view["segments"]) == pytest.approx(15.0)


@pytest.mark.parametrize("plan", [{}, {"lines": 3, "peak_gib": "x"}, {"lines": [None, {"gib": -1}, {"gib": "a", "phase": []}], "usable_gib": math.inf}])
def test_a_damaged_plan_costs_only_itself(plan):
    view = memory(state_of(STARTED), plan)
    assert view["segments"] == [] and view["peak"] is None and view["scale"] > 0
    assert "N/A" not in memory_words(view)


def test_the_head_of_every_state():
    assert facts.head(state_of())["word"] == "Starting" and facts.head(state_of())["step"] == "no step yet"
    head = facts.head(state_of(STARTED, {"event": "phase", "phase": "load"}))
    assert (head["word"], head["tone"], head["eta"]) == ("Loading the model", "run", "–")
    head = facts.head(state_of(STARTED, {"event": "phase", "phase": "train"}, *steps(25)))
    assert (head["word"], head["step"], head["share"]) == ("Training", "step 25 of 100", 0.25) and head["eta"].endswith(" s")
    assert head["times"].startswith("step 25 of 100 · epoch 0.25 · ") and head["times"].endswith(" s left")
    head = facts.head(state_of(STARTED, *steps(100), {"event": "finished", "time": 1200.0}))
    assert (head["word"], head["share"], head["eta"], head["over"]) == ("Finished", 1.0, "–", True)
    assert head["times"] == "step 100 of 100 · epoch 1.00 · 3 min 20 s in all"


def test_exact_match_is_told_before_and_after(full_state):
    assert facts.exact_match(full_state) == "2 % → 94 %" and "200" in facts.exact_match_count(full_state)
    assert facts.exact_match(state_of(STARTED, {"event": "eval", "step": 0, "loss": 1.0})) == ""
    series = Series()
    series.take(full_state)
    assert facts.badge(series) == "1 NaN, first at step 7"


# what the pool holds


def reading(**fields):
    base = {"event": "memory", "process_bytes": 3 * 2**30, "total_bytes": 24 * 2**30, "available_bytes": 14 * 2**30, "free_bytes": 6 * 2**30}
    return {**base, "cached_bytes": 9 * 2**30, "swap_used_bytes": 0, "pressure_percent": 0.0, **fields}


def test_the_pool_closes_on_its_total_and_names_others():
    view = memory(state_of(STARTED, reading(others={"java <b>": 2 * 2**30, "huge": 90 * 2**30, "odd": None})), PLAN)
    pool = view["pool"]
    assert sum(segment["gib"] for segment in pool["segments"]) + 6 == pytest.approx(24), "free is the rest of the track"
    assert [segment["hatched"] for segment in pool["segments"]] == [False, False, True], "what is counted twice does not overflow the books"
    assert {"this run", "huge"} <= {segment["name"] for segment in pool["segments"]} and pool["text"] == "14.0 GiB of 24.0 GiB available"
    assert "page cache" in view["words"] and memory(state_of(STARTED, {"event": "memory", "process_bytes": 1e9}), PLAN)["pool"] is None
    calm = memory(state_of(STARTED, reading(others={"java": 2 * 2**30})), PLAN)["pool"]
    assert [(segment["name"], segment["gib"]) for segment in calm["segments"]][:3] == [("this run", 3), ("java", 2), ("everything else", 4)]


@pytest.mark.parametrize(
    ("fields", "level", "words"),
    [
        ({}, "good", "14 GiB available"),
        ({"available_bytes": 0.5 * 2**30, "floor_bytes": 2**30}, "bad", "512 MiB available"),
        ({"pressure_percent": 25.0}, "warn", "tasks wait for memory 25 %"),
        ({"available_bytes": None}, "", ""),
    ],
)
def test_the_light_has_its_reason(fields, level, words):
    light = memory(state_of(STARTED, reading(**fields)), PLAN)["light"]
    assert light["level"] == level and words in light["reason"]


def test_swapping_shows_before_anything_else_does():
    state = state_of(STARTED, reading(time=1000.0), reading(time=1010.0, swap_used_bytes=2**30))
    assert memory(state, PLAN)["light"]["reason"] == "1.00 GiB went to swap in the last 30 s"
    later = state_of(STARTED, reading(time=1000.0), reading(time=1010.0, swap_used_bytes=2**30), reading(time=1100.0, swap_used_bytes=2**30))
    assert memory(later, PLAN)["light"]["level"] == "good", "what lies in swap is not swapping"


# figures under the curves


def test_speed_is_told_with_what_holds_it_back():
    state = state_of(STARTED, *({**step, "wait_seconds": 0.0025} for step in steps(20)))
    note = facts.figures(state, {"tokens_per_second": [100.0, 100_000.0]})["speed_note"]
    assert note == "10 % of roofline, 25 % data wait"
    assert facts.figures(state, {"tokens_per_second": [1.0, 50.0]})["speed_note"].startswith("above the roofline: a counting error")
    assert facts.figures(state_of(STARTED, *steps(3)), {})["speed_note"] == "not counting padding"


def test_the_clip_line_and_energy_have_their_words():
    state = state_of(STARTED, *steps(4), {"event": "memory", "time": 1004.0, "watts": 60.0}, {"event": "memory", "time": 1034.0, "watts": 60.0})
    figures = facts.figures(state, {}, clip=0.4)
    assert figures["norm_note"] == "clipped at 0.4, 100 % of updates" and facts.figures(state, {}, clip=1.0)["norm_note"] == "clipped at 1, 0 % of updates"
    assert (figures["energy"], figures["energy_note"]) == ("0.5 Wh", "4.5 J a token, processor only")
    silent = state_of(STARTED, *steps(4))
    assert facts.figures(silent, {"wh": [3.0, 12.0]})["energy_note"] == "not told here; planned 3 Wh to 12 Wh"
    assert facts.figures(silent, {})["energy_note"] == "this box does not tell"


def test_samples_stand_by_prompt_newest_first():
    events = [{"event": "sample", "step": step, "prompt": prompt, "text": f"{prompt}{step}"} for step in range(1, 12) for prompt in "ab"]
    view = facts.samples(state_of(STARTED, *events))
    assert [group["prompt"] for group in view["groups"]] == ["b", "a"] and view["count"] == 22 and view["latest"] == "b11"
    assert [answer["text"] for answer in view["groups"][1]["answers"]] == ["a11", "a10", "a9", "a8", "a7", "a6"]


def test_what_the_guard_says_stands_out():
    state = state_of(STARTED, {"event": "warning", "message": "plain"}, {"event": "warning", "kind": "guard", "message": "floor"})
    state.add({"event": "stopped", "time": 1.0, "by": "guard", "reason": "floor", "fix": "free memory"})
    assert [note["tone"] for note in facts.notes(state)] == ["warn", "bad", "warn"]
    head = facts.head(state)
    assert (head["word"], head["tone"], head["fix"]) == ("Stopped by the memory guard", "bad", "free memory")


# curves of any length


def series_of(state):
    series = Series()
    series.take(state)
    return series


def test_a_hundred_thousand_steps_are_as_few_rows_as_two_thousand():
    losses = {54_321: 9.0, 60_000: None}
    state = state_of(STARTED, *steps(100_000, total=100_000, loss=lambda i: losses.get(i, 1.0 + i % 2)))
    series = series_of(state)
    assert series.stride == 64 and len(series) == -(-100_000 // 64) <= MOST_ROWS
    assert series.column("step")[-1] == 100_000 and max(series.column("high")) == 9.0 and min(series.column("low")) == 1.0
    assert sum(series.column("broken")) == series.broken == 1 and series.first_broken == 60_000
    assert series.spikes == 1 and series.last_spike == 54_321
    assert series.column("loss")[10] == pytest.approx(1.5) and len(series.all()) == len(series) * 9 * 4


def test_rows_grown_step_by_step_are_those_of_the_whole():
    state, grown = state_of(STARTED), Series()
    told = []
    for event in steps(3 * MOST_ROWS, total=9999, loss=lambda i: 3.0 / i):
        state.add({"time": 1.0, **event})
        if event["step"] % 97 == 0 or event["step"] in (MOST_ROWS, MOST_ROWS + 1):
            told.append(grown.take(state)[0])
    grown.take(state)
    assert grown.all() == series_of(state).all() and grown.take(state) == (len(grown), b"")
    assert told.count(0) == 3, "all rows again where two become one"
    assert [stride_of(n) for n in (0, 1, MOST_ROWS, MOST_ROWS + 1, 100_000)] == [1, 1, 1, 2, 64]


def test_noise_is_no_spike_and_a_spike_is():
    import random

    draw = random.Random(3)
    state = state_of(STARTED, *steps(2000, total=2000, loss=lambda i: 2 * math.exp(-i / 300) + 0.5 + draw.gauss(0, 0.1)))
    assert series_of(state).spikes == 0
    state.add({**steps(1, first=2001)[0], "loss": 6.0})
    assert facts.badge(series_of(state)) == "1 spike, last at step 2,001"


@pytest.mark.parametrize("loss", [1.0, -1.0, 0.0])
def test_a_run_that_begins_without_a_number_can_still_be_drawn(loss):
    state = state_of(STARTED, *steps(30, loss=lambda i: None), *steps(1, first=31, loss=lambda i: loss))
    assert facts.badge(series_of(state)) == "30 NaN, first at step 1" and series_of(state).column("loss")[-1] == loss


def test_a_copy_goes_its_own_way():
    state = state_of(STARTED, *steps(300))
    series = series_of(state)
    other = series.copy()
    state.add(steps(1, first=301)[0])
    assert other.take(state)[0] == 300 and (len(series), len(other)) == (300, 301) and other.all()[: len(series.all())] == series.all()
    assert other.all() == series_of(state).all()
    series.take(state)
    assert series.all() == other.all()


# side by side


ROWS = [{"prompt": HOSTILE, "base": HOSTILE, "tuned": ARABIC}, {"prompt": "two", "base": "", "tuned": None}, {}]


def test_comparison_html_is_inert_and_reads_in_its_own_direction():
    html = comparison_html(ROWS)
    assert not re.search(r"<(script|style|svg|img)|\son\w+=[^&]*<", html) and html.count('dir="auto"') >= 4 and ARABIC in html
    assert html.count("(no answer)") == 4 and "No prompts" in comparison_html([])


def test_comparison_text_lets_no_code_through():
    text = comparison_text([*ROWS, {"prompt": "p " * 60, "base": "word " * 60, "tuned": "t"}], columns=50)
    assert "\x1b" not in text and "\x00" not in text and max(map(len, text.splitlines())) <= 60
    assert "base    " in text and "tuned   " in text and comparison_text([]) == "No prompts to compare."
