"""What a rehearsal makes of what was measured: refusals, rates, what is learned for later plans. No torch here."""

import json
import time
from dataclasses import replace

import pytest
from small_model import SHAPE, box, recipe

import sparklab as sl
from sparklab.box import calibration
from sparklab.box.detect import CPU_RUNTIME_BYTES
from sparklab.box.power import PowerMeter
from sparklab.errors import DoesNotFit
from sparklab.model.anatomy import Anatomy
from sparklab.planner import plan
from sparklab.planner.cost import cost, flops_per_token, kind_of_work, reached_share
from sparklab.planner.ledger import Ledger
from sparklab.planner.recipe import Recipe
from sparklab.run import rehearsal
from sparklab.units import GIB, NA


def test_what_does_not_fit_is_refused_before_anything_is_started(tmp_path, monkeypatch):
    monkeypatch.setattr(rehearsal, "rehearse_plan", lambda *_: pytest.fail("started"))
    with pytest.raises(DoesNotFit, match="Any one of these fits"):
        sl.rehearse(recipe(tmp_path, micro_batch_tokens=4096), box=box(memory_bytes=0.04 * GIB))


def made(planned, here, step_seconds, reserved_bytes=NA, measured_bytes=1.0):
    phase = rehearsal.Phase(name="train", planned_bytes=1.0, measured_bytes=measured_bytes, reserved_bytes=reserved_bytes, process_bytes=NA, seconds=1.0)
    return rehearsal.Rehearsal(planned, (phase,), (step_seconds,), NA, 1.0, "CPU", here)


def test_more_than_the_roofline_is_a_counting_error(tmp_path):
    here = box()
    planned = plan(recipe(tmp_path), box=here)
    seconds = flops_per_token(planned.ledger) * planned.recipe.micro_batch_tokens / here.fp32_flops
    possible, impossible = made(planned, here, seconds * 1.01), made(planned, here, seconds * 0.99)
    assert possible.roofline_share == pytest.approx(1 / 1.01)
    content = impossible.to_dict()
    assert content["tflops"] is None and content["roofline_share"] is None
    assert any("counting error" in note for note in rehearsal._notes(impossible, {"runtime_bytes": None}))


def test_a_rehearsal_on_a_cpu_never_plans_a_run_below_what_runs_hold(tmp_path):
    here = box()
    rehearsed = made(plan(recipe(tmp_path), box=here), here, 0.1)
    assert rehearsal.learned(rehearsed, runtime_bytes=0.52 * GIB)["runtime_bytes"] == CPU_RUNTIME_BYTES
    assert rehearsal.learned(rehearsed, runtime_bytes=0.9 * GIB)["runtime_bytes"] == 0.9 * GIB


def test_what_is_learned_makes_the_next_plan_what_was_measured(calibrated):
    """An 8B on a GPU of known speed: 2.1 s an update, 90 GiB allocated, 2 GiB more reserved."""
    here = box(is_gpu=True, bf16_flops=92e12, has_native_bf16=True, bandwidth_bytes_per_second=273e9, memory_bytes=119 * GIB, chip="GB10")
    shape = {**SHAPE, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 128256}
    path = calibrated.parent.parent / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(shape))
    planned = plan(Recipe(model=str(path), data="none", micro_batch_tokens=2048), box=here)
    measured = made(planned, here, 2.1, reserved_bytes=92 * GIB, measured_bytes=90 * GIB)
    found = rehearsal.learned(measured, runtime_bytes=1.5 * GIB)
    stays = sum(item.size_bytes for item in (*planned.ledger.weights, *planned.ledger.states))
    beside = next(line.bytes for line in planned.peak_lines if line.name == "loss beside CUDA graphs")  # reserved, and no slack: it has a line of its own
    assert beside > 0.4 * GIB and found["slack_share"] == pytest.approx((2 * GIB - beside) / (90 * GIB - stays))
    assert "GB10" not in calibration.learn("GB10", found)
    facts = calibration.calibrated({"chip": "GB10", "sources": {"runtime_bytes": "assumed"}, "slack_share": NA})
    later = plan(planned.recipe, box=box(**{**vars(here), **facts}))
    assert later.cost.seconds[1] == pytest.approx(2.1)
    assert later.cost.seconds[0] == planned.cost.seconds[0]  # the roofline stays where it is
    formulas = {line.name: line.formula for line in later.peak_lines}
    assert "measured" in formulas["allocator slack"] and "measured" in formulas["runtime"]
    assert "assumed" in {line.name: line.formula for line in planned.peak_lines}["allocator slack"]
    lines = {line.name: line.bytes for line in later.peak_lines}
    moving = sum(size for name, size in lines.items() if name not in ("weights", "adapters", "optimizer", "runtime", "library workspace", "allocator slack"))
    assert lines["allocator slack"] == pytest.approx(found["slack_share"] * moving)


def test_a_share_that_cannot_be_is_not_learned(tmp_path):
    ledger = Ledger(Anatomy.read("tiny"), Recipe(model="tiny", data="none"), box())
    work = cost(ledger)
    assert kind_of_work(ledger) == "lora fp32"
    assert reached_share(work, 1e12, NA, work.flops / 1e12 / 0.25) == pytest.approx(0.25)
    for seconds in (work.flops / 1e12 / 1.5, 0.0):
        assert reached_share(work, 1e12, NA, seconds) != reached_share(work, 1e12, NA, seconds)


def test_power_is_told_or_unknown(tmp_path):
    with PowerMeter(True, tmp_path, lambda _: "40.5\n20\n") as meter:
        pass
    assert meter.watts == 60.5
    for text in ("", "[N/A]\n"):
        with PowerMeter(True, tmp_path, lambda _, text=text: text) as meter:
            pass
        assert meter.watts != meter.watts
    folder = tmp_path / "sys/class/powercap/intel-rapl:0"
    folder.mkdir(parents=True)
    (folder / "max_energy_range_uj").write_text("1000000")
    (folder / "energy_uj").write_text("900000")
    with PowerMeter(False, tmp_path) as meter:
        time.sleep(0.05)
        (folder / "energy_uj").write_text("400000")  # round the corner: 0.5 J
    assert 1 < meter.watts < 0.5 / 0.05
    with PowerMeter(False, tmp_path / "elsewhere") as meter:
        pass
    assert meter.watts != meter.watts


def test_a_profile_is_shown_and_told(tmp_path):
    here = box()
    plain = made(plan(recipe(tmp_path), box=here), here, 2.0)
    assert plain.to_dict()["profile"] is None and "profiled" not in str(plain)
    profiled = replace(plain, profile={"matrix products": 1.5, "loss": 0.0, "other": 0.5})
    content = profiled.to_dict()
    assert content["profile"]["matrix products"] == {"ms": 1500.0, "share": 0.75}
    assert content["profile_ms"] == 2000.0 == sum(part["ms"] for part in content["profile"].values())
    for picture in (str(profiled), profiled._repr_html_()):
        assert "2,000.0 ms" in picture and "1,500.0 ms" in picture and "75.0%" in picture and "loss" not in picture
