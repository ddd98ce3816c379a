"""Processes that need not import torch and megatron-core, which costs each 5 to 30 s.

A server imports them once; every process is forked from it, so it starts in a fraction of a second
and may be killed like any other.
"""

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.reduction import DupFd
from typing import Any
from unittest import mock

_CONTEXT = multiprocessing.get_context("forkserver")


class _Descriptor:
    """A file descriptor that is one of the started process's too, there an int."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> Any:
        return _received, (DupFd(self.number),)


def _received(sent: Any) -> int:
    return sent.detach()


def start_forked(function: Callable[..., Any], *args: Any, name: str | None = None) -> Any:
    """A started multiprocessing.Process that calls ``function(*args)`` with one thread, in this
    process's folder, environment and output of now."""
    _CONTEXT.set_forkserver_preload(["tests.preload"])
    # Read by OpenMP when the server imports torch.
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):
        output = _Descriptor(1), _Descriptor(2)
        arguments = os.getcwd(), dict(os.environ), output, function, args
        process = _CONTEXT.Process(target=_run, args=arguments, name=name)
        process.start()
    return process


def _run(
    folder: str,
    environment: dict[str, str],
    output: tuple[int, int],
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    # Its own are those of the time when the server was started.
    for number, descriptor in enumerate(output, 1):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    function(*args)
