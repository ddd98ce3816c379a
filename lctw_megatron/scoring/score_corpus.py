"""Frozen scoring: shards are dealt to the data-parallel ranks, then joined into the sidecar."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch.distributed as dist

from lctw_megatron.data.manifest import SidecarManifest
from lctw_megatron.errors import InputError
from lctw_megatron.platform.capabilities import capabilities
from lctw_megatron.platform.world import (
    World,
    first_rank_decides,
    initialize,
    shut_down,
    started_ranks,
    started_together,
)
from lctw_megatron.progress import Progress, human
from lctw_megatron.scoring.job import Job
from lctw_megatron.scoring.merge_sidecar import merge
from lctw_megatron.scoring.one_writer import sole_worker
from lctw_megatron.scoring.sidecar_shard import Settings, shard_path, write_shard

LATE_SECONDS = 90.0
"""NFS shows a file of another node after a minute at the latest, unless it is told otherwise."""


class Request(NamedTuple):
    """Which part of a job this call is asked to do."""

    shards: int | None = None
    """Into how many shards the work is split; None: as begun, or as fits the work."""
    shard: int | None = None
    """Only this shard, and no merge: one of several independent jobs."""
    merge_only: bool = False
    overwrite: bool = False
    """Replace a sidecar or shards that were made with other settings."""


class _Work(NamedTuple):
    shards: int
    pending: list[int]
    settings: Settings


def score(job: Job, request: Request, log: Callable[[str], None]) -> SidecarManifest | None:
    """Do what is left of ``job``. All ranks call it; returns the sidecar's manifest on the first.

    Finished work is never done again, and without any left no model is loaded. ``log`` gets lines
    for the user, on the first rank. Raises InputError on the first rank, SystemExit on the others.
    """
    world = initialize(job.forward_layout, seed=0) if started_together() else None
    held = ExitStack()  # what the first rank owns
    # Ranks wait for each other as long as a shard takes, or the first one's reading of the corpus.
    patient = dist.new_group(backend="gloo", timeout=timedelta(days=30)) if world else None
    try:
        work = first_rank_decides(lambda: _survey(job, request, log, held), patient)
        if work is not None and work.pending:
            world = world or initialize(job.forward_layout, seed=0)
            _score_shards(job, work, world, log)
            dist.barrier(patient)
        if world is not None and not world.is_first:
            return None
        if work is None:
            return job.finished()
        if request.shard is not None:
            log(f"shard {request.shard} of {work.shards} is finished; merge when all are (--merge)")
            return None
        if world is not None:
            wait_for([shard_path(job.folder, shard, work.shards) for shard in work.pending])
        return merge(job, work.shards)
    finally:
        held.close()
        shut_down()


def wait_for(paths: Sequence[Path], seconds: float = LATE_SECONDS) -> None:
    """Wait until all ``paths``, which other ranks have written, are seen here, or the time is up.
    The folders are listed anew each time: a name once looked up in vain is remembered."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        seen = {name for folder in {path.parent for path in paths} for name in os.listdir(folder)}
        if all(path.name in seen for path in paths):
            return
        time.sleep(0.5)


def _survey(
    job: Job, request: Request, log: Callable[[str], None], held: ExitStack
) -> _Work | None:
    """What is left to do, owned by ``held``; None if the sidecar is finished."""
    manifest = job.finished(request.overwrite, log)
    if manifest is None:
        part = None
        if request.shard is not None and request.shards is not None:
            part = request.shard, request.shards
        held.enter_context(sole_worker(job.folder, part))
        manifest = job.finished(request.overwrite, lambda line: None)  # by another run, by now
    if manifest is not None:
        log(f"{job.prefix}: finished before, with the same settings")
        if job.folder.exists():  # a run was killed between the merge and its end
            with suppress(InputError, OSError), sole_worker(job.folder, None):
                job.remove_shards()
        return None
    if request.shard is None:
        job.dataset.verify()
    ranks = started_ranks() // (job.layout.tensor * job.layout.pipeline)
    shards = job.shards(request.shards, ranks, request.overwrite)
    if request.merge_only:
        return _Work(shards, [], job.settings)
    numbers = range(shards) if request.shard is None else [request.shard]
    pending = [
        number for number in numbers if not job.is_done(number, shards, request.overwrite, log)
    ]
    statistics = job.plan.statistics
    log(f"{capabilities().line()}; scoring in {job.arithmetic['precision']}")
    log(
        f"{job.prefix}: {human(statistics.scored)} of {human(job.dataset.num_tokens)} tokens to "
        f"score, with {statistics.min_context} to {job.windowing.window} tokens of context "
        f"({statistics.mean_context:.0f} on average); {human(statistics.tokens)} tokens to read in "
        f"{human(statistics.windows)} windows; {len(numbers) - len(pending)} of {len(numbers)} "
        f"shards finished before"
    )
    return _Work(shards, pending, job.settings)


def _score_shards(job: Job, work: _Work, world: World, log: Callable[[str], None]) -> None:
    from lctw_megatron.scoring.scorer import Scorer  # megatron-core: seconds to import

    mine = work.pending[world.data_rank :: world.data_size]
    scorer = Scorer(
        job.scorer_path,
        job.forward_layout,
        job.windowing.window,
        job.arithmetic["tokens_per_forward"],
        job.arithmetic["precision"],
        world.device,
    )
    last_stage = world.pipeline_rank == job.layout.pipeline - 1
    label = f"score, rank 1 of {world.data_size}" if world.data_size > 1 else "score"
    tokens = sum(job.plan.tokens_in(job.plan.shard(number, work.shards)) for number in mine)
    with Progress(label, tokens, "tokens") if world.is_first else nullcontext() as progress:
        for shard in mine:
            losses = _shard_losses(job, scorer, job.plan.shard(shard, work.shards), progress)
            if world.tensor_rank == 0 and last_stage:
                write_shard(job.folder, shard, work.shards, work.settings, losses)
            else:  # takes part in the forwards of the rank that writes
                for _ in losses:
                    pass
    if world.is_first and len(mine) < len(work.pending):
        log("waiting for the other ranks")


def _shard_losses(
    job: Job, scorer: Any, blocks: range, progress: Progress | None
) -> Iterator[np.ndarray]:
    tables = job.plan.tables(blocks)
    for table, losses in scorer.losses(job.dataset, tables, job.bos_id):
        if progress is not None:
            scored = int((table[:, 4] - table[:, 3]).sum())
            progress.update(int((table[:, 2] - table[:, 1]).sum()), scored=scored)
        yield losses
