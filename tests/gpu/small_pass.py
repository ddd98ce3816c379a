"""Losses and all gradients of one weighted forward and backward of a small model, to a file:
`python -m tests.gpu.small_pass PRECISION FILE`, on the GPU or, hidden from it, on the CPU."""

import sys
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from lctw_megatron.benchmarks.steps import StepBench
from lctw_megatron.config.schema import RunConfig
from lctw_megatron.model.device_batch import move

SMALL: dict[str, Any] = {
    "name": "small", "run_dir": "none", "seed": 11,
    "data": {"train": [], "sequence_length": 256},
    "model": {
        "num_layers": 4, "hidden_size": 256, "ffn_hidden_size": 512, "num_attention_heads": 4,
        "num_query_groups": 2, "vocab_size": 1000,
    },
    "weighting": {"scheme": "dense", "interpolation": 0.5, "window": 64},
}  # fmt: skip


def small_pass(precision: str) -> dict[str, np.ndarray]:
    training = {"steps": 1, "global_batch_size": 2, "micro_batch_size": 2, "precision": precision}
    run = RunConfig.model_validate(SMALL | {"training": training})
    bench = StepBench(run)
    for name, parameter in _named(bench):
        if parameter.dim() > 1:  # the benchmark's are another device's random numbers
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    batches = bench.batches()
    batch = move(batches[0], bench.device)
    with torch.no_grad():
        losses = bench.chunks[0](
            batch["tokens"], batch["position_ids"], None, labels=batch["labels"]
        )
    bench.stepper(SMALL["weighting"]).gradients(0, batches)
    result = {"losses": losses.float().cpu().numpy()}
    return result | {name: x.main_grad.float().cpu().numpy() for name, x in _named(bench)}


def _named(bench: StepBench) -> Iterator[tuple[str, Any]]:
    """The parameters. TransformerEngine's layers call the norm before a matrix by the matrix's
    name."""
    for name, parameter in bench.chunks[0].named_parameters():
        name = name.replace("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight")
        name = name.replace("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")
        yield name, parameter


if __name__ == "__main__":
    np.savez(sys.argv[2], **small_pass(sys.argv[1]))  # type: ignore[arg-type]
