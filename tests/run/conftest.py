"""A model of one layer, so that a whole run takes a second: for tests of the run, not of what it learns."""

import pytest
from support import write_chats


@pytest.fixture(scope="session")
def one_layer(tmp_path_factory):
    """A Llama of one layer with the bundled model's tokenizer and random weights, on disk."""
    import torch
    import transformers

    from sparklab.model.hub import TINY_PATH

    folder = tmp_path_factory.mktemp("one-layer")
    config = transformers.AutoConfig.from_pretrained(TINY_PATH)
    config.update({"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32})
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(TINY_PATH).save_pretrained(folder)
    return folder


@pytest.fixture
def quick_recipe(small_recipe, one_layer, tmp_path):
    """As ``small_recipe``, on that model, and without the guard's process beside it."""
    held_out = write_chats(tmp_path / "four.jsonl", 4, "held_out")

    def make(method="lora", **changes):
        return small_recipe(method, **{"model": str(one_layer), "guard": False, "held_out": str(held_out), "answer_tokens": 4, **changes})

    return make
