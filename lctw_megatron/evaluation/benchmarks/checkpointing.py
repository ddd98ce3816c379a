"""What saving every 20 steps costs, asynchronously and not."""

import tempfile
import time
from pathlib import Path
from typing import Any

from lctw_megatron.config.schema import RunConfig
from lctw_megatron.evaluation.benchmarks.steps import StepBench, random_batches


def checkpoint_benchmark(run: RunConfig, steps: int = 40, every: int = 20) -> dict[str, Any]:
    """Seconds of ``steps`` optimizer steps without saving and with, as shares on top."""
    from lctw_megatron.model.checkpoint import CheckpointManifest
    from lctw_megatron.training.checkpoint import CheckpointWriter, run_state

    bench = StepBench(run)
    stepper = bench.stepper({"scheme": "uniform"})
    batches = random_batches(run, 1)

    def seconds(writer: CheckpointWriter | None) -> float:
        start = time.perf_counter()
        for step in range(steps):
            stepper.step(step, batches)
            if writer is not None and (step + 1) % every == 0:
                manifest = CheckpointManifest(
                    step=step + 1, model=run.model, dtype="fp32", optimizer=True
                )
                writer.save(run_state(bench.chunks, bench.optimizer), manifest)
            if writer is not None:
                writer.finish(blocking=False)
        if writer is not None:
            writer.finish()
        return time.perf_counter() - start

    with tempfile.TemporaryDirectory() as folder:
        seconds(None)
        plain = min(seconds(None), seconds(None))
        blocking = seconds(CheckpointWriter(Path(folder) / "sync", keep_last=1))
        background = seconds(CheckpointWriter(Path(folder) / "async", 1, asynchronous=True))
    return {
        "seconds without": plain,
        "blocking share": blocking / plain - 1,
        "asynchronous share": background / plain - 1,
    }
