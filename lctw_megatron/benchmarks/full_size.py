"""Llama-3-8B's shape over all GPUs of a host: how fast under which layout, and the memory that a
rank took beside the estimate's."""

import subprocess
from collections.abc import Iterator
from typing import Any

import torch

from lctw_megatron.benchmarks.scaling import measured, run_of
from lctw_megatron.config.load import load_fragment
from lctw_megatron.config.schema import RunConfig
from lctw_megatron.platform.world import started_ranks
from lctw_megatron.training.estimate import GIB, estimate

RECOMPUTED = ("none", "mlp", "full")
"""From the fastest on; the first whose estimate leaves a tenth of the GPU free is measured."""


def time_full_size(results: dict[str, Any]) -> None:
    """A uniform step at 32k and at 128k tokens under each layout, in as little recomputation as
    fits; a sequence a step, or as many as keep the stages of a pipeline busy.
    """
    gpus = torch.cuda.device_count()
    if gpus < 4 or started_ranks() > 1:
        results["full size"] = (
            f"needs 4 or 8 GPUs and no torchrun; {gpus} GPUs, {started_ranks()} ranks"
        )
        return
    for name, run in plan(gpus, torch.cuda.get_device_properties(0).total_memory):
        if run is None:
            row: dict[str, Any] | str = "does not fit, by the estimate"
        else:
            try:
                row = measured(gpus, run)
                row["estimated_gib"] = estimate(run, gpus).largest.total / GIB
            except subprocess.CalledProcessError as error:
                row = f"failed with status {error.returncode}, see above"
        results[name] = row


def plan(gpus: int, memory: int) -> Iterator[tuple[str, RunConfig | None]]:
    """A name and what to run on ``gpus`` of ``memory`` bytes each; None if nothing fits."""
    model = load_fragment("model", "llama3_8b", "the benchmark")
    for length in (32768, 131072):
        for name, layout in layouts(gpus).items():
            name = f"8B at {length:,} tokens, {name}"
            sequences = 8 if "pipeline" in layout else 1
            for recompute in RECOMPUTED:
                run = run_of(layout | {"recompute": recompute}, sequences, length, model)
                if estimate(run, gpus).largest.total <= 0.9 * memory:
                    yield f"{name}, recompute {recompute}", run
                    break
            else:
                yield name, None


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
