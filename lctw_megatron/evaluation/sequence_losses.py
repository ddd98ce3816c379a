"""What a model gives the targets of whole sequences, under any layout.

All ranks ask for the same sequences and all get the answer; inside, data-parallel ranks share them
out and context-parallel ranks hold zigzag parts. Sequences that leave here are whole, in numpy, so
whatever is computed from them needs to know of no layout.

Legend of shapes: n sequences, S tokens of a sequence, k values of a target.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from lctw_megatron.config.schema import DataConfig, LayoutConfig
from lctw_megatron.data import zigzag
from lctw_megatron.data.batch import Sample, assemble
from lctw_megatron.data.microbatch import BatchSlice, make_microbatch
from lctw_megatron.evaluation.sequence_weights import live_targets
from lctw_megatron.model.device_batch import move
from lctw_megatron.platform.world import World
from lctw_megatron.scoring.forward import hand_over

Batch = dict[str, Tensor]
Compute = Callable[[list[Batch]], list[Tensor] | None]
"""Values [k, b, S / CP] of each batch, on the last pipeline stage; None on the others."""

_ROUNDS = 4
"""Microbatches per pipeline stage that run at once: the more, the less the stages wait."""


class SequenceLosses:
    """Runs a model's chunks of this rank, wrapped for data parallelism or not, over sequences."""

    def __init__(
        self, chunks: list[Any], layout: LayoutConfig, world: World, tokens_per_forward: int
    ) -> None:
        """A forward takes as many sequences at once as fit into ``tokens_per_forward``."""
        self.chunks = chunks
        self.layout = layout
        self.world = world
        self.tokens_per_forward = tokens_per_forward

    def sequences_at_once(self, sequence_length: int) -> int:
        """How many sequences to ask for at a time, so that no rank waits."""
        per_rank = max(1, self.tokens_per_forward // sequence_length)
        return per_rank * self.world.data_size * self.layout.pipeline * _ROUNDS

    def losses_and_likeliest(self, samples: Sequence[Sample]) -> np.ndarray:
        """Float32 [2, n, S]: the loss of every target in nats, and 1 where no token is likelier, 0
        where one is; NaN where there is no target. A collective call; dropout is off in it."""
        from lctw_megatron.model.gpt import without_dropout

        with without_dropout(self.chunks):
            return self.gather(samples, lambda batches: self.forward(batches, True), kinds=2)

    def gather(self, samples: Sequence[Sample], compute: Compute, kinds: int = 1) -> np.ndarray:
        """Apply ``compute`` to this rank's batches, and put the ranks' parts together: float32
        [k, n, S] with k = ``kinds``, NaN where there is no target or no value."""
        world, length = self.world, len(samples[0].tokens)
        most = max(1, self.tokens_per_forward // length)
        rounds = -(-len(samples) // (most * world.data_size))
        if len(self.chunks) > 1:  # the interleaved schedule takes multiples of the stages
            rounds = -(-rounds // self.layout.pipeline) * self.layout.pipeline
        part = BatchSlice(
            # All of one size, and no more padding than that takes.
            -(-len(samples) // (rounds * world.data_size)),
            world.data_rank,
            world.data_size,
            world.context_rank,
            self.layout.context,
        )
        padding = assemble([], length, None)
        # Sequences of one piece, padded or not, need no document mask: attention is causal.
        packed = any(len(sample.documents) > 1 and sample.documents[1] >= 0 for sample in samples)
        data = DataConfig(train=[], sequence_length=length, packing="pack" if packed else "chunk")
        rows = [list(part.rows(microbatch)) for microbatch in range(rounds)]
        batches = [
            make_microbatch(
                [samples[row] if row < len(samples) else padding for row in chosen], data, part
            )
            for chosen in rows
        ]
        parts = compute([move(batch, world.device) for batch in batches])
        # Every target is known to one rank that counts: summing joins the parts.
        whole = torch.zeros((2, kinds, rounds * part.sequences_at_once, length))
        if parts is not None and world.tensor_rank == 0:
            columns = zigzag.cut(np.arange(length), part.cp_rank, part.cp_size, dim=0)
            place = torch.from_numpy(columns)
            for chosen, found in zip(rows, parts, strict=True):
                for at, row in enumerate(chosen):
                    values = found[:, at].float().cpu()
                    whole[0, :, row][:, place] = values.nan_to_num(posinf=math.inf)
                    whole[1, :, row][:, place] = values.isnan().float()
        dist.all_reduce(whole)
        values, unknown = whole[:, :, : len(samples)].numpy()
        return np.where((unknown > 0) | ~live_targets(samples), np.float32(np.nan), values)

    @torch.no_grad()
    def forward(self, batches: list[Batch], likeliest: bool = False) -> list[Tensor] | None:
        """The losses [1, b, S / CP] of each batch; with ``likeliest`` [2, b, S / CP]."""
        from megatron.core import parallel_state
        from megatron.core.pipeline_parallel import get_forward_backward_func

        def forward_step(iterator: Iterator[Batch], model: Any) -> Any:
            batch = next(iterator)
            output = model(
                batch["tokens"],
                batch["position_ids"],
                batch.get("boundaries"),
                labels=batch["labels"],
                live_rows=batch["live_rows"],
                likeliest=likeliest,
            )
            return output, hand_over

        losses = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(batches) for _ in self.chunks],
            model=self.chunks,
            num_microbatches=len(batches),
            # The schedule itself divides by the context-parallel ranks.
            seq_length=batches[0]["sequence_tokens"].shape[1],
            micro_batch_size=batches[0]["tokens"].shape[0],
            forward_only=True,
            collect_non_loss_data=True,
        )
        if not parallel_state.is_pipeline_last_stage(ignore_virtual=True):
            return None
        return losses if likeliest else [loss[None] for loss in losses]
