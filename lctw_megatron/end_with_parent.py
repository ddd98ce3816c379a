"""A process that was started by multiprocessing ends with its parent, which a kill -9 keeps from
ending it."""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading


def end_with_parent() -> None:
    """From now on this process ends with its parent, or at once if that has ended.

    Everywhere a thread waits for it; under Linux the kernel does as well, also while a library lets
    no thread of Python run.
    """
    if multiprocessing.parent_process() is None:
        return
    threading.Thread(target=_end_after_parent, daemon=True).start()
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1  # prctl(2)
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _end_after_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
