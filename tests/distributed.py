"""Run a function on several gloo ranks, each its own process, and get every rank's result back.

    def sum_of_ranks(offset):                            # at the top level of an importable module
        total = torch.tensor(offset + dist.get_rank())
        dist.all_reduce(total)
        return int(total)

    assert run_distributed(sum_of_ranks, 4, 10) == [46] * 4

Ranks are forked from a process that has imported what they need, since importing torch and
megatron-core costs each of them seconds. Put many cases into one function all the same, and compare
the list that comes back.
"""

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

from tests.fork_server import start_forked


def run_distributed(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 300.0,
    backend: str = "gloo",
) -> list[Any]:
    """Call ``function(*args)`` on ``world_size`` ranks; return the ranks' results, in rank order.

    Each rank is a process of its own with one thread, this one's environment, the default process
    group (of ``backend``) and torchrun's RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE set.
    ``function``, ``args`` and the results travel as pickles.

    The exception that was raised first, on whichever rank, is raised here again, with that rank's
    traceback as a note; the other ranks are killed. ``TimeoutError`` after ``timeout`` seconds,
    which also bounds every collective.
    """
    # What has touched a GPU cannot be forked.
    start = start_forked if backend == "gloo" else _start_spawned
    # A plain pickle: multiprocessing's own would put tensors into shared memory.
    call = pickle.dumps((function, args))
    with tempfile.TemporaryDirectory(prefix="run_distributed_") as folder:
        ranks: list[Any] = []
        try:
            for rank in range(world_size):
                arguments = rank, world_size, folder, call, timeout, backend
                ranks.append(start(_run_rank, *arguments, name=f"rank {rank}"))
            in_time = _wait_for_all_or_a_failure(ranks, timeout)
            died = [process for process in ranks if process.exitcode not in (None, 0)]
        finally:
            for process in ranks:
                if process.is_alive():
                    process.kill()
                process.join()
        outcomes = [_read_outcome(folder, rank) for rank in range(world_size)]
    for process, outcome in zip(ranks, outcomes, strict=True):
        if outcome is None and process in died:  # what its peers raise is only the consequence
            raise RuntimeError(f"{process.name} died with exit code {process.exitcode}")
    failures = [outcome for outcome in outcomes if outcome and outcome["failed_at"] is not None]
    if failures:
        raise min(failures, key=lambda outcome: outcome["failed_at"])["result"]
    if not in_time:
        late = [rank for rank, outcome in enumerate(outcomes) if outcome is None]
        raise TimeoutError(f"ranks {late} of {world_size} did not finish in {timeout:g} s")
    return [outcome["result"] for outcome in outcomes if outcome]


def _start_spawned(function: Callable[..., Any], *args: Any, name: str) -> Any:
    process = multiprocessing.get_context("spawn").Process(target=function, args=args, name=name)
    # Read by OpenMP when torch is first imported, so it must be there from the start.
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):
        process.start()
    return process


def _wait_for_all_or_a_failure(ranks: list[Any], timeout: float) -> bool:
    """Wait until every rank has ended or one has failed; False when the time is up first."""
    deadline = time.monotonic() + timeout
    running = {process.sentinel: process for process in ranks}
    while running:
        ended = wait(list(running), timeout=max(0.0, deadline - time.monotonic()))
        if not ended:
            return False
        for sentinel in ended:
            process = running.pop(sentinel)  # type: ignore[index]
            process.join()
            if process.exitcode != 0:
                return True
    return True


def _read_outcome(folder: str, rank: int) -> dict[str, Any] | None:
    path = Path(folder) / f"outcome_{rank}"
    return pickle.loads(path.read_bytes()) if path.exists() else None


def _run_rank(
    rank: int, world_size: int, folder: str, call: bytes, timeout: float, backend: str
) -> None:
    """One rank's process: run the call and leave its outcome in ``folder``."""
    for name in ("RANK", "LOCAL_RANK"):
        os.environ[name] = str(rank)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        os.environ[name] = str(world_size)
    outcome: dict[str, Any] = {"failed_at": None}
    try:
        function, args = pickle.loads(call)
        # A file as the meeting place: no port that another test could take meanwhile.
        store = dist.FileStore(str(Path(folder) / "store"), world_size)
        limit = timedelta(seconds=timeout)
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=limit
        )
        outcome["result"] = function(*args)
        data = pickle.dumps(outcome)
    except BaseException as error:
        outcome["failed_at"] = time.time()
        text = f"on rank {rank} of {world_size}:\n{traceback.format_exc()}"
        error.add_note(text)
        outcome["result"] = error
        try:
            data = pickle.dumps(outcome)
            pickle.loads(data)
        except Exception:  # an exception that does not survive pickling
            outcome["result"] = RuntimeError(text)
            data = pickle.dumps(outcome)
    # Renamed into place, so that a killed rank never leaves half an outcome.
    partial = Path(folder) / f"partial_{rank}"
    partial.write_bytes(data)
    partial.rename(Path(folder) / f"outcome_{rank}")
    if outcome["failed_at"] is not None:
        os._exit(1)  # at once: peers in a collective must not hold this rank back
    if dist.is_initialized():
        dist.destroy_process_group()
