"""Helpers of the layout tests: one forward and backward, or three steps, of a tiny run under any
layout.

Gradients come back as float64 numpy arrays in the one-process layout, keyed by checkpoint name.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lctw_megatron.config.schema import RunConfig
from lctw_megatron.data.loader import TokenLoader
from lctw_megatron.data.manifest import TokenizerIdentity
from lctw_megatron.data.sidecar import SidecarWriter
from lctw_megatron.data.token_dataset import TokenDataset, TokenWriter
from lctw_megatron.platform.megatron_version import MEGATRON

needs_hybrid = pytest.mark.skipif(
    MEGATRON < (0, 18), reason=f"megatron-core {'.'.join(map(str, MEGATRON))} has no HybridModel"
)
KINDS = ["gpt", pytest.param("hybrid", marks=needs_hybrid)]
"""Values of megatron.model."""

SEQUENCE, WINDOW, STRIDE = 64, 16, 12
VOCABULARY = 150  # not a multiple of 128: padding columns, unevenly over TP ranks

MODEL = dict(
    num_layers=4, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2,
    vocab_size=VOCABULARY, init_method_std=0.2, qkv_bias=True, qk_norm=True,
)  # fmt: skip

SCHEMES: dict[str, dict[str, Any]] = {
    "uniform": {"scheme": "uniform"},
    "dense": {"scheme": "dense", "interpolation": 0.25},
    "sparse": {"scheme": "sparse", "keep_fraction": 0.2},
    "longce": {"scheme": "longce", "max_weight": 3.0},
    # lambda 1: plain cross-entropy, whatever the scheme
    "dense, all uniform": {"scheme": "dense", "interpolation": 1.0},
    "sparse, all uniform": {"scheme": "sparse", "keep_fraction": 0.2, "interpolation": 1.0},
    "longce, all uniform": {"scheme": "longce", "max_weight": 3.0, "interpolation": 1.0},
    # less than one target of a sequence
    "sparse, one kept": {"scheme": "sparse", "keep_fraction": 1e-4},
}


def make_data(folder: Path) -> str:
    """A token dataset with a short_loss sidecar of random numbers; documents of 2 to 150 tokens."""
    rng = np.random.default_rng(5)
    prefix = str(folder / "tokens")
    tokenizer = TokenizerIdentity(
        kind="sentencepiece", path="none", digest="0", vocab_size=VOCABULARY,
        bos_id=1, eos_id=2, add_bos=True, add_eos=True,
    )  # fmt: skip
    with TokenWriter(prefix, tokenizer) as writer:
        for length in [150, 2, 70, *rng.integers(2, 150, 40)]:
            writer.add(rng.integers(3, VOCABULARY, length).astype(np.uint16))
    dataset = TokenDataset(prefix)
    details = dict(
        window=WINDOW, stride=STRIDE, sequence_length=None, score_first_window=False,
        min_context=4, mean_context=8.0, scorer={},
    )  # fmt: skip
    with SidecarWriter(dataset, "short_loss", **details) as writer:
        for length in dataset.lengths:
            values = rng.gamma(2.0, 2.0, length).astype(np.float32)
            values[:WINDOW] = np.nan
            values[rng.random(length) < 0.05] = np.nan
            writer.add(values)
    return prefix


def make_run(
    prefix: str, folder: str, layout: dict[str, Any], packing: str, scheme: str, mode: str,
    **changes: Any,
) -> RunConfig:  # fmt: skip
    weighting = dict(SCHEMES[scheme])
    if scheme != "uniform":
        weighting |= {"mode": mode, "window": WINDOW, "stride": STRIDE, "tokens_per_forward": 64}
    training = dict(
        steps=3, global_batch_size=8, micro_batch_size=2, lr=1e-3, warmup_steps=0, clip_grad=0.0,
        tensorboard=False, eval_sequences=5,
    ) | changes.pop("training", {})  # fmt: skip
    return RunConfig.model_validate(
        {
            "name": "layout",
            "run_dir": folder,
            "seed": 7,
            "data": {
                "train": [{"prefix": prefix}],
                "validation": [{"prefix": prefix}],
                "sequence_length": SEQUENCE,
                "packing": packing,
            },
            "model": MODEL | changes.pop("model", {}),
            "layout": layout,
            "weighting": weighting,
            "training": training,
        }
        | changes
    )


def one_pass(
    run: RunConfig,
    dtype: torch.dtype = torch.float64,
    change: Callable[[list[dict[str, torch.Tensor]]], None] = lambda batches: None,
) -> dict[str, Any]:
    """Forward and backward of the first global batch in ``dtype``; metrics and this rank's
    gradients. ``change`` may change this rank's micro batches before.
    """
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )

    from lctw_megatron.config.schemes import needs_short_loss
    from lctw_megatron.model.gpt import build_model
    from lctw_megatron.platform.world import initialize
    from lctw_megatron.training.step import Stepper

    world = initialize(run.layout, run.seed)
    chunks = build_model(
        run.model, run.layout, max_sequence_length=run.data.sequence_length, dtype=dtype,
        device=world.device, seed=run.seed, kind=run.megatron.model,
    )  # fmt: skip
    config = chunks[0].config
    # Not the distributed optimizer's sharded buffers: every rank sees whole gradients.
    wrapped = [
        DistributedDataParallel(config, DistributedDataParallelConfig(), chunk, index > 0)
        for index, chunk in enumerate(chunks)
    ]
    config.finalize_model_grads_func = finalize_model_grads
    loader = TokenLoader(
        run.data, seed=run.seed, global_batch_size=run.training.global_batch_size,
        micro_batch_size=run.training.micro_batch_size, dp_rank=world.data_rank,
        dp_size=world.data_size, cp_rank=world.context_rank, cp_size=run.layout.context,
        scores=run.weighting.mode == "frozen" and needs_short_loss(run.weighting.scheme),
    )  # fmt: skip
    stepper = Stepper(run, wrapped, None, bos_id=1)
    batches = list(loader.step(0))
    change(batches)
    sums = stepper.gradients(0, batches)
    loader.close()
    for chunk in chunks:  # the weights have done their duty: put the gradients in their place
        for parameter in chunk.parameters():
            parameter.data.copy_(parameter.main_grad)
    return {"metrics": sums.summary(), "gradients": shards(chunks)}


def three_steps(run: RunConfig) -> dict[str, Any]:
    """All optimizer steps of ``run``, three if nothing else was said, by the real trainer in
    float32; its metrics, the plain losses of five held-out sequences (which no layout's batches
    divide evenly) and the trained weights."""
    from lctw_megatron.training.loop import Trainer

    trainer = Trainer(run)
    try:
        steps = range(run.training.steps)
        metrics = [trainer.stepper.step(n, list(trainer.loader.step(n))) for n in steps]
        validation = trainer.evaluate()
        return {"metrics": metrics, "validation": validation, "weights": shards(trainer.chunks)}
    finally:
        trainer.close()


def shards(chunks: list[Any]) -> list[tuple[str, tuple, tuple, np.ndarray]]:
    """(name, global shape, offset, array) of this rank's shards of the parameters."""
    from lctw_megatron.model.initialize import sharded_parameters

    result = []
    for name, shard in sharded_parameters(chunks):
        axes = shard.prepend_axis_num  # the layer's number, already in the name
        array = shard.data.detach().double().cpu().numpy().reshape(shard.local_shape).copy()
        shape, offset = shard.global_shape[axes:], shard.global_offset[axes:]
        result.append((name, tuple(shape), tuple(offset), array))
    return result


