"""The model: rotary frequencies as Hugging Face's, losses as its own logits say, weights the same
on every layout."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lctw_megatron.config.rope import FIELDS
from lctw_megatron.config.schema import LayoutConfig, ModelConfig, RopeScaling
from lctw_megatron.model.cross_entropy import IGNORE
from lctw_megatron.model.gpt import TokenWeightedGPT, build_model, without_context_parallel
from lctw_megatron.platform.world import initialize
from tests.distributed import run_distributed
from tests.training.layouts import MODEL, gather, shards


def build(
    model: dict[str, Any], layout: dict[str, Any], dtype: torch.dtype = torch.float64
) -> list[TokenWeightedGPT]:
    world = initialize(LayoutConfig(**layout), 1)
    return build_model(
        ModelConfig(**MODEL | model), LayoutConfig(**layout), max_sequence_length=64, dtype=dtype,
        device=world.device, seed=3,
    )  # fmt: skip


# Rotary embedding.


def hugging_face_inv_freq(theta: float, channels: int, scaling: RopeScaling | None) -> Tensor:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=4 * channels,
        num_attention_heads=4,
        rope_theta=theta,
        max_position_embeddings=131072,
        rope_scaling=scaling and {n: getattr(scaling, n) for n in ("rope_type", *FIELDS["llama3"])},
    )
    return LlamaRotaryEmbedding(config).inv_freq


def test_queries_are_rotated_as_by_transformers_at_far_positions() -> None:
    from megatron.core.models.common.embeddings import apply_rotary_pos_emb
    from transformers.models.llama import modeling_llama

    scaling = RopeScaling(factor=8.0, original_max_position_embeddings=8192)
    (model,) = build({"rope_theta": 5e5, "rope_scaling": scaling}, {}, torch.float32)
    length, channels = 32768, 8
    query = torch.randn(length, 1, 4, channels, generator=torch.Generator().manual_seed(1))
    found = apply_rotary_pos_emb(query, model.rotary_pos_emb(length), model.config)
    angles = torch.outer(torch.arange(length), hugging_face_inv_freq(5e5, channels, scaling))
    cos, sin = (x.repeat(1, 2)[None] for x in (angles.cos(), angles.sin()))
    heads = query.permute(1, 2, 0, 3)
    expected, _ = modeling_llama.apply_rotary_pos_emb(heads, heads, cos, sin)
    torch.testing.assert_close(found.permute(1, 2, 0, 3), expected, rtol=0, atol=1e-3)
    near = slice(0, 2048)
    torch.testing.assert_close(
        found.permute(1, 2, 0, 3)[:, :, near], expected[:, :, near], rtol=0, atol=1e-5
    )


# Logits and losses.


def inputs(length: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    """tokens, position ids and labels [2, length], a quarter of the labels IGNORE."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(MODEL["vocab_size"], (2, length + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    labels[torch.rand(labels.shape, generator=generator) < 0.25] = IGNORE
    return tokens[:, :-1], torch.arange(length).expand(2, -1), labels


PHI = {"architecture": "phi", "qk_norm": False, "partial_rotary_factor": 0.5}


@pytest.mark.parametrize("changes", [{}, PHI], ids=["llama", "phi"])
@pytest.mark.parametrize("tied", [False, True])
def test_losses_are_the_cross_entropy_of_the_logits_over_the_true_vocabulary(
    tied: bool, changes: dict[str, Any]
) -> None:
    (model,) = build({"tie_word_embeddings": tied, **changes}, {})
    tokens, positions, labels = inputs()
    head = model.shared_embedding_or_output_weight() if tied else model.output_layer.weight
    vocabulary = MODEL["vocab_size"]
    assert head.shape[0] == 256 > vocabulary
    with torch.no_grad():
        head[vocabulary:] = 100.0  # would take all probability, if it took any
        if changes:
            model.output_layer.bias.normal_()
            model.output_layer.bias[vocabulary:] = 100.0
    logits = model(tokens, positions, None)
    assert logits.shape == (2, 24, 256)
    expected = cross_entropy(
        logits[..., :vocabulary].transpose(1, 2), labels, reduction="none", ignore_index=IGNORE
    )
    losses = model(tokens, positions, None, labels=labels)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)
    assert not losses[labels == IGNORE].any() and losses[labels != IGNORE].all()
    grads = [torch.autograd.grad(x.sum(), model.parameters()) for x in (losses, expected)]
    for found, right in zip(*grads, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-11)
    # And logits again after losses: the switch is set anew by every forward.
    assert model(tokens, positions, None).equal(logits)


def test_dropout_of_the_embeddings_is_that_of_the_residual_unless_it_is_given() -> None:
    for given, found in ((None, 0.2), (0.0, 0.0), (0.1, 0.1)):
        (model,) = build({"hidden_dropout": 0.2, "embedding_dropout": given, **PHI}, {})
        assert model.embedding.embedding_dropout.p == found
        assert all(layer.hidden_dropout == 0.2 for layer in model.decoder.layers)


