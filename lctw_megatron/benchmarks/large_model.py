"""A Llama of 1.24 B parameters at 32k tokens: steps under each weighting, packed, deterministic."""

from collections.abc import Callable
from functools import partial
from typing import Any

from lctw_megatron.benchmarks.chip import data_sheet_tflops
from lctw_megatron.benchmarks.measure import measure_in_turn
from lctw_megatron.benchmarks.steps import StepBench, step_benchmark
from lctw_megatron.config.schema import RunConfig
from lctw_megatron.platform.gpu import use_deterministic_kernels
from lctw_megatron.training.flops import forward_flops

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


def time_packed(results: dict[str, Any]) -> None:
    """A uniform step of packed documents, by the FLOPs that their attention needs, beside that of
    one document."""
    length, data = LARGE["data"]["sequence_length"], LARGE["data"] | {"packing": "pack"}
    bench = StepBench(RunConfig.model_validate(LARGE | {"data": data}))
    stepper = bench.stepper(WEIGHTINGS["uniform"])
    sizes = {"one document": [length]}
    sizes |= {f"documents of {n:,}": [n] * (length // n) for n in (8192, 4096, 2048, 1024)}
    sizes["documents of 500 to 16,000"] = [16000, 500, 6000, 1000, 2000, 4000, 700, 2500, 68]
    steps: list[Callable[[], object]] = [
        partial(stepper.step, 0, bench.batches(lengths)) for lengths in sizes.values()
    ]
    costs = measure_in_turn(steps, bench.device, 3)
    first = None
    for (name, lengths), cost in zip(sizes.items(), costs, strict=True):
        rate = 3 * forward_flops(bench.run.model, lengths, length) / cost.seconds / 1e12
        first = first or rate
        results[f"step packed, {name}"] = {
            "seconds": cost.seconds,
            "tokens_per_second": length / cost.seconds,
            "tflops_per_second": rate,
            "rate_ratio": rate / first,
        }


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
