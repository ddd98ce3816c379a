"""A Llama of 1.24 B parameters at 32k tokens: steps under each weighting, and their kernels."""

from typing import Any

import torch

from lctw_megatron.benchmarks.chip import data_sheet_tflops
from lctw_megatron.benchmarks.steps import StepBench, step_benchmark
from lctw_megatron.config.schema import RunConfig
from lctw_megatron.platform.gpu import use_deterministic_kernels

LARGE: dict[str, Any] = {
    "name": "large", "run_dir": "none",
    "data": {"train": [], "sequence_length": 32768},
    "model": {  # Llama 3.2 1B, with heads of 128 as all larger Llamas have, not of 64
        "num_layers": 16, "hidden_size": 2048, "ffn_hidden_size": 8192, "num_attention_heads": 16,
        "num_query_groups": 4, "vocab_size": 128256, "rope_theta": 500000.0,
        "tie_word_embeddings": True,
    },
    "layout": {"recompute": "mlp"},
    "training": {
        "steps": 1, "global_batch_size": 1, "micro_batch_size": 1, "precision": "bf16",
    },
}  # fmt: skip

WEIGHTINGS: dict[str, dict[str, Any]] = {
    "uniform": {"scheme": "uniform"},
    "frozen dense": {
        "scheme": "dense", "interpolation": 0.75, "window": 8192, "stride": 6144,
    },
    "self-scoring dense": {
        "scheme": "dense", "interpolation": 0.75, "mode": "self", "window": 8192, "stride": 6144,
        "tokens_per_forward": 32768,
    },
}  # fmt: skip


def time_steps(results: dict[str, Any]) -> None:
    """A step under each weighting, and with nothing recomputed, beside the chip's data sheet."""
    steps = step_benchmark(RunConfig.model_validate(LARGE), WEIGHTINGS, repeats=3)
    everything_kept = RunConfig.model_validate(LARGE | {"layout": {}})
    uniform = {"nothing recomputed": WEIGHTINGS["uniform"]}
    steps |= step_benchmark(everything_kept, uniform, repeats=3)
    for name, row in steps.items():
        row["utilisation"] = row["tflops_per_second"] / data_sheet_tflops()
        results[f"step {name}"] = row


def time_deterministic(results: dict[str, Any]) -> None:
    """What `training.deterministic` costs: a uniform step with it over one without."""
    run, uniform = RunConfig.model_validate(LARGE), {"uniform": WEIGHTINGS["uniform"]}
    seconds = {}
    try:
        for wanted in (False, True):
            use_deterministic_kernels(wanted)
            seconds[wanted] = step_benchmark(run, uniform, repeats=3)["uniform"]["seconds"]
    finally:
        use_deterministic_kernels(False)
    results["step deterministic"] = {
        "seconds": seconds[True],
        "time_ratio": seconds[True] / seconds[False],
    }


def profile_step(results: dict[str, Any]) -> None:
    """The kernels of one uniform step that take most of its time."""
    run = RunConfig.model_validate(LARGE)
    bench = StepBench(run)
    stepper = bench.stepper(WEIGHTINGS["uniform"])
    batches = bench.batches()
    stepper.step(0, batches)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        stepper.step(0, batches)
        torch.cuda.synchronize()
    events = sorted(profile.key_averages(), key=lambda e: -e.self_device_time_total)
    total = sum(event.self_device_time_total for event in events)
    results["profile"] = {
        "total ms": total / 1e3,
        "kernels": [
            f"{100 * e.self_device_time_total / total:5.1f} %  {e.count:5d} x  {e.key[:100]}"
            for e in events[:25]
        ],
    }