def gather(ranks: list[list[tuple[str, tuple, tuple, np.ndarray]]]) -> dict[str, np.ndarray]:
    """The shards of all ranks put together; copies of one shard must be equal."""
    whole: dict[str, np.ndarray] = {}
    for rank in ranks:
        for name, shape, offset, array in rank:
            target = whole.setdefault(name, np.full(shape, np.nan))
            where = tuple(slice(o, o + n) for o, n in zip(offset, array.shape, strict=True))
            old = target[where]
            known = ~np.isnan(old)
            if known.any():
                np.testing.assert_allclose(old[known], array[known], rtol=1e-6, atol=1e-9)
            target[where] = array
    for name, array in whole.items():
        assert not np.isnan(array).any(), name
    return whole


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference over the largest expected value."""
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-30))


Case = tuple[dict[str, Any], str, str, str]
"""layout, packing, scheme, mode"""


def passes(prefix: str, folder: str, cases: list[Case], kind: str = "gpt") -> list[dict[str, Any]]:
    """``one_pass`` of every case, one after the other on these ranks."""
    return [one_pass(make_run(prefix, folder, *case, megatron={"model": kind})) for case in cases]


def variants(
    prefix: str,
    folder: str,
    layouts: dict[str, list[dict[str, Any]]],
    models: dict[str, Any],
    kind: str = "gpt",
) -> dict[str, list[dict[str, Any]]]:
    """``one_pass`` of each of ``models`` (what differs from MODEL) under its layouts, packed,
    scored by its own windows."""
    return {
        name: [
            one_pass(
                make_run(
                    prefix,
                    folder,
                    layout,
                    "pack",
                    "dense",
                    "self",
                    model=models[name],
                    megatron={"model": kind},
                )
            )
            for layout in own
        ]
        for name, own in layouts.items()
    }


def trainings(
    prefix: str, folder: str, cases: list[Case], kind: str = "gpt"
) -> list[dict[str, Any]]:
    """``three_steps`` of every case, one after the other on these ranks."""
    return [
        three_steps(make_run(prefix, f"{folder}/{number}", *case, megatron={"model": kind}))
        for number, case in enumerate(cases)
    ]
