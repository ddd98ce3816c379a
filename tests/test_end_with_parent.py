"""No orphans: not of a process that waits, nor of one whose interpreter is busy."""

import multiprocessing
import re
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import pytest

from lctw_megatron.end_with_parent import end_with_parent

ROOT = Path(__file__).parents[1]
PARENT = """
import multiprocessing, time
from tests.test_end_with_parent import child
if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=child, args=(theirs, {busy}))
    process.start()
    ours.recv()
    print(process.pid, flush=True)
    time.sleep(600)
"""


def child(started: Connection, busy: bool) -> None:
    end_with_parent()
    started.send(None)
    if busy:
        re.match("(a*)*b", "a" * 40)  # years, in C, holding the interpreter's lock
    time.sleep(600)


@pytest.mark.parametrize("busy", [False, True])
def test_a_child_ends_with_a_killed_parent(busy: bool) -> None:
    if busy and sys.platform != "linux":
        pytest.skip("the kernel's help is Linux's")
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT.format(busy=busy)], stdout=subprocess.PIPE, text=True,
        cwd=ROOT,
    )  # fmt: skip
    assert parent.stdout is not None
    orphan = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.communicate()
    assert not psutil.wait_procs([orphan], timeout=20)[1]


def test_it_is_nothing_for_a_process_without_a_parent_of_this_kind() -> None:
    assert multiprocessing.parent_process() is None
    end_with_parent()
