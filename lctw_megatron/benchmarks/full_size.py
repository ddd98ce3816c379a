"""Llama-3-8B's shape over all GPUs of a host: how fast under which layout, and the memory that a
rank took beside the estimate's."""

import subprocess
from collections.abc import Iterator
from typing import Any

import torch

from lctw_megatron.benchmarks.scaling import measured
from lctw_megatron.config.schema import LayoutConfig, RunConfig
from lctw_megatron.platform.world import started_ranks
from lctw_megatron.training.estimate import GIB, estimate

LLAMA_8B: dict[str, Any] = {
    "num_layers": 32, "hidden_size": 4096, "ffn_hidden_size": 14336, "num_attention_heads": 32,
    "num_query_groups": 8, "vocab_size": 128256, "rope_theta": 500000.0,
}  # fmt: skip
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
    for length in (32768, 131072):
        for name, layout in layouts(gpus).items():
            name = f"8B at {length:,} tokens, {name}"
            for recompute in RECOMPUTED:
                run = run_of(layout | {"recompute": recompute}, length)
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


def run_of(layout: dict[str, Any], length: int) -> RunConfig:
    """A step of 8B under ``layout``."""
    stages = LayoutConfig.model_validate(layout).pipeline
    sequences = 8 if stages > 1 else 1
    return RunConfig.model_validate(
        {
            "name": "full_size",
            "run_dir": "none",
            "data": {"train": [], "sequence_length": length},
            "model": LLAMA_8B,
            "layout": layout,
            "training": {
                "steps": 1, "global_batch_size": sequences, "micro_batch_size": 1,
                "precision": "bf16",
            },
        }
    )  # fmt: skip
