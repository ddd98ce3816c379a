"""Several processes tokenise the shards of a corpus, each writing its own; nothing goes through
the parent process but counts."""

import math
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

from lctw_megatron.data.preprocessing.corpus import Shard
from lctw_megatron.data.preprocessing.token_shard import (
    ShardResult,
    ShardSettings,
    finished_shard,
    tokenise_shard,
)
from lctw_megatron.data.tokenizers import Tokenizer, load_tokenizer
from lctw_megatron.end_with_parent import end_with_parent
from lctw_megatron.errors import InputError
from lctw_megatron.progress import Progress

_POLL_SECONDS = 0.5
_MB = 1e6


def tokenise_shards(
    shards: Sequence[Shard],
    folders: Sequence[Path],
    settings: ShardSettings,
    tokenizer_path: str,
    workers: int,
) -> list[ShardResult]:
    """Make shard i in folders[i] unless it is finished; return the results, in order.

    With ``settings.max_bytes`` the list ends with the shard in which the limit is reached. An error
    stops all, and the first in the order of the corpus is raised, unless the list ends before that
    shard: which were read ahead of their turn depends on ``workers``. Finished shards stay.
    """
    results: dict[int, ShardResult] = {}
    for number, folder in enumerate(folders):
        result = finished_shard(folder, settings.skip_bad)
        if result is not None:
            results[number] = result
    weights = [sum(part.weight for part in shard) for shard in shards]
    before = sum(weights[number] for number in results)
    total = sum(weights)
    if settings.max_bytes:
        total = max(min(total, settings.max_bytes), before)
    with Progress("tokenise", total / _MB, "MB", initial=before / _MB) as progress:
        if results:
            progress.note(f"{len(results)} of {len(shards)} shards were finished before")
        with _Pool(tokenizer_path, settings, workers) as pool:
            limit = settings.max_bytes or math.inf
            return _in_order(shards, folders, weights, results, limit, pool, progress)


def _in_order(
    shards: Sequence[Shard],
    folders: Sequence[Path],
    weights: Sequence[int],
    results: dict[int, ShardResult],
    limit: float,
    pool: "_Pool",
    progress: Progress,
) -> list[ShardResult]:
    todo = deque(number for number in range(len(shards)) if number not in results)
    running: dict[Future[ShardResult], int] = {}
    errors: dict[int, BaseException] = {}
    ordered: list[ShardResult] = []
    size = 0
    while True:
        while len(ordered) in results:
            result = results.pop(len(ordered))
            ordered.append(result)
            size += result.size
            if result.full or size >= limit:
                return ordered
        if len(ordered) == len(shards):
            return ordered
        if len(ordered) in errors:
            raise errors[len(ordered)]
        # A few ahead, not all (a corpus may have 100k shards), and no more than the limit is likely
        # to need: the text of a shard has about its weight.
        while todo and not errors and len(running) < pool.most_running:
            expected = size + sum(weights[len(ordered) : todo[0]])
            if running and expected >= limit:
                break
            number = todo.popleft()
            running[pool.submit(shards[number], folders[number])] = number
        done, _ = wait(running, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
        pool.show(progress)
        for future in done:
            number = running.pop(future)
            if error := future.exception():
                errors[number] = error
            else:
                results[number] = future.result()


class _Pool:
    """The processes. Leaving the context stops what they are doing."""

    def __init__(self, tokenizer_path: str, settings: ShardSettings, workers: int) -> None:
        # spawn: a forked process would inherit the locks of the tokenizer library's threads
        context = multiprocessing.get_context("spawn")
        self._counts = context.Array("q", 3)
        self._shown = [0, 0, 0]
        self.most_running = 2 * workers
        self._stop = context.Event()
        self._executor = ProcessPoolExecutor(
            workers, context, _start, (tokenizer_path, settings, self._counts, self._stop)
        )

    def submit(self, shard: Shard, folder: Path) -> Future[ShardResult]:
        with _children_deaf_to_interrupts():
            return self._executor.submit(_work, shard, folder)

    def show(self, progress: Progress) -> None:
        """Add what was done since the last call."""
        with self._counts.get_lock():
            counts = self._counts[:]
        size, documents, tokens = (new - old for new, old in zip(counts, self._shown, strict=True))
        self._shown = counts
        left = max((progress.total or 0) - progress.done, 0)
        progress.update(min(size / _MB, left), documents=documents, tokens=tokens)

    def __enter__(self) -> "_Pool":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._stop.set()
        self._executor.shutdown(wait=True, cancel_futures=True)
        if isinstance(error, BrokenProcessPool):
            raise InputError(
                "a worker process died while tokenising (out of memory, or killed); run again, "
                "with fewer --workers if memory is short: finished shards are kept"
            ) from None


@contextmanager
def _children_deaf_to_interrupts() -> Iterator[None]:
    """Ctrl-C is the parent's to handle. It goes to all processes of a terminal, so a worker has to
    be deaf to it from its first moment: it inherits what is blocked here, and the parent gets a
    signal of this moment right after. Windows blocks no signals: ``_start`` then ignores them."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


class _Stopped(Exception):
    """The parent needs no more."""


_tokenizer: Tokenizer
_settings: ShardSettings
_counts: Any
_stop: Event


def _start(tokenizer_path: str, settings: ShardSettings, counts: Any, stop: Event) -> None:
    """In a new worker process, once."""
    global _tokenizer, _settings, _counts, _stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread a process; there are many
    end_with_parent()
    _tokenizer = load_tokenizer(tokenizer_path)
    _settings, _counts, _stop = settings, counts, stop


def _work(shard: Shard, folder: Path) -> ShardResult:
    return tokenise_shard(shard, _settings, _tokenizer, folder, _report)


def _report(size: int, documents: int, tokens: int) -> None:
    with _counts.get_lock():
        for position, value in enumerate((size, documents, tokens)):
            _counts[position] += value
    if _stop.is_set():
        raise _Stopped
