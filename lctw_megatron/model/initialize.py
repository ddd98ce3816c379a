"""Random weights that are the same under every layout."""

import hashlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lctw_megatron.config.schema import ModelConfig


def sharded_parameters(chunks: list[Any]) -> Iterator[tuple[str, Any]]:
    """(global name, megatron-core ShardedTensor) of every parameter shard of this rank.

    A name is the checkpoint's, with the layer's number in front for stacked layers. The shard's
    data is a view of the parameter, so that writing to it writes the parameter.
    """
    for _, name, shard in parameter_shards(chunks):
        yield name, shard


def parameter_shards(chunks: list[Any]) -> Iterator[tuple[Any, str, Any]]:
    """The same with the parameter in front; one that is stored in two comes twice."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    for chunk in chunks:
        for leaf in nested_values(chunk.sharded_state_dict(metadata=sharding())):
            parts = (
                nested_values(leaf.build()) if isinstance(leaf, ShardedTensorFactory) else [leaf]
            )
            for part in parts:
                if isinstance(part, ShardedTensor) and isinstance(part.data, Tensor):
                    axes = part.prepend_axis_num
                    layer = ".".join(str(i) for i in part.global_offset[:axes])
                    yield leaf.data, (f"{layer}.{part.key}" if axes else part.key), part


def sharding() -> dict[str, Any]:
    """The metadata for megatron-core's sharded state dict of a model. A new dict each time:
    megatron-core puts process groups into the one it is given."""
    return {"distrib_optim_sharding_type": "fully_reshardable"}


def initialize_weights(chunks: list[Any], model: ModelConfig, seed: int) -> None:
    """Fill the parameters: normal(0, init_method_std), output projections scaled by 1/sqrt(2
    layers) (Megatron-LM's), norms 1, biases 0, padding rows of the vocabulary 0.

    Every rank draws the whole tensor from a CPU generator seeded by (seed, name) and takes its
    part: layout-independent, at the price of about 10 ns for every parameter of the rank's layers.
    """
    for name, shard in sharded_parameters(chunks):
        axes = shard.prepend_axis_num
        shape = shard.global_shape[axes:]
        if name.endswith("bias"):
            value = torch.zeros(shape)
        elif "norm" in name:
            value = torch.ones(shape)
        else:
            digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
            std = model.init_method_std
            if "linear_proj" in name or "linear_fc2" in name:
                std /= math.sqrt(2 * model.num_layers)
            value = torch.empty(shape).normal_(0, std, generator=generator)
            if "word_embeddings" in name or "output_layer" in name:
                value[model.vocab_size :] = 0
        own = tuple(
            slice(offset, offset + length)
            for offset, length in zip(shard.global_offset[axes:], shard.local_shape, strict=True)
        )
        with torch.no_grad():
            shard.data.copy_(value[own].view(shard.data.shape))
