"""How a rank ends: its exit status, the signals that ask it to leave, and its child processes.

Without torch: the child processes import it, too.
"""

import ctypes
import os
import signal

REQUEUE_STATUS = 75
"""Exit status of a run that was asked to leave and can go on later (EX_TEMPFAIL of sysexits.h). The
batch scripts of launch/ requeue on it."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""They ask to leave."""


def ignore_signals() -> None:
    """No longer listen to SIGNALS, until the process ends."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def end_with_parent(parent: int) -> None:
    """From now on this process ends with its parent, process ``parent``, and not before.

    SLURM sends the signals that ask to leave to the children of a rank too, which it needs to save.
    """
    ignore_signals()
    PR_SET_PDEATHSIG = 1  # prctl(2), Linux only
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it had ended before
            os._exit(1)
