"""A command in a process of its own that is killed just before one of its file operations.

Forked from the fork server of tests/scoring/processes.py, so that hundreds of runs take minutes.
"""

import os
import signal
import sys
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from lctw_megatron.cli import run_command
from tests.scoring.processes import Outcome, Ranks

_EVENTS = {
    "open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link",
    "shutil.rmtree", "shutil.copyfile", "shutil.move",
}  # fmt: skip
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def run_killed(root: Path, command: str, arguments: list[str], step: int) -> Outcome:
    """``tools/COMMAND.py ARGUMENTS`` with ``root`` as working directory, killed before its
    ``step``-th change of what is in ``root``; with 0 not killed."""
    return Ranks(_log(root), 0, _run, root, command, arguments, step).join()


def count_operations(root: Path, command: str, arguments: list[str]) -> int:
    """Run it to its end; how many there are."""
    outcome = run_killed(root, command, arguments, 0)
    assert outcome.status == 0, outcome.output
    return int(outcome.output.splitlines()[-1])


def _log(root: Path) -> Path:
    return root.with_name(f"{root.name}.log")


def _run(root: Path, command: str, arguments: list[str], step: int) -> None:
    os.chdir(root)
    me, count, inside = os.getpid(), 0, str(root)

    def operation() -> None:
        nonlocal count
        if os.getpid() != me:  # a process that this one has started
            return
        count += 1
        if count == step:
            os.kill(me, signal.SIGKILL)

    def audit(event: str, details: tuple[Any, ...]) -> None:
        if event not in _EVENTS or isinstance(details[0], int):
            return
        if event == "open" and not details[2] & _WRITING:
            return
        if os.path.abspath(os.fsdecode(details[0])).startswith(inside):
            operation()

    # The disk itself is not needed, as the machine lives on, and is slow.
    os.fsync = lambda descriptor: operation()
    if command == "preprocess":
        _tokenise_here()
    sys.argv = [f"{command}.py", *arguments]
    main = __import__(f"tools.{command}", fromlist=["main"]).main
    sys.addaudithook(audit)
    try:
        run_command(main)
    finally:
        print(count, flush=True)


def _tokenise_here() -> None:
    """Small shards, and what worker processes do is done by this one, which is killed."""
    from lctw_megatron.data.preprocessing import corpus, shard_pool

    class Executor:
        def __init__(self, workers: int, context: Any, start: Any, arguments: Any) -> None:
            start(*arguments)

        def submit(self, work: Any, *arguments: Any) -> Future[Any]:
            future: Future[Any] = Future()
            future.set_result(work(*arguments))
            return future

        def shutdown(self, **how: bool) -> None:
            pass

    corpus._SMALLEST_SHARD = 1000
    shard_pool.ProcessPoolExecutor = Executor  # type: ignore[misc, assignment]
