"""``training.micro_batch_size`` where the recipe leaves it out.

The largest that divides what a data-parallel rank has of the global batch and whose estimated
memory (estimate.py) fits, so that one recipe runs on any number of ranks. The losses of a step are
sums over the global batch and do not depend on it but for the order of adding up (and dropout's
random numbers); so that a resume is equal bit for bit nevertheless, it keeps the checkpoint's size
while ranks and layout are those of the checkpoint, whatever machine it runs on.
"""

import math

from lctw_megatron.config.layout_rules import check_layout
from lctw_megatron.config.schema import RunConfig
from lctw_megatron.model.checkpoint import CheckpointManifest
from lctw_megatron.training.estimate import GIB, estimate

FILLED = 4
"""Micro batches for each stage that a pipeline is left, if a rank has as many sequences: p stages
stand idle for p - 1 of p - 1 + micro batches, with this less than a fifth of the time."""


def with_micro_batch(run: RunConfig, size: int) -> RunConfig:
    training = run.training.model_copy(update={"micro_batch_size": size})
    return run.model_copy(update={"training": training})


def choose_micro_batch(
    run: RunConfig,
    world_size: int,
    memory: int,
    resumed: CheckpointManifest | None = None,
    device: str = "cuda",
) -> int:
    """The size that ``run`` names or, if it names none, the one chosen.

    memory: bytes that a rank may take, equal on all ranks (platform/rank_memory.py). resumed: what
    the run goes on from. device: cuda or cpu, the type of the ranks' own. Where not even 1 fits it
    is 1. Raises InputError for a wrong layout.
    """
    if run.training.micro_batch_size:
        return run.training.micro_batch_size
    sequences = check_layout(run, world_size).sequences
    assert sequences is not None
    if resumed and resumed.run and resumed.ranks == world_size:
        saved = resumed.run.training.micro_batch_size
        if saved and resumed.run.layout == run.layout and sequences % saved == 0:
            return saved
    pipeline = run.layout.pipeline
    fewest = min(FILLED * pipeline, sequences) if pipeline > 1 else 1
    for micro_batches in _divisors(sequences):
        uneven = run.layout.virtual_pipeline and micro_batches % pipeline
        if micro_batches < fewest or uneven:
            continue
        size = sequences // micro_batches
        if estimate(with_micro_batch(run, size), world_size, device).largest.total <= memory:
            return size
    return 1


def describe_micro_batch(
    chosen: RunConfig, world_size: int, memory: int, device: str = "cuda"
) -> str:
    """A line about what ``choose_micro_batch`` chose."""
    fits = estimate(chosen, world_size, device).largest.total <= memory
    return (
        f"training.micro_batch_size: {chosen.training.micro_batch_size}, chosen for the "
        f"{memory / GIB:.1f} GiB that a rank may take (--memory for another machine's)"
        + ("" if fits else ", which are too few for any")
    )


def _divisors(number: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})
