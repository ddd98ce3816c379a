"""Real processes that run tools/score.py, without paying for the imports each time."""

import os
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

from lctw_megatron.cli import run_command
from tests.fork_server import start_forked
from tests.ports import free_port

TIMEOUT = 120.0


class Outcome(NamedTuple):
    status: int
    """The first exit status that is not 0; negative for a signal."""
    output: str
    """Standard output and standard error of all ranks."""


class Ranks:
    """``world_size`` processes that call ``function(*args)``, as torchrun would start them; with 0,
    one process without RANK."""

    def __init__(
        self, output: Path, world_size: int, function: Callable[..., Any], *args: Any
    ) -> None:
        self.output = output
        output.unlink(missing_ok=True)
        port = free_port()
        self.processes = [
            start_forked(_run, output, rank, world_size, port, function, args)
            for rank in range(max(world_size, 1))
        ]

    def kill(self, rank: int) -> None:
        """kill -9; the others are killed as well, as torchrun and srun do."""
        for process in [self.processes[rank], *self.processes]:
            process.kill()
        for process in self.processes:
            process.join()

    def join(self, timeout: float = TIMEOUT) -> Outcome:
        """Wait until all have ended or one has failed."""
        deadline = time.monotonic() + timeout
        status, running = 0, list(self.processes)
        while running and status == 0:
            left = deadline - time.monotonic()
            if not wait([process.sentinel for process in running], max(left, 0)):
                self.kill(0)
                raise TimeoutError(f"after {timeout:g} s:\n{self.output.read_text()}")
            for process in [process for process in running if process.exitcode is not None]:
                running.remove(process)
                status = status or process.exitcode
        for process in running:  # a rank that waits for one that has failed
            process.join(2)
            process.kill()
            process.join()
        return Outcome(status, self.output.read_text() if self.output.exists() else "")


def score(output: Path, arguments: Sequence[str], world_size: int = 0) -> Outcome:
    """Run tools/score.py on so many ranks and wait for it."""
    return Ranks(output, world_size, run_score, list(arguments)).join()


def run_score(arguments: list[str]) -> None:
    """tools/score.py, in this process."""
    from tests.preload import score_main

    sys.argv = ["score.py", *arguments]
    run_command(score_main)


def _run(
    output: Path,
    rank: int,
    world_size: int,
    port: int,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if world_size:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world_size),
            LOCAL_WORLD_SIZE=str(world_size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
    function(*args)
