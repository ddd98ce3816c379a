"""What saving every 20 steps costs, in the background and not."""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from lctw_megatron.benchmarks.steps import StepBench, random_batches
from lctw_megatron.config.schema import RunConfig


def checkpoint_benchmark(run: RunConfig, every: int = 20, repeats: int = 3) -> dict[str, Any]:
    """Seconds of ``every`` optimizer steps without saving and with one save, as shares on top.

    The save is asked for after the first of the steps and completed within them, waiting for it at
    their end if need be. The three ways are taken in turn; medians over ``repeats``.
    """
    from lctw_megatron.model.checkpoint import CheckpointManifest
    from lctw_megatron.training.checkpoint import CheckpointWriter, run_state

    bench = StepBench(run)
    stepper = bench.stepper({"scheme": "uniform"})
    batches = random_batches(run)

    def seconds(writer: CheckpointWriter | None, number: int) -> float:
        start = time.perf_counter()
        for step in range(every):
            stepper.step(step, batches)
            if writer is None:
                continue
            if step == 0:
                manifest = CheckpointManifest(
                    step=number, model=run.model, dtype="fp32", optimizer=True
                )
                writer.save(run_state(bench.chunks, bench.optimizer), manifest)
            writer.finish(blocking=step == every - 1)
        return time.perf_counter() - start

    with tempfile.TemporaryDirectory() as folder:
        ways = {
            "without": None,
            "blocking": CheckpointWriter(Path(folder) / "blocking", 1),
            "asynchronous": CheckpointWriter(Path(folder) / "background", 1, asynchronous=True),
        }
        for writer in ways.values():  # the first save starts processes
            seconds(writer, 0)
        times: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(1, repeats + 1):
            for name, writer in ways.items():
                times[name].append(seconds(writer, number))
    median = {name: statistics.median(values) for name, values in times.items()}
    return {
        "seconds_without": median["without"],
        "blocking_share": median["blocking"] / median["without"] - 1,
        "asynchronous_share": median["asynchronous"] / median["without"] - 1,
    }
