"""Rotary frequencies and attention factors are those of transformers, for every type of scaling."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lctw_megatron.config.rope import FIELDS, attention_factor
from lctw_megatron.config.schema import ModelConfig, RopeScaling
from lctw_megatron.model.gpt import _Rotary
from lctw_megatron.model.rotary import frequencies


def stretched(theta: float, width: int, scaling: RopeScaling | None) -> ModelConfig:
    return ModelConfig(
        num_layers=1, hidden_size=4 * width, ffn_hidden_size=8, num_attention_heads=4,
        rope_theta=theta, rope_scaling=scaling,
    )  # fmt: skip


def of_transformers(model: ModelConfig, length: int) -> tuple[Tensor, float]:
    """inv_freq and attention factor of a forward over ``length`` positions."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    scaling = model.rope_scaling
    values: dict[str, Any] | None = None
    if scaling:
        values = {n: getattr(scaling, n) for n in ("rope_type", *FIELDS[scaling.rope_type])}
        values = {n: value for n, value in values.items() if value is not None}
    dynamic = scaling is not None and scaling.rope_type == "dynamic"
    config = LlamaConfig(
        hidden_size=model.hidden_size, num_attention_heads=4, rope_theta=model.rope_theta,
        max_position_embeddings=scaling.original_max_position_embeddings if dynamic else 131072,
        rope_scaling=values,
    )  # fmt: skip
    rotary = LlamaRotaryEmbedding(config)
    rotary(torch.zeros(1), torch.arange(length)[None])
    return rotary.inv_freq, rotary.attention_scaling


THETA = st.sampled_from([1e4, 5e5, 15.3e6]) | st.floats(1e3, 1e9)
WIDTH = st.integers(2, 64).map(lambda half: 2 * half)
FACTOR = st.floats(1, 64)
ORIGINAL = st.sampled_from([64, 4096, 8192])
EPS = torch.finfo(torch.float32).eps
weight = st.none() | st.sampled_from([0.0, 0.707, 1.0]) | st.floats(0.1, 2)
others = st.one_of(
    st.none(),
    st.builds(RopeScaling, rope_type=st.just("linear"), factor=FACTOR),
    st.builds(
        RopeScaling, rope_type=st.just("dynamic"), factor=FACTOR,
        original_max_position_embeddings=ORIGINAL,
    ),
    st.builds(
        RopeScaling, rope_type=st.just("yarn"), factor=FACTOR,
        original_max_position_embeddings=ORIGINAL,
        attention_factor=st.none() | st.floats(0.1, 2), mscale=weight, mscale_all_dim=weight,
        beta_fast=st.none() | st.floats(8, 64), beta_slow=st.none() | st.floats(0.5, 8),
        truncate=st.sampled_from([None, True, False]),
    ),
)  # fmt: skip


@given(theta=THETA, width=WIDTH, scaling=others, length=st.sampled_from([48, 64, 65, 5000, 9001]))
@settings(max_examples=60, deadline=None)
def test_frequencies_and_attention_factors_are_those_of_transformers(
    theta: float, width: int, scaling: RopeScaling | None, length: int
) -> None:
    model = stretched(theta, width, scaling)
    expected, factor = of_transformers(model, length)
    found = frequencies(model, length)
    # dynamic: transformers computes theta in float32, whose rounding its powers carry on.
    torch.testing.assert_close(found, expected, rtol=8 * EPS, atol=0)
    assert attention_factor(scaling) == pytest.approx(factor, rel=1e-12)
    config = SimpleNamespace(kv_channels=width, use_cpu_initialization=True)
    rotary = _Rotary(model, config, None)
    rotary.get_emb(length)
    assert rotary.inv_freq.equal(found)  # what the model turns with
    if scaling is None:
        assert found.equal(expected)


@given(
    theta=THETA, width=WIDTH, factor=FACTOR, low=st.floats(0.5, 4), band=st.floats(0.5, 8),
    original=ORIGINAL,
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_llama3_frequencies_are_those_of_transformers(
    theta: float, width: int, factor: float, low: float, band: float, original: int
) -> None:
    scaling = RopeScaling(
        factor=factor, low_freq_factor=low, high_freq_factor=low + band,
        original_max_position_embeddings=original,
    )  # fmt: skip
    model = stretched(theta, width, scaling)
    found, (expected, _) = frequencies(model, 1), of_transformers(model, 1)
    plain, _ = of_transformers(stretched(theta, width, None), 1)
    turned = original * plain / (2 * torch.pi)
    # Between the bands both compute the place in a band of `band` turns in float32: a rounding of
    # the turns there is one of turns / band in the frequency.
    assert ((found - expected).abs() <= EPS * plain * (4 + 4 * turned / band)).all()
    outside = (turned < 0.99 * low) | (turned > 1.01 * (low + band))
    assert found[outside].equal(expected[outside])
