"""The kernels that a GPU ran, by kind: what took the time, and what ran beside what."""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType

COMMUNICATION = "communication"

KINDS = {
    COMMUNICATION: r"nccl",
    "attention": r"fprop|bprop|flash|fmha|attention|dot_do_o|convert_dq",
    "matrix products": r"gemm|nvjet|cutlass|xmma|splitk|cublas",
    "optimizer": r"adam|multi_tensor|l2norm",
    "copies and zeros": r"memcpy|memset|copy_kernel|fill",
}
"""Of a kernel's name, the first that is found in it; all others are norms, rotary embedding,
activations and the loss."""


Span = tuple[float, float, str]
"""Begin and end of a kernel in microseconds, and its name."""


def kernel_spans(step: Callable[[], object]) -> list[Span]:
    """All kernels and copies of this rank's GPU during one ``step``."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    return [
        (event.time_range.start, event.time_range.end, event.name)
        for event in profile.events()
        if event.device_type == DeviceType.CUDA and event.time_range.end > event.time_range.start
    ]


def where_time_goes(spans: list[Span]) -> dict[str, Any]:
    """Of the time from the first kernel to the last: the share in which none ran, that in which
    nothing but communication did, and what each kind took. Kinds that run at once add up to more
    than the whole."""
    wall, busy = busy_time([span[:2] for span in spans])
    computing = [span[:2] for span in spans if kind_of(span[2]) != COMMUNICATION]
    return {
        "milliseconds": round(wall / 1e3, 1),
        "idle share": round(1 - busy / wall, 4),
        "communication alone": round((busy - covered(computing)) / wall, 4),
        "kinds": {
            kind: {"milliseconds": round(spent / 1e3, 1), "share": round(spent / wall, 3)}
            for kind, spent in sorted(by_kind(spans).items(), key=lambda item: -item[1])
        },
    }


def longest_kernels(spans: list[Span]) -> list[str]:
    """A line for each of the 30 kernels that take most."""
    wall, _ = busy_time([span[:2] for span in spans])
    names: dict[str, tuple[float, int]] = {}
    for begin, end, name in spans:
        spent, count = names.get(name, (0.0, 0))
        names[name] = spent + end - begin, count + 1
    return [
        f"{100 * spent / wall:5.1f} %  {count:5d} x  {kind_of(name):16}  {name[:90]}"
        for name, (spent, count) in sorted(names.items(), key=lambda item: -item[1][0])[:30]
    ]


def kind_of(kernel: str) -> str:
    found = (kind for kind, words in KINDS.items() if re.search(words, kernel, re.IGNORECASE))
    return next(found, "small kernels")


def by_kind(spans: list[Span]) -> dict[str, float]:
    """Spent by each kind, in the spans' unit."""
    spent: dict[str, float] = {}
    for begin, end, name in spans:
        spent[kind_of(name)] = spent.get(kind_of(name), 0.0) + end - begin
    return spent


def busy_time(spans: list[tuple[float, float]]) -> tuple[float, float]:
    """From the first begin to the last end, and how much of it some span covers."""
    return max(end for _, end in spans) - min(spans)[0], covered(spans)


def covered(spans: list[tuple[float, float]]) -> float:
    """How much time lies in at least one of the spans."""
    total, end = 0.0, float("-inf")
    for begin, stop in sorted(spans):
        total += max(0.0, stop - max(begin, end))
        end = max(end, stop)
    return total
