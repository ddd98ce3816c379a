"""FLOPs against hand counts and against a sum over every window."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lctw_megatron.config.load import load_fragment
from lctw_megatron.config.model_sizes import active_parameters, parameters
from lctw_megatron.config.schema import ModelConfig
from lctw_megatron.scoring.windows import windows
from lctw_megatron.training.flops import (
    forward_flops,
    self_scoring_flops,
    sequence_flops,
    step_flops,
)
from tests.training.test_estimate import run_config

SMALL = ModelConfig(
    num_layers=2,
    hidden_size=8,
    ffn_hidden_size=12,
    num_attention_heads=2,
    num_query_groups=1,
    vocab_size=100,
)


def test_a_small_model_by_hand():
    # Per token and layer: q 8x8, k and v 8x4 each, output 8x8, gate, up and down 8x12 each.
    matrices = 2 * (64 + 32 + 32 + 64 + 3 * 96)
    # 5 tokens: 15 causal pairs, scores and values over 8 channels.
    attention = 15 * 2 * 2 * 8
    assert forward_flops(SMALL, [5], 3) == 2 * (5 * matrices + attention) + 3 * 2 * 8 * 100
    assert sequence_flops(SMALL, 5) == 3 * (2 * (5 * matrices + attention) + 5 * 1600)
    # Two documents of one sequence: fewer pairs.
    pairs_lost = 15 - (6 + 3)
    assert forward_flops(SMALL, [5], 0) - forward_flops(SMALL, [3, 2], 0) == 2 * pairs_lost * 32


def test_of_experts_those_count_that_a_token_goes_to():
    experts = {"num_moe_experts": 5, "moe_ffn_hidden_size": 6, "moe_router_topk": 3}
    routed = SMALL.model_copy(update=experts)
    # 3 experts of half the width and the router, instead of one MLP.
    more = 2 * 5 * 2 * (3 * 3 * 8 * 6 + 5 * 8 - 3 * 96)
    assert forward_flops(routed, [5], 3) - forward_flops(SMALL, [5], 3) == more
    assert parameters(routed) - parameters(SMALL) == 2 * (5 * 3 * 48 + 5 * 8 - 3 * 96)
    assert parameters(routed) - active_parameters(routed) == 2 * 2 * 3 * 48


# Of phi-2's narrower layers attention is more.
@pytest.mark.parametrize(("name", "attention"), [("llama3_8b", 0.003), ("phi2", 0.004)])
def test_short_sequences_cost_six_flops_per_parameter_and_token(name, attention):
    model = ModelConfig(**load_fragment("model", name, "the test"))
    embedding = model.vocab_size * model.hidden_size  # looked up, not multiplied
    expected = 6 * (parameters(model) - embedding) * 128
    assert sequence_flops(model, 128) == pytest.approx(expected, rel=attention)


def test_attention_of_long_sequences_by_hand():
    # Llama-3-8B at 128k: 32 layers x 3 (forward, backward) x 4 x 4096 FLOPs x S (S + 1) / 2 pairs.
    model = ModelConfig(**load_fragment("model", "llama3_8b", "the test"))
    attention = 32 * 3 * 4 * 4096 * (131072 * 131073 // 2)
    matrices = 6 * 131072 * (32 * 218_103_808 + 4096 * 128256)
    assert sequence_flops(model, 131072) == attention + matrices


@settings(max_examples=50)
@given(length=st.integers(2, 300), window=st.integers(2, 40), stride=st.integers(1, 40))
def test_self_scoring_adds_every_later_window(length, window, stride):
    stride = min(stride, window)
    expected = 0
    for start, end, first, stop in windows(length + 1, window, stride):
        if start > 0:
            expected += forward_flops(SMALL, [int(end - start)], int(stop - first))
    assert self_scoring_flops(SMALL, length, window, stride) == expected


def test_a_step_counts_the_batch_and_scores_only_when_the_scheme_needs_it():
    run = run_config(SMALL.model_dump(), {}, 64, batch=6)
    assert step_flops(run) == 6 * sequence_flops(SMALL, 64)
    own = {"mode": "self", "window": 16, "stride": 8}
    values = run.model_dump()
    dense = type(run).model_validate(values | {"weighting": own | {"scheme": "dense"}})
    added = self_scoring_flops(SMALL, 64, 16, 8)
    assert added > 0
    assert step_flops(dense) == 6 * (sequence_flops(SMALL, 64) + added)
    uniform = type(run).model_validate(values | {"weighting": own | {"scheme": "uniform"}})
    assert step_flops(uniform) == step_flops(run)
