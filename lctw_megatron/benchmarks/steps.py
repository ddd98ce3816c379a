"""Optimizer steps under different weightings, on random tokens, beside their FLOPs."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lctw_megatron.benchmarks.kernel_times import kernel_spans, where_time_goes
from lctw_megatron.benchmarks.measure import measure_in_turn
from lctw_megatron.config.schema import ModelConfig, RunConfig
from lctw_megatron.data.batch import PieceData, Sample, assemble, usable_scores
from lctw_megatron.data.microbatch import BatchSlice, make_microbatch
from lctw_megatron.model import spec
from lctw_megatron.training import flops


class StepBench:
    """One model and optimizer, stepped under any weighting."""

    def __init__(self, run: RunConfig) -> None:
        from lctw_megatron.model.gpt import build_model
        from lctw_megatron.platform.world import initialize
        from lctw_megatron.training.optimizer import build_optimizer, wrap_data_parallel

        self.run = run
        self.world = initialize(run.layout, run.seed)
        self.device = self.world.device
        self.chunks = build_model(
            run.model,
            run.layout,
            max_sequence_length=run.data.sequence_length,
            dtype=spec.DTYPES[run.training.precision],
            device=self.device,
            seed=None,
            packed=run.data.packing == "pack",
            fields=run.megatron.transformer,
            kind=run.megatron.model,
        )
        draw_weights(self.chunks, run.model)
        self.wrapped = wrap_data_parallel(self.chunks, run.megatron.ddp)
        self.optimizer = build_optimizer(self.wrapped, run.training, run.megatron.optimizer)

    def batches(self, documents: Sequence[int] | None = None) -> list[dict[str, Tensor]]:
        """The micro batches (of one sequence unless the run says) of this rank's part of a step, as
        the loader gives them: random tokens with made-up short losses, one document a sequence, or
        ``documents`` of so many tokens.
        """
        run, world, random = self.run, self.world, np.random.default_rng(0)
        length, vocabulary = run.data.sequence_length, run.model.vocab_size or 0

        def piece(number: int, length: int) -> PieceData:
            short_loss = (random.random(length) * 12).astype(np.float32)
            scores = usable_scores(short_loss, run.weighting.window or 1, False)
            return PieceData(number, 0, random.integers(vocabulary, size=length + 1), scores)

        def sample() -> Sample:
            return assemble([piece(*x) for x in enumerate(documents or [length])], length, None)

        samples = [sample() for _ in range(run.training.global_batch_size)]
        rows = run.training.micro_batch_size or 1
        ranks = world.data_rank, world.data_size, world.context_rank, run.layout.context
        part = BatchSlice(rows, *ranks)
        return [
            make_microbatch([samples[row] for row in part.rows(number)], run.data, part)
            for number in range(len(samples) // part.sequences_at_once)
        ]

    def stepper(self, weighting: dict[str, Any]) -> Any:
        from lctw_megatron.training.step import Stepper

        values = self.run.model_dump() | {"weighting": weighting}
        return Stepper(RunConfig.model_validate(values), self.wrapped, self.optimizer, None)


def draw_weights(chunks: list[Any], model: ModelConfig) -> None:
    """Random weights where they lie. build_model's own are the same under every layout, at the
    price of 80 s for 8B. Norms and biases are set."""
    for weight in (w for chunk in chunks for w in chunk.parameters() if w.dim() > 1):
        torch.nn.init.normal_(weight, std=model.init_method_std)


def step_benchmark(
    run: RunConfig,
    weightings: dict[str, dict[str, Any]],
    repeats: int = 3,
    profiled: bool = False,
) -> dict[str, dict[str, Any]]:
    """Seconds, peak memory, tokens/s and model FLOPs of a step under each weighting; ``profiled``:
    and what this rank's GPU did in one more.

    The first is what the others' `time_ratio` and `flops_ratio` refer to.
    """
    bench = StepBench(run)
    batches = bench.batches()
    steppers = {name: bench.stepper(weighting) for name, weighting in weightings.items()}
    costs = measure_in_turn(
        [lambda s=stepper: s.step(0, batches) for stepper in steppers.values()],  # type: ignore
        bench.device,
        repeats,
    )
    results: dict[str, dict[str, Any]] = {}
    tokens = run.training.global_batch_size * run.data.sequence_length
    for (name, stepper), cost in zip(steppers.items(), costs, strict=True):
        work = flops.step_flops(stepper.run)
        results[name] = {
            "seconds": cost.seconds,
            "peak_gib": cost.peak_bytes / 2**30,
            "tokens_per_second": tokens / cost.seconds,
            "model_tflops": work / 1e12,
            "tflops_per_second": work / cost.seconds / 1e12,
        }
        first = results[next(iter(weightings))]
        results[name]["time_ratio"] = cost.seconds / first["seconds"]
        results[name]["flops_ratio"] = results[name]["model_tflops"] / first["model_tflops"]
        if profiled:
            spans = kernel_spans(lambda s=stepper: s.step(0, batches))  # type: ignore
            results[name]["profile"] = where_time_goes(spans)
    return results
