"""Finished shards joined into the sidecar, as a stream."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lctw_megatron.data.manifest import SidecarManifest, files_of
from lctw_megatron.data.sidecar import SidecarWriter
from lctw_megatron.errors import InputError
from lctw_megatron.progress import Progress
from lctw_megatron.scoring.job import Job
from lctw_megatron.scoring.sidecar_shard import ShardReader
from lctw_megatron.work_folder import remove_leftovers

_NANS = np.full(1 << 20, np.nan, dtype=np.float32)


def merge(job: Job, shards: int) -> SidecarManifest:
    """Write the sidecar from its finished shards and remove them. Bounded memory.

    The token data are read once, to make sure that they still have the fingerprint they were scored
    under. InputError if they have not, or if a shard is missing, damaged or of other settings.
    """
    readers = job.finished_shards(shards)
    job.dataset.verify()
    for path in files_of(job.prefix):
        remove_leftovers(Path(path), print)
    with (
        Progress("merge", job.dataset.num_tokens, "tokens") as progress,
        SidecarWriter(job.dataset, job.name, **job.details()) as writer,
    ):
        for values in values_in_order(job, readers):
            writer.add(values)
            progress.update(len(values))
    manifest = job.finished()
    assert manifest is not None
    job.remove_shards()
    return manifest


def values_in_order(job: Job, readers: list[ShardReader]) -> Iterator[np.ndarray]:
    """The sidecar's values from the first token of the corpus to the last, in small arrays."""
    dataset = job.dataset
    itemsize, position = dataset.dtype.itemsize, 0
    for number, reader in enumerate(readers):
        losses = _Stream(reader)
        for table in job.plan.tables(job.plan.shard(number, len(readers))):
            starts = dataset.pointers[table[:, 0]] // itemsize + table[:, 3]
            counts = table[:, 4] - table[:, 3]
            for start, count in zip(starts.tolist(), counts.tolist(), strict=True):
                yield from _nans(start - position)
                yield losses.take(count)
                position = start + count
        losses.finish()
    yield from _nans(dataset.num_tokens - position)


def _nans(count: int) -> Iterator[np.ndarray]:
    for begin in range(0, count, len(_NANS)):
        yield _NANS[: min(len(_NANS), count - begin)]


class _Stream:
    """The losses of a shard, any number at a time."""

    def __init__(self, reader: ShardReader) -> None:
        self.path = reader.path
        self.blocks = reader.blocks()
        self.rest = np.empty(0, dtype=np.float32)

    def take(self, count: int) -> np.ndarray:
        while len(self.rest) < count:
            block = next(self.blocks, None)
            if block is None:
                self._refuse("fewer")
            self.rest = np.concatenate([self.rest, block])
        taken, self.rest = self.rest[:count], self.rest[count:]
        return taken

    def finish(self) -> None:
        """Read to the end, which checks the digest."""
        if len(self.rest) or sum(len(block) for block in self.blocks):
            self._refuse("more")

    def _refuse(self, what: str) -> None:
        raise InputError(
            f"{self.path}: {what} losses than the windows of this shard score; it was written by "
            f"another version; delete it and run tools/score.py again"
        )
