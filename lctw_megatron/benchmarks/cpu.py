"""On a CPU: the loss, steps under different weightings, attention in documents, sparse backward;
and what packed self-scoring computes, counted."""

from pathlib import Path
from typing import Any

import torch

from lctw_megatron.benchmarks.attention import attention_benchmark
from lctw_megatron.benchmarks.checkpointing import checkpoint_benchmark
from lctw_megatron.benchmarks.head import head_benchmark
from lctw_megatron.benchmarks.large_model import LARGE
from lctw_megatron.benchmarks.packed_windows import packed_windows_benchmark
from lctw_megatron.benchmarks.results import Results
from lctw_megatron.benchmarks.steps import step_benchmark
from lctw_megatron.config.schema import ModelConfig, RunConfig
from lctw_megatron.platform.capabilities import capabilities

STEP: dict[str, Any] = {
    "name": "step", "run_dir": "none",
    "data": {"train": [], "sequence_length": 2048},
    "model": {
        "num_layers": 4, "hidden_size": 256, "ffn_hidden_size": 704, "num_attention_heads": 4,
        "num_query_groups": 2, "vocab_size": 8192,
    },
    "training": {"steps": 1, "global_batch_size": 2, "micro_batch_size": 1},
}  # fmt: skip

WEIGHTINGS: dict[str, dict[str, Any]] = {
    "uniform": {"scheme": "uniform"},
    "frozen dense": {"scheme": "dense", "interpolation": 0.75, "window": 512, "stride": 384},
    "self-scoring dense": {
        "scheme": "dense", "interpolation": 0.75, "mode": "self", "window": 512, "stride": 384,
    },
}  # fmt: skip


def cpu_benchmark(output: Path, full_head: bool) -> int:
    """Measure everything; print each number and write all to ``output`` as soon as it is there."""
    device = torch.device("cpu")
    results = Results(output)
    results["machine"] = capabilities().line()
    results["threads"] = torch.get_num_threads()
    rows, hidden, vocabulary = (8192, 1024, 128256) if full_head else (2048, 512, 32000)
    results["head"] = head_benchmark(rows, hidden, vocabulary, device, torch.float32, repeats=3)
    results["attention with documents"] = attention_benchmark(
        4096, 4, 2, 64, 8, device, torch.float32
    )
    run = RunConfig.model_validate(STEP)
    model = ModelConfig.model_validate(LARGE["model"])
    for name, row in packed_windows_benchmark(model).items():
        results[name] = row
    for name, row in step_benchmark(run, WEIGHTINGS, repeats=9).items():
        results[f"step {name}"] = row
    one = RunConfig.model_validate(STEP | {"training": STEP["training"] | {"global_batch_size": 1}})
    for name, row in checkpoint_benchmark(one, 20, repeats=3):
        results[f"checkpoints, {name}"] = row
    return 0
