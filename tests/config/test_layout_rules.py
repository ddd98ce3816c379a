"""A layout is accepted exactly when every size divides, and a refusal names rule and numbers."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lctw_megatron.config.layout_rules import (
    LOGITS_MIB,
    check_layout,
    loss_block_rows,
    padded_vocabulary,
    without_gradients,
)
from lctw_megatron.config.schema import LayoutConfig, RunConfig
from lctw_megatron.errors import InputError


def run_config(**changes: Any) -> RunConfig:
    """A run of 8 layers, 8 heads in 4 groups; ``layout__tensor=2`` sets layout.tensor."""
    values: dict[str, Any] = {
        "name": "main",
        "run_dir": "out/main",
        "data": {"train": "corpus", "sequence_length": 1024},
        "model": {
            "num_layers": 8,
            "hidden_size": 64,
            "ffn_hidden_size": 192,
            "num_attention_heads": 8,
            "num_query_groups": 4,
            "vocab_size": 1000,
        },
        "layout": {},
        "training": {"steps": 1, "global_batch_size": 8},
    }
    for path, value in changes.items():
        section, field = path.split("__")
        values.setdefault(section, {})[field] = value
    return RunConfig.model_validate(values)


REFUSED = [
    ({"layout__sequence": True}, None, "layout.sequence: true .* needs layout.tensor > 1, found 1"),
    ({"layout__virtual_pipeline": 2}, None, "virtual_pipeline 2 needs layout.pipeline > 1"),
    ({"layout__tensor": 8}, None, r"model.num_query_groups \(4\) .* layout.tensor \(8\)"),
    (
        {"layout__tensor": 16, "model__num_query_groups": None},
        None,
        r"model.num_attention_heads \(8\) must be divisible by layout.tensor \(16\)",
    ),
    ({"model__num_query_groups": 3}, None, r"num_attention_heads \(8\) .*num_query_groups \(3\)"),
    ({"model__hidden_size": 65}, None, r"hidden_size \(65\) .*num_attention_heads \(8\)"),
    (
        {"model__hidden_size": 66, "model__kv_channels": 8, "layout__tensor": 4},
        None,
        r"hidden_size \(66\) .* layout.tensor \(4\)",
    ),
    ({"model__ffn_hidden_size": 190, "layout__tensor": 4}, None, r"ffn_hidden_size \(190\)"),
    (
        {
            "layout__tensor": 3,
            "model__num_attention_heads": 9,
            "model__num_query_groups": 3,
            "model__hidden_size": 72,
        },
        None,
        r"vocab_size 1000 padded to a multiple of 128 \(1024\) .* layout.tensor \(3\)",
    ),
    ({"layout__expert": 2}, None, r"layout.expert is 2, but the model has no experts .* leave it"),
    ({"model__moe_aux_loss_coeff": 0.1}, None, r"moe_aux_loss_coeff is 0.1, but the model has no"),
    ({"model__norm_topk_prob": False}, None, r"norm_topk_prob is False, but the model has no"),
    (
        {"model__num_moe_experts": 6, "layout__expert": 4},
        None,
        r"num_moe_experts \(6\) must be divisible by layout.expert \(4\)",
    ),
    (
        {"model__num_moe_experts": 4, "model__moe_router_topk": 5},
        None,
        r"moe_router_topk is 5, expected at most model.num_moe_experts 4",
    ),
    (
        {"model__num_moe_experts": 4, "layout__tensor": 2},
        None,
        r"layout.tensor 2 needs layout.sequence: true for a model with experts",
    ),
    (
        {"model__num_moe_experts": 4, "layout__expert": 4, "layout__pipeline": 2},
        4,
        r"number of ranks / layout.pipeline \(2\) must be divisible by layout.expert \(4\)",
    ),
    (
        {"model__architecture": "phi"},
        None,
        "architecture phi needs model.qkv_bias true and model.qk_norm false, found False and False",
    ),
    (
        {"model__partial_rotary_factor": 0.5},
        None,
        "model.partial_rotary_factor is 0.5, but llama turns whole heads; leave it out",
    ),
    ({"layout__pipeline": 3}, None, r"num_layers \(8\) .* layout.pipeline \(3\)"),
    (
        {"layout__pipeline": 4, "layout__virtual_pipeline": 4},
        None,
        r"num_layers \(8\) .* layout.pipeline x layout.virtual_pipeline \(16\)",
    ),
    (
        {"layout__context": 4, "data__sequence_length": 1020},
        None,
        r"data.sequence_length \(1020\) must be divisible by 2 x layout.context \(8\)",
    ),
    (
        {"layout__tensor": 4, "layout__sequence": True, "data__sequence_length": 1022},
        None,
        r"data.sequence_length / layout.context \(1022\) .* layout.tensor",
    ),
    ({"training__micro_batch_size": 3}, None, r"global_batch_size \(8\) .*micro_batch_size \(3\)"),
    ({"layout__tensor": 4}, 6, r"number of ranks \(6\) must be divisible by layout.tensor x"),
    ({}, 16, r"global_batch_size \(8\) .* the 16 data-parallel ranks \(16\)"),
    (
        {"training__micro_batch_size": 4},
        4,
        r"\(8\) .* training.micro_batch_size x the 4 data-parallel ranks \(16\)",
    ),
    (
        {"layout__pipeline": 4, "layout__virtual_pipeline": 2, "training__global_batch_size": 6},
        4,
        r"micro batches of a step \(6\) must be divisible by layout.pipeline .* \(4\)",
    ),
]


@pytest.mark.parametrize(("changes", "world_size", "rule"), REFUSED)
def test_a_broken_rule_is_named_with_its_numbers(changes, world_size, rule):
    with pytest.raises(InputError, match=rule):
        check_layout(run_config(**changes), world_size)


def test_derived_sizes_of_a_full_layout():
    run = run_config(
        layout__tensor=2,
        layout__sequence=True,
        layout__pipeline=2,
        layout__virtual_pipeline=2,
        layout__context=2,
    )
    sizes = check_layout(run, 16)
    assert (sizes.model_ranks, sizes.data, sizes.sequences, sizes.micro_batches) == (8, 2, 4, None)
    assert (sizes.layers_per_chunk, sizes.chunks, sizes.tokens_per_rank) == (2, 2, 512)
    assert (check_layout(run).data, check_layout(run).micro_batches) == (None, None)


@pytest.mark.parametrize(
    ("layout", "fewest"),
    [
        ({"expert": 8}, 8),
        ({"expert": 4, "tensor": 2, "sequence": True, "pipeline": 2}, 8),
        ({"expert": 2, "tensor": 4, "sequence": True, "context": 2}, 8),
        ({"expert": 3, "context": 2}, 6),
    ],
)
def test_the_fewest_ranks_hold_all_experts(layout, fewest):
    changes = {f"layout__{name}": value for name, value in layout.items()}
    run = run_config(
        **changes, model__num_moe_experts=24, model__ffn_hidden_size=25,
        training__global_batch_size=24,
    )  # fmt: skip
    assert run.layout.fewest_ranks == fewest
    assert check_layout(run, fewest).data == fewest // run.layout.model_ranks
    with pytest.raises(InputError):
        check_layout(run, fewest // 2)


@pytest.mark.parametrize(
    ("layout", "experts", "shared"),
    [
        ({"tensor": 2, "context": 4}, 24, 8),
        ({"tensor": 4, "pipeline": 2}, 6, 2),
        ({"pipeline": 2}, 6, 1),
        ({"tensor": 4}, None, 1),
    ],
)
def test_without_gradients_the_ranks_of_a_sequence_share_experts_out(layout, experts, shared):
    model = run_config(model__num_moe_experts=experts).model
    assert without_gradients(LayoutConfig(**layout), model).expert == shared


def test_an_unknown_vocabulary_is_left_to_the_tokenizer():
    changes = {"model__num_attention_heads": 9, "model__num_query_groups": 3}
    run = run_config(**changes, layout__tensor=3, model__hidden_size=72, model__vocab_size=None)
    assert check_layout(run).model_ranks == 3


@given(st.integers(1, 10**6))
def test_padding_of_the_vocabulary_is_the_next_multiple_of_128(vocab):
    assert padded_vocabulary(vocab) % 128 == 0
    assert 0 <= padded_vocabulary(vocab) - vocab < 128


@given(
    tensor=st.sampled_from([1, 2, 4]),
    pipeline=st.sampled_from([1, 2, 4, 8]),
    context=st.sampled_from([1, 2, 4]),
    data=st.sampled_from([1, 2, 4, 8]),
)
def test_ranks_are_the_product_of_the_groups(tensor, pipeline, context, data):
    run = run_config(layout__tensor=tensor, layout__pipeline=pipeline, layout__context=context)
    sizes = check_layout(run, tensor * pipeline * context * data)
    assert sizes.data == data
    assert sizes.sequences == 8 // data


@pytest.mark.parametrize(
    ("vocabulary", "device", "rows"),
    [
        (128256, "cuda", {1: 4096, 2: 8320, 8: 33408}),
        (49152, "cuda", {1: 10880, 2: 21760, 8: 87296}),
        (128256, "cpu", {1: 128, 2: 256, 8: 1024}),
        (10**8, "cuda", {1: 128}),
    ],
)
def test_rows_of_the_loss_follow_from_what_their_logits_take(
    vocabulary: int, device: str, rows: dict[int, int]
) -> None:
    for tensor, expected in rows.items():
        layout = LayoutConfig(tensor=tensor)
        found = loss_block_rows(layout, vocabulary, device)
        assert found == expected
        columns = padded_vocabulary(vocabulary) // tensor
        assert found == 128 or found * columns * 4 <= LOGITS_MIB[device] * 2**20
    assert loss_block_rows(LayoutConfig(loss_block_rows=7), vocabulary, device) == 7
