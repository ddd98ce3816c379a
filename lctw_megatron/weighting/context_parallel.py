"""Whole sequences from the parts that context-parallel ranks hold, and back.

Weights are computed on whole sequences by every rank of the group alike, which makes them equal bit
for bit on every layout and keeps the schemes free of communication. The price: one all-gather of
the streams, 12 bytes a target in float32 (1.5 MiB for a sequence of 128k tokens), and O(S log S)
arithmetic that every rank repeats. One layer's keys and values are about a thousand times that.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lctw_megatron.data.zigzag import cut, join


def whole_sequences(
    streams: Sequence[Tensor], group: dist.ProcessGroup | None
) -> tuple[Tensor, ...]:
    """Streams of this rank's part, each [sequences, part], as [sequences, targets].

    All streams must have one dtype and shape; they travel together. Without a group, or in a group
    of one, the streams themselves.
    """
    size = dist.get_world_size(group) if group is not None else 1
    if size == 1:
        return tuple(streams)
    own = torch.stack(tuple(streams))
    parts = [torch.empty_like(own) for _ in range(size)]
    dist.all_gather(parts, own, group=group)
    return join(parts, dim=2).unbind()


def own_part(stream: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """This rank's part [sequences, part] of a whole stream [sequences, targets]."""
    if group is None:
        return stream
    return cut(stream, dist.get_rank(group), dist.get_world_size(group), dim=1)


def is_first(group: dist.ProcessGroup | None) -> bool:
    """Whether this rank is the one of its group that counts what all of them know."""
    return group is None or dist.get_rank(group) == 0
