"""Llama-3-8B's shape over all GPUs of a host: how fast under which layout, a rank's memory beside
the estimate's; what weighting, scoring and saving cost at that size."""

import subprocess
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from lctw_megatron.benchmarks.checkpointing import checkpoint_benchmark
from lctw_megatron.benchmarks.chip import data_sheet_tflops
from lctw_megatron.benchmarks.large_model import WEIGHTINGS
from lctw_megatron.benchmarks.scaling import measured, run_of
from lctw_megatron.benchmarks.scoring_gpu import WINDOW, scorer_speed
from lctw_megatron.config.load import load_fragment
from lctw_megatron.config.model_sizes import forward_tokens
from lctw_megatron.config.schema import ModelConfig, RunConfig
from lctw_megatron.platform.world import started_ranks
from lctw_megatron.training.estimate import GIB, estimate

RECOMPUTED = ("none", "mlp", "full")
"""From the fastest on; the first whose estimate leaves a tenth of the GPU free is measured."""


def time_full_size(results: dict[str, Any]) -> None:
    """A uniform step at 32k and at 128k tokens under each layout, in as little recomputation as
    fits; and at 32k under one of them a step of 4 sequences under each weighting.

    A step has 8 sequences of 32k, a quarter of the recipe's: of one alone the gradients' reduction
    and the optimizer, once a step, would take a share that no training pays. It has one of 128k,
    where no pipeline is measured: its stages would want many.
    """
    gpus = torch.cuda.device_count()
    if gpus < 4 or started_ranks() > 1:
        results["full size"] = (
            f"needs 4 or 8 GPUs and no torchrun; {gpus} GPUs, {started_ranks()} ranks"
        )
        return
    memory = torch.cuda.get_device_properties(0).total_memory
    for name, run in plan(gpus, memory):
        if run is None:
            results[name] = "does not fit, by the estimate"
        elif rows := _tried(results, name, gpus, run, ("uniform",)):
            estimated = {"estimated_gib": estimate(run, gpus).largest.total / GIB}
            results[name] = rows["uniform"] | estimated
    name, run = weighted_plan(gpus, memory)
    if run is not None:
        for weighting, row in _tried(results, name, gpus, run, tuple(WEIGHTINGS)).items():
            results[f"{name}, {weighting}"] = row


def time_full_size_scoring(results: dict[str, Any]) -> None:
    """Windows of 8,192 tokens through a frozen 8B scorer on every GPU, in the time of the slowest.

    `torchrun --nproc-per-node 8 tools/benchmark.py gpu --only full_size_scoring`
    """
    model, number = ModelConfig.model_validate(_model()), 64
    size = forward_tokens(model, "cuda")
    row = scorer_speed(model, [size], number)[size]
    if (ranks := started_ranks()) > 1:
        slowest = torch.tensor(number * WINDOW / row["tokens_per_second"], device="cuda")
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        own = row["tokens_per_second"]
        row["tokens_per_second"] = ranks * number * WINDOW / slowest.item()
        row["tflops_per_second"] *= row["tokens_per_second"] / own
        row["utilisation"] = row["tflops_per_second"] / ranks / data_sheet_tflops()
    results[f"scoring 8B, {ranks} ranks, {size:,} tokens a forward"] = row


def time_full_size_state(results: dict[str, Any]) -> None:
    """What saving an 8B's weights and optimizer costs its training at 32k: three saves of 112 GB,
    two on the disk at once, a load and 7 steps.

    `torchrun --nproc-per-node 8 tools/benchmark.py gpu --only full_size_state`
    """
    ranks = started_ranks()
    if ranks < 4:
        results["full size state"] = f"needs torchrun on 4 or 8 GPUs; {ranks} ranks"
        return
    memory = torch.cuda.get_device_properties(0).total_memory
    name, run = weighted_plan(ranks, memory, sequences=1)
    if run is None:
        results["full size state"] = "does not fit, by the estimate"
        return
    for part, row in checkpoint_benchmark(run, 3):
        results[f"{name}, {part}"] = row


def plan(gpus: int, memory: int) -> Iterator[tuple[str, RunConfig | None]]:
    """A name and what to run on ``gpus`` of ``memory`` bytes each; None if nothing fits."""
    for length, sequences in ((32768, 8), (131072, 1)):
        for layout in layouts(gpus):
            if sequences > 1 or "PP" not in layout:
                yield least_recomputed(gpus, memory, layout, length, sequences)


def weighted_plan(gpus: int, memory: int, sequences: int = 4) -> tuple[str, RunConfig | None]:
    """The layout under which weightings and saves are measured: all that there is but stages."""
    return least_recomputed(gpus, memory, f"TP{gpus // 2}xCP2", 32768, sequences)


def least_recomputed(
    gpus: int, memory: int, layout: str, length: int, sequences: int
) -> tuple[str, RunConfig | None]:
    """A name and the run of ``layout`` that recomputes the least of those that fit; None if none
    does."""
    name = f"8B at {length:,} tokens, {layout}"
    for recompute in RECOMPUTED:
        run = run_of(layouts(gpus)[layout] | {"recompute": recompute}, sequences, length, _model())
        if estimate(run, gpus).largest.total <= 0.9 * memory:
            return f"{name}, recompute {recompute}", run
    return name, None


def layouts(gpus: int) -> dict[str, dict[str, Any]]:
    """The ways to share one model and one sequence over ``gpus``."""
    half = gpus // 2
    return {
        f"TP{gpus}": {"tensor": gpus, "sequence": True},
        f"TP{half}xCP2": {"tensor": half, "sequence": True, "context": 2},
        f"CP{gpus}": {"context": gpus},
        f"TP2xCP{half}": {"tensor": 2, "sequence": True, "context": half},
        f"PP2xTP{half}": {"pipeline": 2, "tensor": half, "sequence": True},
    }


def _model() -> dict[str, Any]:
    return load_fragment("model", "llama3_8b", "the benchmark")


def _tried(
    results: dict[str, Any], name: str, gpus: int, run: RunConfig, weightings: tuple[str, ...]
) -> dict[str, dict[str, Any]]:
    try:
        return measured(gpus, run, weightings)
    except subprocess.CalledProcessError as error:
        results[name] = f"failed with status {error.returncode}, see above"
        return {}
