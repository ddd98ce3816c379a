"""Optimizer steps under different weightings, on random tokens, beside their FLOPs."""

from typing import Any

import torch
from torch import Tensor

from lctw_megatron.benchmarks.measure import measure_in_turn
from lctw_megatron.config.schema import RunConfig
from lctw_megatron.model import spec
from lctw_megatron.training import flops


def random_batches(run: RunConfig, data_ranks: int = 1, seed: int = 0) -> list[dict[str, Tensor]]:
    """The micro batches of a step as the loader gives them to one of ``data_ranks`` (of one
    sequence unless the run says), one document a sequence, with made-up short losses.
    """
    rows, length = run.training.micro_batch_size or 1, run.data.sequence_length
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(run.training.global_batch_size // (rows * data_ranks)):
        text = torch.randint(run.model.vocab_size or 0, (rows, length + 1), generator=generator)
        tokens, labels = text[:, :-1].contiguous(), text[:, 1:].contiguous()
        short_loss = torch.rand(rows, length, generator=generator) * 12
        short_loss[:, : (run.weighting.window or 1) - 1] = float("nan")
        batches.append(
            {
                "tokens": tokens,
                "labels": labels,
                "loss_mask": torch.ones(rows, length),
                "position_ids": torch.arange(length).expand(rows, -1).contiguous(),
                "short_loss": short_loss,
                "sequence_tokens": tokens,
                "sequence_labels": labels,
            }
        )
    return batches


class StepBench:
    """One model and optimizer, stepped under any weighting."""

    def __init__(self, run: RunConfig) -> None:
        from lctw_megatron.model.gpt import build_model
        from lctw_megatron.platform.world import initialize
        from lctw_megatron.training.optimizer import build_optimizer, wrap_data_parallel

        self.run = run
        world = initialize(run.layout, run.seed)
        self.device, self.data_ranks = world.device, world.data_size
        self.chunks = build_model(
            run.model,
            run.layout,
            max_sequence_length=run.data.sequence_length,
            dtype=spec.DTYPES[run.training.precision],
            device=self.device,
            seed=run.seed,
            fields=run.megatron.transformer,
            kind=run.megatron.model,
        )
        self.wrapped = wrap_data_parallel(self.chunks, run.megatron.ddp)
        self.optimizer = build_optimizer(self.wrapped, run.training, run.megatron.optimizer)

    def stepper(self, weighting: dict[str, Any]) -> Any:
        from lctw_megatron.training.step import Stepper

        values = self.run.model_dump() | {"weighting": weighting}
        return Stepper(RunConfig.model_validate(values), self.wrapped, self.optimizer, None)


def step_benchmark(
    run: RunConfig, weightings: dict[str, dict[str, Any]], repeats: int = 3
) -> dict[str, dict[str, Any]]:
    """Seconds, peak memory, tokens/s and model FLOPs of a step under each weighting.

    The first is what the others' `time_ratio` and `flops_ratio` refer to.
    """
    bench = StepBench(run)
    batches = random_batches(run, bench.data_ranks)
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
    return results
