"""HybridModel's layers, and what a checkpoint calls them."""

from typing import Any

import pytest
import torch

from lctw_megatron.config.schema import LayoutConfig, ModelConfig
from lctw_megatron.model.initialize import sharding
from lctw_megatron.platform.megatron_version import MEGATRON
from lctw_megatron.platform.world import initialize
from tests.training.layouts import MODEL, needs_hybrid

pytestmark = needs_hybrid


def build(kind: Any, **layout: Any) -> Any:
    from lctw_megatron.model.gpt import build_model

    sizes = LayoutConfig(**layout)
    world = initialize(sizes, 1)
    (chunk,) = build_model(
        ModelConfig.model_validate(MODEL), sizes, max_sequence_length=64, dtype=torch.float64,
        device=world.device, seed=3, kind=kind,
    )  # fmt: skip
    return chunk


def leaves(state: dict[str, Any]) -> dict[Any, Any]:
    """(name, place) -> shape, of all that a sharded state dict would store."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    parts = [
        part
        for leaf in nested_values(state)
        for part in (
            nested_values(leaf.build()) if isinstance(leaf, ShardedTensorFactory) else [leaf]
        )
    ]
    return {
        (part.key, tuple(part.global_offset)): tuple(part.global_shape)
        for part in parts
        if hasattr(part, "key")
    }


def test_the_pattern_has_two_layers_for_one_and_a_bar_between_stages() -> None:
    from lctw_megatron.model.hybrid import layer_pattern

    model = ModelConfig.model_validate(MODEL)
    assert layer_pattern(model, LayoutConfig()) == "*-*-*-*-"
    stages = LayoutConfig(pipeline=2, virtual_pipeline=2)
    assert layer_pattern(model, stages) == "*-|*-|*-|*-"


def test_recomputed_are_whole_layers_of_the_model() -> None:
    config = build("hybrid", recompute="full").config
    assert (config.num_layers, config.recompute_num_layers) == (8, 2)


def test_a_checkpoint_has_gptmodels_names_and_shapes() -> None:
    states = [build(kind).sharded_state_dict(metadata=sharding()) for kind in ("gpt", "hybrid")]
    expected, found = map(leaves, states)
    assert found == expected and len(found) > 40


@pytest.mark.skipif(MEGATRON < (0, 19), reason="gpt_checkpoint_interop came with 0.19")
def test_upstreams_hybridmodel_finds_these_names_too() -> None:
    """Its translation of its own names gives those that are stored here."""
    from megatron.core.dist_checkpointing import gpt_checkpoint_interop as interop
    from megatron.core.models.hybrid.hybrid_block import HybridStack
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    chunk = build("hybrid")
    expected = leaves(chunk.sharded_state_dict(metadata=sharding()))
    chunk.decoder.__class__, chunk.__class__ = HybridStack, HybridModel
    state = chunk.sharded_state_dict(metadata=sharding())
    assert not leaves(state).keys() <= expected.keys()
    maps = interop.gpt_compatible_layer_maps(chunk.hybrid_layer_pattern)
    interop.retarget_sharded_state_dict_to_gpt_checkpoint(state, maps)
    assert leaves(state) == expected
