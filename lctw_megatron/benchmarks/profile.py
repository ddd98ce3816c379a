"""Where the time of a training step goes, and what the same kernels do at their best."""

from typing import Any

from lctw_megatron.benchmarks.kernel_times import kernel_spans, longest_kernels, where_time_goes
from lctw_megatron.benchmarks.large_model import LARGE, WEIGHTINGS
from lctw_megatron.benchmarks.steps import StepBench
from lctw_megatron.config.schema import RunConfig
from lctw_megatron.training.flops import forward_flops, sequence_flops


def profile_step(results: dict[str, Any]) -> None:
    """A uniform step with nothing recomputed: its time by kind of kernel, at which rate, how long
    the GPU waits between kernels, and the kernels that take most.

    The rates are of the model's FLOPs, to be held against `bf16 matmul TFLOP/s` and
    `--only kernels`. The head's products are among the matrix products.
    """
    run = RunConfig.model_validate(LARGE | {"layout": {}})
    bench = StepBench(run)
    stepper, batches = bench.stepper(WEIGHTINGS["uniform"]), bench.batches()
    for _ in range(2):
        stepper.step(0, batches)
    length = run.data.sequence_length
    attention = sequence_flops(run.model, length) - 3 * length * forward_flops(run.model, [1], 1)
    work = {
        "attention": attention,
        "matrix products": sequence_flops(run.model, length) - attention,
    }
    spans = kernel_spans(lambda: stepper.step(0, batches))
    found = where_time_goes(spans)
    for kind, flops in work.items():
        row = found["kinds"][kind]
        row["tflops_per_second"] = round(flops / row["milliseconds"] / 1e9, 1)
    results["profile"] = found
    results["kernels of a step"] = longest_kernels(spans)
