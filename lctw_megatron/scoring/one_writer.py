"""Who may work on a sidecar: one run of all of it, or any number of runs of one shard each."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lctw_megatron.atomic import writing
from lctw_megatron.ownership import check_free, owned
from lctw_megatron.work_folder import MARK, make_work_folder, remove_work_folder

_WHOLE = "lock"


@contextmanager
def sole_worker(folder: Path, shard: tuple[int, int] | None) -> Iterator[None]:
    """Own ``folder`` of shards or, with ``shard``, shard I of N in it. InputError if a living run
    owns the same, or one the whole and the other a part: it would remove what the other writes.

    Each first takes its own lock and then looks at the other kind's, so that of two that start at
    once at least one is refused. The folder goes at the end if nothing is in it.
    """
    make_work_folder(folder)
    own = folder / (f"{shard[0]:05d}-of-{shard[1]:05d}.lock" if shard else _WHOLE)
    try:
        with owned(own, _named(own)), writing(folder):
            others = [folder / _WHOLE] if shard else sorted(folder.glob("*-of-*.lock"))
            for other in others:
                check_free(other, _named(other))
            yield
    finally:
        if all(path.name == MARK for path in folder.glob("*")):
            remove_work_folder(folder)


def _named(lock: Path) -> str:
    return str(lock.parent) if lock.name == _WHOLE else f"{lock.parent}, shard {lock.stem}"
