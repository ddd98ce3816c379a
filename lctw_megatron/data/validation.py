"""Validation batches: the same sequences every time, in the same order, without token weights."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from lctw_megatron.config.schema import DataConfig
from lctw_megatron.data.batch import Sample, assemble
from lctw_megatron.data.microbatch import BatchSlice, check_cut, make_microbatch
from lctw_megatron.data.sequence_source import open_sources
from lctw_megatron.data.sequences import evenly_spaced

if TYPE_CHECKING:
    from torch import Tensor


class ValidationLoader:
    """At most ``sequences`` of the sequences of ``data.validation``, one corpus after the other.

    They are evenly spaced. Iterating gives this rank's microbatches, like TokenLoader's, the same
    number on every rank; the rows that fill up the last ones are masked altogether.
    """

    def __init__(
        self,
        data: DataConfig,
        *,
        sequences: int,
        micro_batch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        cp_rank: int = 0,
        cp_size: int = 1,
        vocab_size: int | None = None,
        multiple: int = 1,
    ) -> None:
        """multiple: the number of microbatches is one of this."""
        self._slice = BatchSlice(micro_batch_size, dp_rank, dp_size, cp_rank, cp_size)
        check_cut(data, cp_size)
        self._data = data
        self.sources = open_sources(data.validation, data, vocab_size=vocab_size)
        self._ends = list(itertools.accumulate(len(source) for source in self.sources))
        self._chosen = evenly_spaced(self._ends[-1] if self._ends else 0, sequences)
        self._padding = assemble([], data.sequence_length, None)
        self._multiple = multiple

    def __len__(self) -> int:
        """Microbatches of one pass on every rank."""
        rounds = math.ceil(len(self._chosen) / self._slice.sequences_at_once / self._multiple)
        return rounds * self._multiple

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for microbatch in range(len(self)):
            samples = [self._row(row) for row in self._slice.rows(microbatch)]
            yield make_microbatch(samples, self._data, self._slice)

    def _row(self, row: int) -> Sample:
        if row >= len(self._chosen):
            return self._padding
        number = self._chosen[row]
        corpus = bisect.bisect_right(self._ends, number)
        source = self.sources[corpus]
        return source.read(number - (self._ends[corpus] - len(source)))
