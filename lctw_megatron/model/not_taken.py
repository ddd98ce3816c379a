"""What a checkpoint holds and a model has no place for: megatron-core leaves it out silently."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lctw_megatron.errors import InputError, few

_OPTIMIZER = "optimizer."
"""How the names of an optimizer's tensors begin."""


def not_taken(shards: Sequence[Any], index: Any) -> list[str]:
    """Names of the stored tensors of which no rank asks for any part, weights first. All ranks call
    it.

    shards: the megatron-core ShardedTensors that this rank asks for, at least one. index: what
    ``check_files`` gave, the same on all ranks.
    """
    entries = index.state_dict_metadata.items()
    names = [name for name, entry in entries if hasattr(entry, "chunks")]
    names.sort(key=lambda name: (name.startswith(_OPTIMIZER), name))
    asked = {shard.key for shard in shards}
    # A rank asks for its pipeline stage and its part of the optimizer only.
    taken = torch.tensor([name in asked for name in names], dtype=torch.int32)
    taken = taken.to(shards[0].data.device)
    dist.all_reduce(taken, dist.ReduceOp.MAX)
    return [name for name, there in zip(names, taken.tolist(), strict=True) if not there]


def check_weights_taken(shards: Sequence[Any], checkpoint: Path, index: Any) -> None:
    """Refuse a checkpoint with weights of which no rank asks for any part; its optimizer may stay
    behind. Arguments as of ``not_taken``. All ranks call it. Raises InputError."""
    names = [name for name in not_taken(shards, index) if not name.startswith(_OPTIMIZER)]
    if names:
        raise InputError(
            f"{checkpoint}: holds {few(names)}, for which the model has no place; it is damaged "
            "or holds another model"
        )
