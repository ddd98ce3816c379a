"""Small runs with the sizes that GPU kernels want: heads of 64, sequences of 512."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lctw_megatron.config.schema import RunConfig
from tests.data.small_data import write_sidecar, write_tokens
from tests.distributed import run_distributed

NCCL = "cpu:gloo,cuda:nccl"
SEQUENCE, WINDOW, STRIDE = 512, 128, 96
VOCABULARY = 1000

MODEL: dict[str, Any] = dict(
    num_layers=4, hidden_size=256, ffn_hidden_size=512, num_attention_heads=4, num_query_groups=2,
    vocab_size=VOCABULARY, init_method_std=0.05,
)  # fmt: skip

ENGINES: dict[str, tuple[str, str]] = {
    "ours fp32": ("sdpa", "fp32"),
    "ours bf16": ("sdpa", "bf16"),
    "TransformerEngine bf16": ("te", "bf16"),
}
"""Name: model.attention, training.precision."""

WEIGHTINGS: dict[str, dict[str, Any]] = {
    "uniform": {"scheme": "uniform"},
    "dense frozen": {"scheme": "dense", "interpolation": 0.25, "mode": "frozen"},
    "sparse self": {"scheme": "sparse", "keep_fraction": 0.2, "mode": "self"},
    "longce self": {"scheme": "longce", "max_weight": 3.0, "mode": "self"},
}


def make_data(folder: Path) -> str:
    """Documents of 2 to 1,500 tokens with a short_loss sidecar of random numbers."""
    rng = np.random.default_rng(5)
    prefix = str(folder / "tokens")
    documents = []
    for length in [1500, 2, 700, *rng.integers(2, 1500, 40)]:
        # Half of the tokens repeat what stood before, so that there is something to learn.
        tokens = rng.integers(3, VOCABULARY, length)
        tokens[length // 2 :] = tokens[: length - length // 2]
        documents.append(tokens)
    dataset = write_tokens(
        prefix, documents, vocab_size=VOCABULARY, bos_id=1, eos_id=2, add_bos=True, add_eos=True
    )
    short_losses = []
    for length in dataset.lengths:
        values = rng.gamma(4.0, 2.0, length)
        values[:WINDOW] = np.nan
        short_losses.append(values)
    write_sidecar(dataset, short_losses, window=WINDOW, stride=STRIDE, min_context=WINDOW - STRIDE)
    return prefix


def make_run(
    prefix: str,
    folder: str,
    engine: str,
    layout: dict[str, Any],
    packing: str,
    weighting: str,
    **training: Any,
) -> RunConfig:
    attention, precision = ENGINES[engine]
    layout = dict(layout)
    megatron, more = layout.pop("megatron", {}), layout.pop("model", {})
    weights = dict(WEIGHTINGS[weighting])
    if weighting != "uniform":
        weights |= {"window": WINDOW, "stride": STRIDE, "tokens_per_forward": 1024}
    values: dict[str, Any] = dict(
        steps=3, global_batch_size=8, micro_batch_size=2, precision=precision, lr=3e-4,
        warmup_steps=0, clip_grad=0.0, tensorboard=False, eval_sequences=5,
    )  # fmt: skip
    data = {"train": [prefix], "validation": [prefix], "sequence_length": SEQUENCE}
    return RunConfig.model_validate(
        {
            "name": "gpu",
            "run_dir": folder,
            "seed": 7,
            "data": data | {"packing": packing},
            "model": MODEL | {"attention": attention} | more,
            "layout": layout,
            "megatron": megatron,
            "weighting": weights,
            "training": values | training,
        }
    )


Case = tuple[str, dict[str, Any], str, str]
"""engine, layout (and fields of `megatron` and `model`), packing, weighting"""


def trainings(prefix: str, folder: str, cases: list[Case]) -> list[dict[str, Any]]:
    """Three steps and a validation of every case by the real trainer, on these ranks."""
    from lctw_megatron.training.loop import Trainer

    answers = []
    for number, case in enumerate(cases):
        trainer = Trainer(make_run(prefix, f"{folder}/{number}", *case))
        try:
            steps = [trainer.stepper.step(n, list(trainer.loader.step(n))) for n in range(3)]
            answers.append({"metrics": steps, "validation": trainer.evaluate()})
        finally:
            trainer.close()
    return answers


def train(prefix: str, folder: Path, ranks: int, cases: list[Case]) -> list[dict[str, Any]]:
    """``trainings`` on so many GPUs."""
    return on_gpus(trainings, ranks, prefix, str(folder / f"{ranks}"), cases)[0]


def on_gpus(function: Callable[..., Any], ranks: int, *arguments: Any) -> list[Any]:
    """``function(*arguments)`` of every rank, each on a GPU of its own."""
    return run_distributed(function, ranks, *arguments, timeout=500.0, backend=NCCL)


def engines() -> list[Any]:
    """The names of ENGINES as parameters of a test."""
    return [
        pytest.param(name, marks=[pytest.mark.engine] if "Engine" in name else [])
        for name in ENGINES
    ]


def logged(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without speed and memory."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if not k.startswith(("speed/", "memory/"))} for line in lines
    ]
