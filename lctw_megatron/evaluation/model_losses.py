"""A checkpoint and the losses it gives the targets of whole sequences, under any layout.

All ranks ask for the same sequences and all get the answer; inside, data-parallel ranks share them
out and context-parallel ranks hold zigzag parts. Sequences that leave here are whole, in numpy, so
whatever is computed from them needs to know of no layout.

Legend of shapes: n sequences, S tokens of a sequence.
"""

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from lctw_megatron.config.layout_rules import check_model
from lctw_megatron.config.schema import DataConfig, LayoutConfig
from lctw_megatron.data import zigzag
from lctw_megatron.data.batch import IGNORE, Sample, assemble
from lctw_megatron.data.microbatch import BatchSlice, make_microbatch
from lctw_megatron.data.token_dataset import TokenDataset
from lctw_megatron.errors import InputError
from lctw_megatron.model import spec
from lctw_megatron.model.checkpoint import find_checkpoint, load_weights, read_manifest
from lctw_megatron.platform.world import initialize
from lctw_megatron.training.metrics import move

Batch = dict[str, Tensor]

_ROUNDS = 4
"""Microbatches per pipeline stage that run at once: the more, the less the stages wait."""


def check_data(checkpoint: str | Path, dataset: TokenDataset) -> None:
    """InputError, both sides named, if the model was trained with another tokenizer or does not
    know a token of ``dataset``. To be asked before the model is loaded."""
    checkpoint = find_checkpoint(checkpoint)
    manifest, tokenizer = read_manifest(checkpoint), dataset.manifest.tokenizer
    known = (manifest.tokenizer or {}).get("digest")
    if known and known != tokenizer.digest:
        raise InputError(
            f"{dataset.prefix} was tokenised with {tokenizer.path} (digest {tokenizer.digest}), "
            f"but {checkpoint} was trained with tokenizer {known}; preprocess with the checkpoint's"
        )
    dataset.check_fits(manifest.model.vocab_size or 0, str(checkpoint))


class ModelLosses:
    """The model of a checkpoint on this rank, dropout off, no gradients."""

    def __init__(
        self,
        checkpoint: str | Path,
        layout: LayoutConfig,
        sequence_length: int,
        tokens_per_forward: int = 16384,
    ) -> None:
        """checkpoint: as ``find_checkpoint`` takes it. sequence_length: the longest to come.

        A forward pass takes as many sequences at once as fit into ``tokens_per_forward``. Raises
        InputError for a missing or damaged checkpoint and a layout that does not fit.
        """
        from lctw_megatron.model.gpt import build_model

        self.checkpoint = find_checkpoint(checkpoint)
        self.manifest = read_manifest(self.checkpoint)
        if layout.virtual_pipeline:
            raise InputError(
                "layout.virtual_pipeline: an evaluation gains nothing from it; leave it out"
            )
        model = self.manifest.model
        check_model(model, layout)
        self.world = initialize(layout, seed=0)
        self.layout = layout
        self.tokens_per_forward = tokens_per_forward
        self.chunks = build_model(
            model,
            layout,
            max_sequence_length=sequence_length,
            dtype=spec.DTYPES.get(self.manifest.dtype, torch.float32),
            device=self.world.device,
            seed=None,
        )
        load_weights(self.chunks, self.checkpoint)
        for chunk in self.chunks:
            chunk.eval()

    def sequences_at_once(self, sequence_length: int) -> int:
        """How many sequences to ask for at a time, so that no rank waits."""
        per_rank = max(1, self.tokens_per_forward // sequence_length)
        return per_rank * self.world.data_size * self.layout.pipeline * _ROUNDS

    def losses(self, samples: Sequence[Sample]) -> np.ndarray:
        """Losses of the targets of ``samples``: float32 [n, S], nats; NaN where there is no target.

        A collective call. InputError if the model's loss of a target is not finite.
        """
        losses = self._gather(samples, self._long_losses)
        wrong = ~np.isfinite(losses) & _live(samples)
        if wrong.any():
            row, target = np.argwhere(wrong)[0]
            raise InputError(
                f"{self.checkpoint}: its loss of target {target} of a sequence from document "
                f"{samples[row].documents[0]} is {losses[row, target]}; evaluate an earlier "
                "checkpoint"
            )
        return losses

    def short_losses(
        self, samples: Sequence[Sample], window: int, stride: int, bos_id: int | None
    ) -> np.ndarray:
        """Losses under the last ``window`` tokens only: float32 [n, S], NaN where not scored.

        Windows and what they score are those of self-scoring in training: the first ``window``
        targets of a piece have none. A collective call.
        """
        from megatron.core import parallel_state

        from lctw_megatron.scoring.self_scoring import SelfScorer

        scorer = SelfScorer(
            self.chunks,
            window,
            stride,
            self.tokens_per_forward,
            bos_id,
            parallel_state.get_context_parallel_group(),
        )

        def compute(batches: list[Batch]) -> list[Tensor] | None:
            scorer.fill(batches)
            last = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
            return [batch["short_loss"] for batch in batches] if last else None

        return self._gather(samples, compute)

    def free(self) -> None:
        """Give the memory back, for another model."""
        self.chunks.clear()
        gc.collect()
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()

    def _gather(
        self, samples: Sequence[Sample], compute: Callable[[list[Batch]], list[Tensor] | None]
    ) -> np.ndarray:
        """Apply ``compute`` to this rank's batches, and put the ranks' parts together."""
        world, length = self.world, len(samples[0].tokens)
        most = max(1, self.tokens_per_forward // length)
        part = BatchSlice(
            min(most, -(-len(samples) // world.data_size)),
            world.data_rank,
            world.data_size,
            world.context_rank,
            self.layout.context,
        )
        per_round = part.sequences_at_once
        rounds = -(-len(samples) // per_round)
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
        whole = torch.zeros((2, rounds * per_round, length))
        if parts is not None and world.tensor_rank == 0:
            columns = zigzag.cut(np.arange(length), part.cp_rank, part.cp_size, dim=0)
            place = torch.from_numpy(columns)
            for chosen, losses in zip(rows, parts, strict=True):
                for row, values in zip(chosen, losses.float().cpu(), strict=True):
                    whole[0, row, place] = values.nan_to_num(posinf=math.inf)
                    whole[1, row, place] = values.isnan().float()
        dist.all_reduce(whole)
        values, unknown = whole[:, : len(samples)].numpy()
        return np.where((unknown > 0) | ~_live(samples), np.float32(np.nan), values)

    @torch.no_grad()
    def _long_losses(self, batches: list[Batch]) -> list[Tensor] | None:
        from megatron.core import parallel_state
        from megatron.core.pipeline_parallel import get_forward_backward_func

        def forward_step(iterator: Iterator[Batch], model: Any) -> Any:
            batch = next(iterator)
            output = model(
                batch["tokens"],
                batch["position_ids"],
                batch.get("boundaries"),
                labels=batch["labels"],
            )
            return output, _hand_over

        losses = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(batches)],
            model=self.chunks,
            num_microbatches=len(batches),
            # The schedule itself divides by the context-parallel ranks.
            seq_length=batches[0]["sequence_tokens"].shape[1],
            micro_batch_size=batches[0]["tokens"].shape[0],
            forward_only=True,
            collect_non_loss_data=True,
        )
        return losses if parallel_state.is_pipeline_last_stage(ignore_virtual=True) else None


def _hand_over(output: Tensor, non_loss_data: bool = False) -> Tensor:
    return output


def _live(samples: Sequence[Sample]) -> np.ndarray:
    """bool [n, S]: where there is a target."""
    return np.stack([sample.labels != IGNORE for sample in samples])
