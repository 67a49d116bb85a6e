"""What rehearsals leave for later plans on the same box: written whole, believed only where it can be true, never in the way."""

import json

import pytest

from sparklab.box import Box, calibration

CHIP = "NVIDIA GB10"
FACTS = {"chip": CHIP, "runtime_bytes": 2.0 * 2**30, "sources": {"runtime_bytes": "assumed", "chip": "measured"}, "note": "as it comes"}


@pytest.fixture
def path(tmp_path, monkeypatch):
    """The file, in a cache folder of the test's own, with calibration switched on."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(calibration.SWITCH)
    return tmp_path / "sparklab" / "calibration.json"


def test_what_is_learned_takes_the_place_of_what_was_assumed(path):
    assert calibration.calibrated(FACTS) == FACTS  # nothing learned yet
    said = calibration.learn(CHIP, {"runtime_bytes": 1.5 * 2**30, "compute_shares": {"lora bf16": 0.42}})
    assert "1.5 GiB" in said and "42.0%" in said and "lora bf16" in said
    calibration.learn(CHIP, {"slack_share": 0.02, "compute_shares": {"qlora bf16": 0.3}})
    facts = calibration.calibrated(FACTS)
    assert facts["runtime_bytes"] == 1.5 * 2**30
    assert facts["compute_shares"] == {"lora bf16": 0.42, "qlora bf16": 0.3}
    assert facts["sources"] == {"runtime_bytes": "measured", "slack_share": "measured", "compute_shares": "measured", "chip": "measured"}
    assert facts["note"] == "as it comes"
    box = Box(name="test", memory_bytes=2**36, unified=True, **facts)
    rows = {what: (figure, source) for what, figure, source in box.rows()}
    assert rows["allocator slack"] == ("2.0%", "measured") and rows["compute reached, qlora bf16"] == ("30.0%", "measured")
    assert [file.name for file in path.parent.iterdir()] == ["calibration.json"]  # no draft stays


def test_another_chip_or_other_versions_learn_for_themselves(path, monkeypatch):
    calibration.learn(CHIP, {"slack_share": 0.02})
    assert calibration.calibrated({**FACTS, "chip": "NVIDIA H200"}) == {**FACTS, "chip": "NVIDIA H200"}
    monkeypatch.setattr("importlib.metadata.version", lambda package: "0.0.1")
    assert calibration.calibrated(FACTS) == FACTS


@pytest.mark.parametrize("content", [
    "not JSON", "[]", "null", "{}", '{"format": 2, "boxes": {}}', '{"format": 1, "boxes": 3}', '{"format": 1, "boxes": {"x": []}}',
    '{"format": 1, "boxes": {"x": {"runtime_bytes": -1}}}', '{"format": 1, "boxes": {"x": {"slack_share": "0.1"}}}',
    '{"format": 1, "boxes": {"x": {"compute_shares": {"lora bf16": 1.5}}}}', '{"format": 1, "boxes": {"x": {"slack_share": NaN}}}', "[" * 100_000, "\x00\xff",
])  # fmt: skip
def test_a_file_that_is_not_ours_is_ignored_with_a_note(path, content):
    path.parent.mkdir()
    path.write_text(content, encoding="utf-8")
    facts = calibration.calibrated(FACTS)
    assert {**facts, "note": FACTS["note"]} == FACTS
    assert facts["note"].startswith("as it comes ") and "is ignored" in facts["note"]
    calibration.learn(CHIP, {"slack_share": 0.02})
    assert calibration.calibrated(FACTS)["slack_share"] == 0.02


def test_what_cannot_be_is_not_kept(path):
    for measured in ({"slack_share": 1.2}, {"runtime_bytes": 0}, {"compute_shares": {"lora bf16": float("inf")}}):
        assert "nothing was kept" in calibration.learn(CHIP, measured)
    assert not path.exists()


def test_it_can_be_switched_off(path, monkeypatch):
    calibration.learn(CHIP, {"slack_share": 0.02})
    for word in ("off", "OFF", "0", "no"):
        monkeypatch.setenv(calibration.SWITCH, word)
        assert calibration.calibrated(FACTS) == FACTS
        assert "off" in calibration.learn(CHIP, {"slack_share": 0.5}).lower()
    assert "0.02" in json.dumps(json.loads(path.read_text()))


def test_a_cache_that_cannot_be_written_is_no_error(path):
    path.parent.parent.joinpath("sparklab").write_text("a file where the folder should be")
    assert "cannot be written" in calibration.learn(CHIP, {"slack_share": 0.02})
    assert calibration.calibrated(FACTS) == FACTS
