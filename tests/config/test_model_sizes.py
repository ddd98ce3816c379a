"""Sizes that follow from a model's alone."""

import pytest

from lctw_megatron.config.load import load_fragment
from lctw_megatron.config.model_sizes import forward_tokens
from lctw_megatron.config.schema import ModelConfig


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("smollm2_135m", 65536),
        ("smollm2_360m", 32768),
        ("llama32_1b", 16384),
        ("llama3_70b", 16384),
    ],
)
def test_small_models_take_more_tokens_at_once_on_a_gpu_only(name: str, tokens: int) -> None:
    model = ModelConfig.model_validate(load_fragment("model", name, "the test"))
    assert forward_tokens(model, "cuda") == tokens
    assert forward_tokens(model, "cpu") == 16384
