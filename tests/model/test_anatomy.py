"""Anatomies: exact parameter counts, every fault of a config at once, and quick clear errors for models that are not there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sparklab.errors import ModelError, ModelNotFound
from sparklab.model import hub
from sparklab.model.anatomy import Anatomy, from_config

CONFIGS = Path(__file__).parents[1] / "planner" / "configs"
SMALL: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 300, "max_position_embeddings": 128, "tie_word_embeddings": False,
}  # fmt: skip


def test_parameters_of_llama_by_hand() -> None:
    # 8B: embedding and head 2 x 128256 x 4096; a layer: q and o 4096 x 4096, k and v 4096 x 1024, three of 4096 x 14336, two norms; a last norm.
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096
    assert Anatomy.read(CONFIGS / "llama-3.1-8b.json").parameters == 2 * 128256 * 4096 + 32 * layer + 4096 == 8_030_261_248
    assert Anatomy.read(CONFIGS / "llama-3.3-70b.json").parameters == 70_553_706_496


def test_figures_of_llama_8b() -> None:
    anatomy = Anatomy.read(str(CONFIGS / "llama-3.1-8b.json"))
    assert anatomy.source_bytes == 2 * 8_030_261_248
    assert [(line.name, line.inputs, line.outputs, line.count, line.group) for line in anatomy.linears] == [
        ("q_proj", 4096, 4096, 32, "attention"), ("k_proj", 4096, 1024, 32, "attention"), ("v_proj", 4096, 1024, 32, "attention"),
        ("o_proj", 4096, 4096, 32, "attention"), ("gate_proj", 4096, 14336, 32, "mlp"), ("up_proj", 4096, 14336, 32, "mlp"),
        ("down_proj", 14336, 4096, 32, "mlp"),
    ]  # fmt: skip
    assert (anatomy.head_dim, anatomy.heads, anatomy.kv_heads, anatomy.max_positions) == (128, 32, 8, 131072)
    assert anatomy.to_dict()["parameters"] == 8_030_261_248
    assert "8.03B parameters, 32 layers of 4096, 32/8 heads of 128" in repr(anatomy)


def test_targets() -> None:
    anatomy = from_config(SMALL, "small")
    assert len(anatomy.targeted("all-linear")) == 7
    assert [linear.name for linear in anatomy.targeted("attention")] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert [linear.name for linear in anatomy.targeted(("up_proj", "q_proj"))] == ["q_proj", "up_proj"]
    with pytest.raises(ModelError, match=r"(?s)'qproj'.*q_proj, k_proj"):
        anatomy.targeted(("qproj", "k_proj"))


def test_a_directory_a_file_and_the_bundled_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    assert Anatomy.read(tmp_path).parameters == Anatomy.read(str(tmp_path / "config.json")).parameters
    if (hub.TINY_PATH / "config.json").is_file():
        assert 2_000_000 <= Anatomy.read("tiny").parameters <= 5_000_000


def test_every_fault_is_named_at_once() -> None:
    values = {**SMALL, "num_hidden_layers": 0, "vocab_size": "many", "num_key_value_heads": 3, "intermediate_size": None, "tie_word_embeddings": 1}
    with pytest.raises(ModelError) as caught:
        from_config(values, "bad")
    text = str(caught.value)
    for fault in ("num_hidden_layers is 0", "vocab_size is 'many'", "num_key_value_heads 3", "intermediate_size is missing", "embeddings is 1"):
        assert fault in text
    assert text.count("\n  - ") == 5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, "hidden_size 64 is not a multiple of num_attention_heads 5"),
        ({"hidden_size": 10**7, "intermediate_size": 10**7}, "parameters; no model has more"),
        ({"hidden_size": -64}, "hidden_size is -64"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"head_dim": 15}, "it must be an even number"),
        ({"model_type": "mamba"}, r"(?s)'mamba'.*llama, mistral, mixtral"),
        ({"model_type": None}, "names no model_type"),
        ({"quantization_config": {"quant_method": "gptq"}}, "already quantised"),
    ],
)
def test_a_config_that_cannot_be(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        from_config({**SMALL, **changes}, "bad")


@pytest.mark.parametrize("text", [b"", b"{", b"[1, 2]", b"\xff\xfe\x00", b"[" * 100_000])
def test_a_file_that_is_no_config(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ModelError) as caught:
        Anatomy.read(tmp_path)
    assert not isinstance(caught.value, ModelNotFound)
    assert caught.value.fix


def test_a_missing_path_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "llama-8b").mkdir()
    with pytest.raises(ModelNotFound, match="llama-8b'"):
        Anatomy.read(tmp_path / "lama-8b")
    with pytest.raises(ModelNotFound, match=r"no config\.json"):
        Anatomy.read(tmp_path / "llama-8b")
    with pytest.raises(ModelNotFound, match="did you mean 'tiny'"):
        Anatomy.read("tinny")
    with pytest.raises(ModelNotFound, match="does not exist or cannot be read"):
        Anatomy.read(tmp_path / "no" / "such" / "place")
    assert issubclass(ModelNotFound, FileNotFoundError)


def test_the_hub_is_asked_for_config_json_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Answer:
        status_code, text = 200, json.dumps(SMALL)

    class Session:
        def get(self, url: str, **_: Any) -> Answer:
            asked.append(url)
            return Answer()

    monkeypatch.setattr("huggingface_hub.get_session", Session)
    assert Anatomy.read("someone/no-such-model-7f3a").parameters == from_config(SMALL, "small").parameters
    assert len(asked) == 1
    assert asked[0].endswith("someone/no-such-model-7f3a/resolve/main/config.json")
    Answer.status_code = 401
    with pytest.raises(ModelNotFound, match="none of this name"):
        Anatomy.read("someone/no-such-model-7f3a")


def test_without_network_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        raise OSError("no route")

    monkeypatch.setattr("huggingface_hub.get_session", broken)
    with pytest.raises(ModelNotFound, match=r"(?s)cannot be reached \(OSError\).*'tiny' works offline"):
        Anatomy.read("someone/no-such-model-7f3a")


def test_a_network_that_never_answers_does_not_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    never = threading.Event()
    monkeypatch.setattr(hub, "SECONDS_TO_WAIT", 0.05)
    monkeypatch.setattr("huggingface_hub.get_session", lambda: never.wait(5))
    with pytest.raises(ModelNotFound, match="did not answer"):
        Anatomy.read("someone/no-such-model-7f3a")
    never.set()


def test_names_are_escaped() -> None:
    assert "<script>" not in from_config(SMALL, "<script>alert(1)</script>")._repr_html_()


def test_reading_a_config_loads_nothing_heavy() -> None:
    code = (
        "import sys; from sparklab.model.anatomy import Anatomy; Anatomy.read(sys.argv[1]);"
        "print(sorted({'torch', 'numpy', 'transformers', 'huggingface_hub'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(CONFIGS / "llama-3.1-8b.json")], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
