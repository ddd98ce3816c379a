"""Where rows lie: as megatron-core splits its tensors, for any sizes."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from lctw_megatron.config.schema import ModelConfig
from lctw_megatron.conversion.architectures import ARCHITECTURES
from lctw_megatron.conversion.placement import StoredTensor, stored_tensors

sizes = st.builds(
    lambda kind, layers, groups, per_group, width, ffn, vocabulary, hidden, tied: ModelConfig(
        architecture=kind,
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=groups * per_group,
        num_query_groups=groups,
        kv_channels=2 * width,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        qkv_bias=ARCHITECTURES[kind].flags["qkv_bias"],
        qk_norm=ARCHITECTURES[kind].flags["qk_norm"],
        num_moe_experts=groups + 1 if ARCHITECTURES[kind].experts else None,
    ),
    st.sampled_from(sorted(ARCHITECTURES)),
    *[st.integers(1, n) for n in (3, 5, 4, 8, 300, 400, 64)],
    st.booleans(),
)


@given(sizes)
def test_parts_cover_every_row_once_and_only_the_vocabulary_is_padded(model):
    for stored in stored_tensors(model):
        covered = torch.zeros(stored.shape[0], dtype=torch.int64)
        for part in stored.parts:
            assert part.shape[1:] == stored.shape[1:]
            next_row = 0
            for block in part.blocks:
                assert block.hf_row == next_row
                next_row += block.rows
                covered[block.row : block.row + block.rows] += 1
            assert next_row == part.shape[0]
        live = stored.covered_rows
        assert (covered[:live] == 1).all() and (covered[live:] == 0).all()
        if "word_embeddings" in stored.key or "output_layer" in stored.key:
            assert stored.shape[0] % 128 == 0 and stored.shape[0] - live < 128
        else:
            assert live == stored.shape[0]


@given(sizes)
def test_every_tensor_has_one_place_and_layers_are_stacked(model):
    names, places = [], []
    for stored in stored_tensors(model):
        names += [part.name for part in stored.parts]
        places.append((stored.key, stored.offsets))
        assert len(stored.global_shape) == len(stored.offsets) == len(stored.box)
        if stored.place:
            assert stored.global_shape[0] == model.num_layers and stored.box[0] == 1
        if len(stored.place) == 2:
            assert stored.global_shape[1] == model.num_moe_experts and stored.box[1] == 1
    assert len(set(names)) == len(names) and len(set(places)) == len(places)
    assert ("lm_head.weight" in names) != model.tie_word_embeddings


def test_query_key_value_rows_are_those_of_megatron_core():
    # megatron-core's SelfAttention views linear_qkv's output as
    # [groups, (heads per group + 2) x width] and splits the last axis into queries, key, value.
    model = ModelConfig(
        num_layers=1, hidden_size=8, ffn_hidden_size=6, num_attention_heads=6, num_query_groups=3,
        kv_channels=4, vocab_size=10,
    )  # fmt: skip
    fused = _by_name(model, "decoder.layers.self_attention.linear_qkv.weight")
    source = {
        "q": torch.arange(6 * 4).view(6, 4) + 100,  # [head, row in the head]
        "k": torch.arange(3 * 4).view(3, 4) + 200,
        "v": torch.arange(3 * 4).view(3, 4) + 300,
    }
    rows = torch.full((fused.shape[0],), -1)
    for part, name in zip(fused.parts, "qkv", strict=True):
        assert f".{name}_proj." in part.name
        for block in part.blocks:
            taken = source[name].flatten()[block.hf_row : block.hf_row + block.rows]
            rows[block.row : block.row + block.rows] = taken
    query, key, value = rows.view(3, 4 * 4).split([8, 4, 4], dim=1)
    assert torch.equal(query.reshape(6, 4), source["q"])
    assert torch.equal(key, source["k"]) and torch.equal(value, source["v"])


def test_gate_rows_come_before_up_rows():
    model = ModelConfig(
        num_layers=1, hidden_size=8, ffn_hidden_size=6, num_attention_heads=2, vocab_size=10
    )
    fused = _by_name(model, "decoder.layers.mlp.linear_fc1.weight")
    assert [(part.name.split(".")[-2], part.blocks[0].row) for part in fused.parts] == [
        ("gate_proj", 0),
        ("up_proj", 6),
    ]


def _by_name(model: ModelConfig, key: str) -> StoredTensor:
    return next(stored for stored in stored_tensors(model) if stored.key == key)
