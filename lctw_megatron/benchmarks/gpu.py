"""On GPUs: how fast. What must be right there is tested by tests/gpu."""

import gc
import inspect
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lctw_megatron.benchmarks.attention import attention_benchmark, time_kernels
from lctw_megatron.benchmarks.checkpointing import time_checkpoints
from lctw_megatron.benchmarks.chip import matmul_tflops
from lctw_megatron.benchmarks.fp8 import time_fp8
from lctw_megatron.benchmarks.full_size import (
    time_full_size,
    time_full_size_scoring,
    time_full_size_state,
)
from lctw_megatron.benchmarks.head import head_benchmark
from lctw_megatron.benchmarks.large_model import time_deterministic, time_packed, time_steps
from lctw_megatron.benchmarks.overlap import time_overlap
from lctw_megatron.benchmarks.profile import profile_step
from lctw_megatron.benchmarks.results import Results
from lctw_megatron.benchmarks.scaling import time_scaling
from lctw_megatron.benchmarks.scoring_gpu import time_scorers, time_scoring
from lctw_megatron.config.layout_rules import loss_block_rows
from lctw_megatron.config.schema import LayoutConfig
from lctw_megatron.errors import InputError
from lctw_megatron.platform.capabilities import capabilities
from lctw_megatron.platform.world import default_device, shut_down


def time_head(results: dict[str, Any]) -> None:
    """The loss of 32,768 tokens over Llama 3's vocabulary and over SmolLM2's (of half as many on a
    card where the 64 GiB of full logits are too much), in blocks of 1,024 rows and in those that a
    GPU has by default."""
    tokens = 32768 if torch.cuda.get_device_properties(0).total_memory > 100 * 2**30 else 16384
    for hidden, vocabulary in ((2048, 128256), (576, 49152)):
        for rows in (1024, loss_block_rows(LayoutConfig(), vocabulary, "cuda")):
            results[f"head of {vocabulary}, blocks of {rows}"] = head_benchmark(
                tokens, hidden, vocabulary, torch.device("cuda"), torch.bfloat16, block_rows=rows
            )


def time_attention(results: dict[str, Any]) -> None:
    """Attention inside documents beside a dense mask."""
    results["attention with documents"] = attention_benchmark(
        16384, 32, 8, 64, 8, torch.device("cuda"), torch.bfloat16
    )


PARTS: dict[str, Callable[[dict[str, Any]], None]] = {
    "steps": time_steps,
    "packed": time_packed,
    "deterministic": time_deterministic,
    "overlap": time_overlap,
    "profile": profile_step,
    "head": time_head,
    "documents": time_attention,
    "kernels": time_kernels,
    "scoring": time_scoring,
    "scorers": time_scorers,
    "checkpoints": time_checkpoints,
    "scaling": time_scaling,
    "full_size": time_full_size,
    "full_size_scoring": time_full_size_scoring,
    "full_size_state": time_full_size_state,
    "fp8": time_fp8,
}
"""Name -> what adds its numbers to the results."""


def gpu_benchmark(output: Path, only: list[str]) -> int:
    """Measure all PARTS (or ``only`` those named); print each number, and write all to ``output``,
    as soon as it is there; of several ranks the first prints and writes.

    A part that fails does not keep the others from running; the exit status is then 1.
    """
    if unknown := [name for name in only if name not in PARTS]:
        raise InputError(f"--only {' '.join(unknown)}: no such part; there are: {', '.join(PARTS)}")
    if not capabilities().gpu:
        raise InputError("benchmark gpu: torch sees no GPU; run it on a machine that has one")
    torch.cuda.set_device(default_device())
    failed, first = False, os.environ.get("RANK", "0") == "0"
    results = Results(output, first)
    results["machine"] = capabilities().line()
    results["bf16 matmul TFLOP/s"] = matmul_tflops()
    for name in only or PARTS:
        start = time.perf_counter()
        if first:
            what = (inspect.getdoc(PARTS[name]) or "").partition("\n\n")[0]
            print(f"[{name}: {' '.join(what.split())}]", flush=True)
        try:
            PARTS[name](results)
        except Exception as error:
            traceback.print_exc()
            results[name] = {"error": f"{type(error).__name__}: {error}"[:500]}
            failed = True
        gc.collect()  # a trainer's parts refer to each other: 30 GiB that the next part may need
        torch.cuda.empty_cache()
        if first:
            print(f"[{name}: {time.perf_counter() - start:.1f} s]", flush=True)
    shut_down()
    return int(failed)
