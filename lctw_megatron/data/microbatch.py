"""From the samples of one data-parallel rank to the tensors of one context-parallel rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lctw_megatron.config.schema import DataConfig
from lctw_megatron.data import zigzag
from lctw_megatron.data.batch import Sample, collate, cut_batch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class BatchSlice:
    """Which part of each global batch is wanted."""

    micro_batch_size: int
    dp_rank: int = 0
    dp_size: int = 1
    cp_rank: int = 0
    cp_size: int = 1

    @property
    def sequences_at_once(self) -> int:
        """Sequences of one microbatch of all data-parallel ranks."""
        return self.micro_batch_size * self.dp_size

    def rows(self, microbatch: int) -> range:
        """The rows of the global batch in this rank's microbatch.

        Microbatch 0 of rank 0, of rank 1, ...; microbatch 1 of rank 0, ...: for any number of ranks
        all of them together make the same global batch.
        """
        first = (microbatch * self.dp_size + self.dp_rank) * self.micro_batch_size
        return range(first, first + self.micro_batch_size)


def make_microbatch(
    samples: Sequence[Sample], data: DataConfig, part: BatchSlice
) -> dict[str, Tensor]:
    """Collate, cut for context parallelism and, last of all, make tensors."""
    import torch

    batch = collate(samples, with_boundaries=data.packing == "pack")
    tensors = cut_batch(batch, part.cp_rank, part.cp_size)
    # Whole sequences too: self-scoring cuts them into windows, metrics look for occurrences.
    tensors |= {f"sequence_{name}": batch[name] for name in ("tokens", "labels")}
    return {name: torch.from_numpy(array) for name, array in tensors.items()}


def check_cut(data: DataConfig, cp_size: int) -> None:
    """Refuse at the start what ``zigzag.cut`` would refuse at the first batch."""
    zigzag.cut(np.empty(data.sequence_length, dtype=np.int8), 0, cp_size, dim=0)
