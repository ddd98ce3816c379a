"""Where the time of a training step goes, and what the same kernels do at their best."""

import re
from typing import Any

import torch
from torch.autograd import DeviceType

from lctw_megatron.benchmarks.large_model import LARGE, WEIGHTINGS
from lctw_megatron.benchmarks.steps import StepBench
from lctw_megatron.config.schema import RunConfig
from lctw_megatron.training.flops import forward_flops, sequence_flops

KINDS = {
    "attention": r"fprop|bprop|flash|fmha|attention|dot_do_o|convert_dq",
    "matrix products": r"gemm|nvjet|cutlass|xmma|splitk|cublas",
    "optimizer": r"adam|multi_tensor|l2norm",
    "copies and zeros": r"memcpy|memset|copy_kernel|fill",
}
"""Of a kernel's name, the first that is found in it; all others are norms, rotary embedding,
activations and the loss."""


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
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        stepper.step(0, batches)
        torch.cuda.synchronize()
    spans = [
        (event.time_range.start, event.time_range.end, event.name)
        for event in profile.events()
        if event.device_type == DeviceType.CUDA and event.time_range.end > event.time_range.start
    ]
    milliseconds = by_kind(spans)
    wall, busy = busy_time([span[:2] for span in spans])
    length = run.data.sequence_length
    attention = sequence_flops(run.model, length) - 3 * length * forward_flops(run.model, [1], 1)
    work = {
        "attention": attention,
        "matrix products": sequence_flops(run.model, length) - attention,
    }
    results["profile"] = {
        "milliseconds": round(wall / 1e3, 1),
        "idle share": round(1 - busy / wall, 4),
        "kinds": {
            kind: {"milliseconds": round(spent / 1e3, 1), "share": round(spent / wall, 3)}
            | ({"tflops_per_second": round(work[kind] / spent / 1e6, 1)} if kind in work else {})
            for kind, spent in sorted(milliseconds.items(), key=lambda item: -item[1])
        },
    }
    names: dict[str, tuple[float, int]] = {}
    for begin, end, name in spans:
        spent, count = names.get(name, (0.0, 0))
        names[name] = spent + end - begin, count + 1
    results["kernels of a step"] = [
        f"{100 * spent / wall:5.1f} %  {count:5d} x  {kind_of(name):16}  {name[:90]}"
        for name, (spent, count) in sorted(names.items(), key=lambda item: -item[1][0])[:30]
    ]


def kind_of(kernel: str) -> str:
    found = (kind for kind, words in KINDS.items() if re.search(words, kernel, re.IGNORECASE))
    return next(found, "small kernels")


def by_kind(spans: list[tuple[float, float, str]]) -> dict[str, float]:
    """Spent by each kind, in the spans' unit."""
    spent: dict[str, float] = {}
    for begin, end, name in spans:
        spent[kind_of(name)] = spent.get(kind_of(name), 0.0) + end - begin
    return spent


def busy_time(spans: list[tuple[float, float]]) -> tuple[float, float]:
    """From the first begin to the last end, and how much of it some span covers."""
    first, covered, end = min(spans)[0], 0.0, min(spans)[0]
    for begin, stop in sorted(spans):
        covered += max(0.0, stop - max(begin, end))
        end = max(end, stop)
    return end - first, covered
