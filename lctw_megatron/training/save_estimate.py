"""What a checkpoint costs: bytes, host memory and time, for ``--dry-run``.

Every parameter is stored in the weights' precision and as float32 master weight and two moments,
once for each tensor rank and pipeline stage, and the data x context ranks share the writing
(optimizer_state.py). A rank copies what it writes into the host's memory, there until it is
written, and reads as much when it resumes. The checksums are made and compared by the same ranks,
2.3 GB/s each, in the background with the writing under `async_save`.
"""

from dataclasses import dataclass

from lctw_megatron.config.layout_rules import check_layout, padded_vocabulary
from lctw_megatron.config.schema import RunConfig
from lctw_megatron.training.estimate import expert_copies, expert_parameters, stage_parameters
from lctw_megatron.training.flops import step_flops

WRITE_SPEED = 5.0
"""GB/s that the file system is assumed to take from all ranks together."""
CHECKSUM_SPEED = 2.3
"""GB/s of one rank, measured."""
RANK_TFLOPS = 400.0
"""Of a rank, to guess the time of a step: what an H100 or H200 does in bf16 when all goes well."""


@dataclass(frozen=True)
class SaveEstimate:
    """Bytes and seconds of one checkpoint."""

    total_bytes: int
    rank_bytes: int
    """Of the rank with most: written by it, and at its peak in its host memory besides."""
    write_seconds: float
    checksum_seconds: float

    @property
    def seconds(self) -> float:
        return self.write_seconds + self.checksum_seconds


def estimate_save(
    run: RunConfig, world_size: int | None = None, write_speed: float = WRITE_SPEED
) -> SaveEstimate:
    """One checkpoint of ``run`` on ``world_size`` ranks (None: one copy of the model), at
    ``write_speed`` GB/s in all. Norms, which tensor ranks share, are counted for each of them.
    Raises InputError for a wrong layout."""
    sizes = check_layout(run, world_size or run.layout.fewest_ranks)
    assert sizes.data is not None
    each = (2 if run.training.precision == "bf16" else 4) + 12
    stages = [stage_parameters(run, stage) * each for stage in range(run.layout.pipeline)]
    if run.model.tie_word_embeddings and len(stages) > 1:  # the first stage stores the only copy
        columns = padded_vocabulary(run.model.vocab_size or 0) // run.layout.tensor
        stages[-1] -= each * columns * run.model.hidden_size
    experts = expert_parameters(run) * each
    total = sum(stages) * run.layout.tensor + len(stages) * experts * run.layout.expert
    rank = -(-max(stages) // (sizes.data * run.layout.context))
    rank += -(-experts // expert_copies(run, sizes.data))
    return SaveEstimate(total, rank, total / write_speed / 1e9, rank / CHECKSUM_SPEED / 1e9)


def describe_save(
    run: RunConfig, world_size: int | None = None, write_speed: float = WRITE_SPEED
) -> list[str]:
    """Lines for ``--dry-run``."""
    save, training = estimate_save(run, world_size, write_speed), run.training
    lines = [
        f"checkpoint: {save.total_bytes / 1e9:,.2f} GB in all; each rank writes, holds in host "
        f"memory meanwhile, and reads on resuming {save.rank_bytes / 1e9:,.2f} GB",
        f"  {save.seconds:,.1f} s at {write_speed:g} GB/s in all (--write-speed), "
        f"{save.checksum_seconds:,.1f} s of them for checksums",
    ]
    step = step_flops(run) / (world_size or run.layout.fewest_ranks) / RANK_TFLOPS / 1e12
    every = training.save_interval or training.steps
    share = save.seconds / (save.seconds + every * step)
    lines.append(
        f"  every {every:,} steps {100 * share:.1f} % of the time, if a rank does "
        f"{RANK_TFLOPS:g} TFLOP/s ({step:,.2f} s a step)"
        + ("; in the background, training waits for the copying only" * training.async_save)
    )
    return lines
