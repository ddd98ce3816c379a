"""How often the host waits for the GPU in a step: torch counts (torch.cuda.set_sync_debug_mode)."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from lctw_megatron.config.schema import RunConfig
from tests.gpu.runs import ENGINES, make_run

A_STEP = 16
"""Waits that a step may have however many micro batches it has: sums, gradient norm, optimizer."""


def waits(run: RunConfig) -> list[str]:
    """Where the host waited in a third step, when all kernels are compiled and buffers pinned."""
    from lctw_megatron.training.loop import Trainer

    trainer = Trainer(run)
    try:
        for step in range(2):
            trainer.stepper.step(step, list(trainer.loader.step(step)))
        batches = list(trainer.loader.step(2))
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                trainer.stepper.step(2, batches)
            finally:
                torch.cuda.set_sync_debug_mode("default")
    finally:
        trainer.close()
    found = [w for w in caught if "synchronizing CUDA operation" in str(w.message)]
    return [f"{Path(w.filename).name}:{w.lineno}" for w in found]


@pytest.mark.parametrize("packing", ["chunk", "pack"])
@pytest.mark.parametrize("weighting", ["uniform", "dense frozen", "longce self"])
def test_waits_do_not_grow_with_the_micro_batches(
    weighting: str, packing: str, prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = next(iter(ENGINES))
    found: dict[int, list[str]] = {}
    for batch in (2, 8):
        changes: dict[str, Any] = {"global_batch_size": batch}
        run = make_run(prefix, f"{tmp_path}/{batch}", engine, {}, packing, weighting, **changes)
        if "longce" in weighting:  # an interpolated weight is never 0
            weights = run.weighting.model_copy(update={"interpolation": 0.25})
            run = run.model_copy(update={"weighting": weights})
        found[batch] = waits(run)
    with capsys.disabled():
        print(f"\n{weighting}, {packing}: waits of 1 and 4 micro batches {found}", flush=True)
    assert len(found[8]) == len(found[2]), found
    assert len(found[2]) <= A_STEP, found
