"""What saving costs a training, in the background and not; and loading again."""

import itertools
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from lctw_megatron.benchmarks.large_model import LARGE
from lctw_megatron.benchmarks.steps import StepBench
from lctw_megatron.config.schema import RunConfig
from lctw_megatron.platform.peak_memory import peak_memory_bytes
from lctw_megatron.platform.world import first_rank_decides, started_ranks


def time_checkpoints(results: dict[str, Any]) -> None:
    """A save in 5 steps of all ranks, one sequence each: three saves of all (17 GB each, two on the
    disk at once), a load and 11 steps.

    `torchrun --nproc-per-node 2 tools/benchmark.py gpu --only checkpoints`
    """
    ranks = started_ranks()
    training = LARGE["training"] | {"global_batch_size": ranks}
    run = RunConfig.model_validate(LARGE | {"training": training})
    for name, row in checkpoint_benchmark(run, 5):
        results[f"checkpoints, {ranks} ranks, {name}"] = row


def checkpoint_benchmark(
    run: RunConfig, every: int, repeats: int = 1
) -> Iterator[tuple[str, dict[str, Any]]]:
    """A name and its numbers, each as soon as it is known: ``every`` optimizer steps without
    saving, a save alone, a load, and the steps with an asynchronous save asked for after the first
    of them; medians over ``repeats``. All ranks call it.

    `share_of_steps` is what of the time of ``every`` steps a save takes on top. Of an asynchronous
    one that is what the steps are slower; `waited_seconds` is what was then still to be written.
    `host_memory_grew_gib` is by how much this rank's peak of host memory grew since before the
    first save: on a GPU, whose training needs little, that of saves and loads.
    """
    from lctw_megatron.model.checkpoint import CheckpointManifest, read_manifest
    from lctw_megatron.training.checkpoint import CheckpointWriter, resume, run_state

    bench = StepBench(run)
    stepper = bench.stepper({"scheme": "uniform"})
    batches = bench.batches()
    folder = Path(first_rank_decides(tempfile.mkdtemp))
    writer = CheckpointWriter(folder, 1)
    numbers = itertools.count(1)

    def seconds(action: Callable[[], object]) -> float:
        start = time.perf_counter()
        action()
        if bench.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def step() -> None:
        stepper.step(0, batches)
        writer.finish(blocking=False)

    def steps() -> None:
        for _ in range(every):
            step()

    def save() -> None:
        manifest = CheckpointManifest(
            step=next(numbers), model=run.model, dtype=run.training.precision, optimizer=True
        )
        writer.save(run_state(bench.chunks, bench.optimizer), manifest)

    def steps_with_a_save() -> None:
        step()
        save()
        for _ in range(every - 1):
            step()

    def load() -> None:
        resume(checkpoint, read_manifest(checkpoint), bench.chunks, bench.optimizer)

    def grew() -> float:
        return (peak_memory_bytes() - before) / 2**30

    try:
        yield "first step", {"seconds": seconds(step)}  # compiles
        plain = statistics.median(seconds(steps) for _ in range(repeats))
        yield f"{every} steps", {"seconds": plain}
        before = peak_memory_bytes()
        free = first_rank_decides(lambda: shutil.disk_usage(folder).free)
        # Starts a process, and finds out who writes what.
        first = seconds(save)
        (checkpoint,) = first_rank_decides(lambda: sorted(folder.glob("step_*")))
        size = first_rank_decides(lambda: sum(f.stat().st_size for f in checkpoint.rglob("*")))
        yield (
            "first save",
            {
                "seconds": first,
                "gigabytes": size / 1e9,
                "gigabytes_free_before": free / 1e9,
                "host_memory_grew_gib": grew(),
            },
        )
        yield "load", {"seconds": seconds(load), "host_memory_grew_gib": grew()}
        saving = statistics.median(seconds(save) for _ in range(repeats))
        yield (
            "blocking save",
            {
                "seconds": saving,
                "share_of_steps": saving / plain,
                "host_memory_grew_gib": grew(),
            },
        )
        writer.asynchronous = True
        times = [(seconds(steps_with_a_save), seconds(writer.finish)) for _ in range(repeats)]
        with_save, waited = (statistics.median(found) for found in zip(*times, strict=True))
        yield (
            f"{every} steps with an asynchronous save",
            {
                "seconds": with_save,
                "share_of_steps": with_save / plain - 1,
                "waited_seconds": waited,
                "host_memory_grew_gib": grew(),
            },
        )
    finally:  # a rank that fails asks no other
        writer.close()
        if bench.world.is_first:
            shutil.rmtree(folder, ignore_errors=True)
