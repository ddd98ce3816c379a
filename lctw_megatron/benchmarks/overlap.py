"""A uniform step under fields of megatron-core's own configs: what overlapped communication gains,
and weight gradients that are added to their sums by their products."""

from typing import Any

from lctw_megatron.benchmarks.large_model import LARGE, WEIGHTINGS
from lctw_megatron.benchmarks.steps import step_benchmark
from lctw_megatron.config.schema import RunConfig
from lctw_megatron.platform.world import started_ranks


def time_overlap(results: dict[str, Any]) -> None:
    """A step of all ranks, one sequence each, under each setting beside the first. On one GPU there
    is nothing to overlap.

    `torchrun --nproc-per-node 2 tools/benchmark.py gpu --only overlap`
    """
    ranks = started_ranks()
    settings: dict[str, dict[str, Any]] = {"nothing overlapped": {"ddp": _overlap(False, False)}}
    if ranks > 1:
        settings["gradients overlapped"] = {"ddp": _overlap(True, False)}
        settings["gradients and weights overlapped"] = {"ddp": _overlap(True, True)}
    apart = {"transformer": {"gradient_accumulation_fusion": False}}
    settings["weight gradients apart"] = {"ddp": _overlap(False, False)} | apart
    first = None
    for name, megatron in settings.items():
        training = LARGE["training"] | {"global_batch_size": ranks}
        run = RunConfig.model_validate(LARGE | {"training": training, "megatron": megatron})
        row = step_benchmark(run, {"uniform": WEIGHTINGS["uniform"]}, repeats=5)["uniform"]
        first = first or row["seconds"]
        row["time_ratio"] = row["seconds"] / first
        results[f"step, {ranks} ranks, {name}"] = row


def _overlap(gradients: bool, weights: bool) -> dict[str, bool]:
    return {"overlap_grad_reduce": gradients, "overlap_param_gather": weights}
