"""What saving costs a training, in the background and not; and loading again."""

import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from lctw_megatron.benchmarks.large_model import LARGE
from lctw_megatron.benchmarks.steps import StepBench
from lctw_megatron.config.schema import RunConfig
from lctw_megatron.platform.peak_memory import peak_memory_bytes
from lctw_megatron.platform.world import first_rank_decides, started_ranks


def time_checkpoints(results: dict[str, Any]) -> None:
    """A save in 5 steps of all ranks, one sequence each.

    `torchrun --nproc-per-node 2 tools/benchmark.py gpu --only checkpoints`
    """
    ranks = started_ranks()
    training = LARGE["training"] | {"global_batch_size": ranks}
    run = RunConfig.model_validate(LARGE | {"training": training})
    results[f"checkpoint every 5 steps, {ranks} ranks"] = checkpoint_benchmark(run, 5, repeats=2)


def checkpoint_benchmark(run: RunConfig, every: int = 20, repeats: int = 3) -> dict[str, Any]:
    """Seconds of ``every`` optimizer steps without saving and with one save, as shares on top.

    The save is asked for after the first of the steps and completed within them, waiting for it at
    their end if need be. The three ways are taken in turn; medians over ``repeats``. Beside them a
    save and a load alone, the bytes of all ranks' files, and by how much this rank's peak of host
    memory grew (a save's own and a load's, on a GPU, whose training needs little).
    """
    from lctw_megatron.model.checkpoint import CheckpointManifest, read_manifest
    from lctw_megatron.training.checkpoint import CheckpointWriter, resume, run_state

    bench = StepBench(run)
    stepper = bench.stepper({"scheme": "uniform"})
    batches = bench.batches()

    def save(writer: CheckpointWriter, number: int) -> float:
        manifest = CheckpointManifest(
            step=number, model=run.model, dtype=run.training.precision, optimizer=True
        )
        start = time.perf_counter()
        writer.save(run_state(bench.chunks, bench.optimizer), manifest)
        return time.perf_counter() - start

    def seconds(writer: CheckpointWriter | None, number: int) -> float:
        start = time.perf_counter()
        for step in range(every):
            stepper.step(step, batches)
            if writer is None:
                continue
            if step == 0:
                save(writer, number)
            writer.finish(blocking=step == every - 1)
        return time.perf_counter() - start

    folder = Path(first_rank_decides(tempfile.mkdtemp))
    blocking = CheckpointWriter(folder / "blocking", 1)
    ways = {
        "without": None,
        "blocking": blocking,
        "asynchronous": CheckpointWriter(folder / "background", 1, asynchronous=True),
    }
    try:
        seconds(None, 0)  # compiles
        before = peak_memory_bytes()
        for writer in ways.values():  # the first save starts processes
            seconds(writer, 0)
        times: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(1, repeats + 1):
            for name, writer in ways.items():
                times[name].append(seconds(writer, number))
        saving = save(blocking, repeats + 1)
        (checkpoint,) = first_rank_decides(lambda: sorted(blocking.folder.glob("step_*")))
        start = time.perf_counter()
        resume(checkpoint, read_manifest(checkpoint), bench.chunks, bench.optimizer)
        loading = time.perf_counter() - start
        size = first_rank_decides(lambda: sum(f.stat().st_size for f in checkpoint.rglob("*")))
    finally:  # a rank that fails asks no other
        if bench.world.is_first:
            shutil.rmtree(folder, ignore_errors=True)
    median = {name: statistics.median(values) for name, values in times.items()}
    return {
        "seconds_without": median["without"],
        "blocking_share": median["blocking"] / median["without"] - 1,
        "asynchronous_share": median["asynchronous"] / median["without"] - 1,
        "save_seconds": saving,
        "load_seconds": loading,
        "gigabytes": size / 1e9,
        "host_memory_grew_gib": (peak_memory_bytes() - before) / 2**30,
    }