def test_losses_of_a_bfloat16_model_are_float32() -> None:
    (model,) = build({}, {}, torch.bfloat16)
    tokens, positions, labels = inputs()
    losses = model(tokens, positions, None, labels=labels)
    assert losses.dtype == torch.float32
    # More than the 8 bits of bfloat16: they do not survive a round trip.
    assert (losses.bfloat16().float() != losses)[labels != IGNORE].float().mean() > 0.9


# The same model on every layout.

MODELS = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    # TP 4 gives the last rank columns 288 to 383 of 257: none that counts.
    "empty rank": {"vocab_size": 257, "num_query_groups": 4, "qkv_bias": False, "qk_norm": False},
}
LAYOUTS = {
    "TP2+SPxPP2": {"tensor": 2, "sequence": True, "pipeline": 2},
    "PP2+VPP2": {"pipeline": 2, "virtual_pipeline": 2},
    "TP4": {"tensor": 4},
}
PAIRS = [
    ("untied", "TP2+SPxPP2"),
    ("tied", "TP2+SPxPP2"),
    ("untied", "PP2+VPP2"),
    ("empty rank", "TP4"),
]


def weights_of(pairs: list[tuple[str, str]]) -> list[Any]:
    """This rank's shards of the initial weights, for every model and layout."""
    return [shards(build(MODELS[model], LAYOUTS[layout])) for model, layout in pairs]


def losses_under_tp4() -> np.ndarray:
    (model,) = build(MODELS["empty rank"], LAYOUTS["TP4"])
    tokens, positions, labels = inputs()
    losses = model(tokens, positions, None, labels=labels)
    losses.sum().backward()
    return losses.detach().numpy()


def on_four_ranks() -> tuple[list[Any], np.ndarray]:
    return weights_of(PAIRS), losses_under_tp4()


def test_initial_weights_are_the_same_on_every_layout_and_an_empty_rank_does_no_harm() -> None:
    ranks = run_distributed(on_four_ranks, 4)
    for number, (name, layout) in enumerate(PAIRS):
        expected = gather([shards(build(MODELS[name], {}))])
        found = gather([weights[number] for weights, _ in ranks])
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert np.array_equal(found[key], value), (name, layout, key)
    (model,) = build(MODELS["empty rank"], {})
    tokens, positions, labels = inputs()
    expected = model(tokens, positions, None, labels=labels).detach().numpy()
    for _, losses in ranks:
        np.testing.assert_allclose(losses, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("changes", [{}, PHI], ids=["llama", "phi"])
def test_initial_weights_follow_megatrons_rule_and_differ_by_layer(changes: dict[str, Any]) -> None:
    weights = gather([shards(build({"num_layers": 8, "hidden_size": 128, **changes}, {}))])
    std = MODEL["init_method_std"]
    for name, value in weights.items():
        if name.endswith("bias"):
            assert (value == 0).all(), name
        elif "layernorm" in name or "layer_norm" in name:
            assert (value == 1).all(), name
        else:
            scaled = "linear_proj" in name or "linear_fc2" in name
            if "word_embeddings" in name or "output_layer" in name:
                value, padding = np.split(value, [MODEL["vocab_size"]])
                assert padding.shape[0] == 106 and not padding.any(), name
            # 6,144 numbers at least: five standard errors.
            assert value.std() == pytest.approx(std / (4 if scaled else 1), rel=0.05), name
    layers = [weights[f"{i}.decoder.layers.mlp.linear_fc1.weight"] for i in range(8)]
    assert not any(np.array_equal(layers[0], layer) for layer in layers[1:])


# Windows run without context parallelism.


class _FusedAttention(torch.nn.Module):
    """Stands for TransformerEngine's attention, which keeps a context-parallel group of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.set_context_parallel_group("group", [0, 1], "stream", "all_gather")

    def set_context_parallel_group(self, group: Any, ranks: Any, stream: Any, kind: str) -> None:
        self.cp_group, self.cp_global_ranks = group, ranks
        self.cp_stream, self.cp_comm_type = stream, kind


class _Chunk(torch.nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.rotary_pos_emb, self.rotary_pos_emb_alone = torch.nn.ReLU(), torch.nn.GELU()
        self.attention = _FusedAttention()


def test_context_parallelism_comes_back_whatever_happens_inside() -> None:
    from types import SimpleNamespace

    config = SimpleNamespace(context_parallel_size=2)
    chunks: list[Any] = [_Chunk(config), _Chunk(config)]

    def state() -> list[Any]:
        return [config.context_parallel_size] + [
            (
                c.rotary_pos_emb,
                c.rotary_pos_emb_alone,
                c.attention.cp_group,
                c.attention.cp_comm_type,
            )
            for c in chunks
        ]

    before = state()
    for _ in range(2):
        with pytest.raises(KeyError), without_context_parallel(chunks):
            assert config.context_parallel_size == 1
            for chunk, (rotary, alone, _, _) in zip(chunks, before[1:], strict=True):
                assert (chunk.rotary_pos_emb, chunk.rotary_pos_emb_alone) == (alone, rotary)
                assert chunk.attention.cp_group is None
            raise KeyError
        assert state() == before
