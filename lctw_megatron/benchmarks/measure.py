"""Time and peak memory of a function, on the CPU or on a GPU."""

import gc
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch


class Cost(NamedTuple):
    """What one call took."""

    seconds: float
    """Median over the repeats."""
    peak_bytes: int
    """Most memory held during a call beyond what was held before it."""


def measure(function: Callable[[], object], device: torch.device, repeats: int = 3) -> Cost:
    """Call ``function`` once to warm up, then ``repeats`` times."""
    return measure_in_turn([function], device, repeats)[0]


def measure_in_turn(
    functions: list[Callable[[], object]], device: torch.device, repeats: int = 3
) -> list[Cost]:
    """The same for several functions, taken in turn, so that a machine that slows down meanwhile
    slows all of them."""
    peaks = []
    for function in functions:  # the warm-up measures the memory
        gc.collect()
        peaks.append(_peak(function, device))
    seconds: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats):
        for times, function in zip(seconds, functions, strict=True):
            times.append(_seconds(function, device))
    return [
        Cost(statistics.median(times), peak) for times, peak in zip(seconds, peaks, strict=True)
    ]


def _seconds(function: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def _peak(function: Callable[[], object], device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    before = _resident()
    peak, done = before, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, _resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        function()
    finally:
        done.set()
        watcher.join()
    return peak - before


def _resident() -> int:
    """Bytes this process has in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096
