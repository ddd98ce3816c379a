"""One optimizer step: score, forward and backward through the schedule, check, update.

The objective is the sum of weight * loss over the global batch divided by the number of its live
targets, and with experts what uneven routing costs, unweighted (model/router.py). Weights are
computed inside the loss function of the schedule, from the losses of the same forward pass, and
carry no gradient.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from lctw_megatron.config.schema import RunConfig
from lctw_megatron.data import zigzag
from lctw_megatron.model.device_batch import move
from lctw_megatron.model.gpt import without_dropout
from lctw_megatron.model.router import take_counts
from lctw_megatron.scoring.self_scoring import SelfScorer
from lctw_megatron.training.dropout_seed import seed_dropout
from lctw_megatron.training.metrics import StepSums
from lctw_megatron.training.nonfinite import NonFinite
from lctw_megatron.training.optimizer import clip_gradients, learning_rate, set_rates
from lctw_megatron.weighting.compute import compute_weights_and_counts
from lctw_megatron.weighting.occurrence import batch_occurrence_distance, sum_by_distance
from lctw_megatron.weighting.parse import Weighting, parse_weighting
from lctw_megatron.weighting.statistics import weight_statistics
from lctw_megatron.weighting.weighted_loss import weighted_sum

Batch = dict[str, Tensor]


class Stepper:
    """Runs optimizer steps of one run on this rank's part of the model."""

    def __init__(
        self, run: RunConfig, chunks: list[Any], optimizer: Any | None, bos_id: int | None
    ) -> None:
        """chunks: model chunks wrapped for data parallelism. optimizer: None to evaluate only."""
        self.run = run
        self.chunks = chunks
        self.optimizer = optimizer
        self.device = next(chunks[0].parameters()).device
        self.weighting = parse_weighting(run.weighting)
        self.context_group = parallel_state.get_context_parallel_group()
        self.data_rank = parallel_state.get_data_parallel_rank()
        self.data_size = parallel_state.get_data_parallel_world_size()
        self.counts_here = parallel_state.get_tensor_model_parallel_rank() == 0
        self.near = (
            run.training.near_distance
            or run.weighting.window
            or max(1, run.data.sequence_length // 4)
        )
        self.scorer: SelfScorer | None = None
        if run.weighting.mode == "self" and self.weighting.scheme.needs_short_loss:
            assert run.weighting.window and run.weighting.stride  # config/rules.py
            self.scorer = SelfScorer(
                chunks,
                run.weighting.window,
                run.weighting.stride,
                run.weighting.tokens_per_forward,
                bos_id,
                self.context_group,
            )

    def step(self, step: int, batches: list[Batch]) -> dict[str, float]:
        """Optimizer step ``step`` (0-based) on this rank's micro batches; the global metrics.

        Raises NonFinite on all ranks, before any weight is changed.
        """
        assert self.optimizer is not None
        sums = self.gradients(step, batches)
        metrics = sums.summary()
        self.optimizer.prepare_grads()
        norm = float(self.optimizer.get_grad_norm())
        if not (math.isfinite(metrics["loss/weighted"]) and math.isfinite(norm)):
            raise NonFinite(step, metrics["loss/weighted"], norm, self._gather_rows(sums, batches))
        rate = learning_rate(self.run.training, step)
        set_rates(self.optimizer, self.run.training, rate)
        clip_gradients(self.optimizer, norm, self.run.training.clip_grad)
        self.optimizer.step_with_ready_grads()
        return metrics | {"grad_norm": norm, "learning_rate": rate}

    def gradients(self, step: int, batches: list[Batch]) -> StepSums:
        """Score, forward and backward: the gradients of the objective, in the DDP buffers."""
        seed_dropout(self.run.seed, step)
        batches = [move(batch, self.device) for batch in batches]
        if self.scorer is not None:
            self.scorer.fill(batches)
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        if self.optimizer is not None:
            self.optimizer.zero_grad()
        return self._schedule(batches, self.weighting, forward_only=False)

    def evaluate(self, batches: list[Batch]) -> dict[str, float]:
        """Plain losses of micro batches, nothing weighted, dropout off."""
        uniform = parse_weighting({"scheme": "uniform"})
        moved = [move(batch, self.device) for batch in batches]
        with without_dropout(self.chunks), torch.no_grad():
            sums = self._schedule(moved, uniform, forward_only=True)
        return {k: v for k, v in sums.summary().items() if k.startswith(("loss/", "targets/"))}

    def _schedule(self, batches: list[Batch], weighting: Weighting, forward_only: bool) -> StepSums:
        """Run all micro batches through megatron-core's schedule; the sums of the global batch."""
        sums = StepSums(self.device)

        def forward_step(iterator: Iterator[tuple[int, Batch]], model: Any) -> Any:
            number, batch = next(iterator)
            losses = model(
                batch["tokens"],
                batch["position_ids"],
                batch.get("boundaries"),
                labels=batch["labels"],
                live_rows=batch["live_rows"],
                zero_gradients=weighting.gives_zeros,
            )
            return losses, lambda output: self._loss(output, number, batch, weighting, sums)

        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[enumerate(batches) for _ in self.chunks],
            model=self.chunks,
            num_microbatches=len(batches),
            seq_length=self.run.data.sequence_length,
            micro_batch_size=len(batches[0]["tokens"]),
            forward_only=forward_only,
        )
        sums.routing = take_counts(self.chunks, self.run.model, self.device)
        sums.all_reduce()
        return sums

    def _loss(
        self, losses: Tensor, number: int, batch: Batch, weighting: Weighting, sums: StepSums
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """losses [b, s] of this context rank, micro batch ``number`` -> (Σ w·l, targets, nothing).

        Three values with an integer count are what calculate_per_token_loss divides right; with two
        megatron-core multiplies by the context-parallel size (Megatron-LM#7452, #1764).
        """
        mask = batch["loss_mask"]
        weights, counts = compute_weights_and_counts(
            weighting,
            losses.detach(),
            batch.get("short_loss"),
            mask,
            self.context_group,
            batch.get("boundaries"),
        )
        total, targets = weighted_sum(losses, weights, mask)
        statistics = weight_statistics(weights, losses.detach(), mask, self.context_group)
        if self.counts_here:
            plain = losses.detach().double().where(mask != 0, 0.0)
            sums.row_losses[number] = plain.sum(1)
            sums.weighted_loss += total.detach().double()
            sums.plain_loss += plain.sum()
            sums.counts += torch.stack([count.double() for count in counts])
            sums.by_distance += sum_by_distance(plain, self._distance(batch), mask, self.near)
            sums.statistics += statistics
        return total, targets, {}

    def _gather_rows(self, sums: StepSums, batches: list[Batch]) -> list[tuple[int, int]]:
        """(rank, row of the global batch) of the sequences whose loss is not finite, of all
        ranks.
        """
        micro, data_rank = len(batches[0]["tokens"]), self.data_rank
        mine = [
            (dist.get_rank(), (number * self.data_size + data_rank) * micro + row)
            for number, losses in sums.row_losses.items()
            for row in torch.nonzero(~losses.isfinite()).flatten().tolist()
        ]
        everyones: list[list[tuple[int, int]]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyones, mine)
        return [row for rows in everyones for row in rows]

    def _distance(self, batch: Batch) -> Tensor:
        """How far back each target's token last occurred, [b, s] of this context rank."""
        distance = batch_occurrence_distance(
            batch["sequence_tokens"], batch["sequence_labels"], batch.get("device_boundaries")
        )
        group = self.context_group
        return zigzag.cut(distance, group.rank(), group.size(), dim=1)
