"""The two toy tokenizers as fixtures."""

from __future__ import annotations

import pytest
from toy import MARKED, PLAIN, PLAIN_SPECIAL, build_tokenizer
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def marked() -> PreTrainedTokenizerFast:
    """Generation marks, BOS written by the template; the bundled model's form."""
    return build_tokenizer(MARKED, end="<|end|>")


@pytest.fixture(scope="session")
def plain() -> PreTrainedTokenizerFast:
    """No marks, no BOS, a newline after the end of turn."""
    return build_tokenizer(PLAIN, end="<|stop|>", special=PLAIN_SPECIAL)


@pytest.fixture(params=["marked", "plain"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return request.getfixturevalue(request.param)
