"""How a rank ends: its exit status, the signals that ask it to leave, and its child processes.

Without torch: the child processes import it, too.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from lctw_megatron.end_with_parent import end_with_parent

REQUEUE_STATUS = 75
"""Exit status of a run that was asked to leave and can go on later (EX_TEMPFAIL of sysexits.h). The
batch scripts of launch/ requeue on it."""

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))
"""They ask to leave."""

_PATIENCE_SECONDS = 10.0
"""For a library that does not let Python act on a signal, or that caught what it raised."""


class _Asked(BaseException):
    """Raised in the main thread, so that locks and half-written files go."""


@contextmanager
def leaving_when_asked() -> Iterator[None]:
    """While this lasts, one of SIGNALS ends the process with REQUEUE_STATUS: at once while Python
    runs, else (torch waits for the other ranks, say) after _PATIENCE_SECONDS.

    For work that a kill at any moment does not harm: the start of training, until StopRequest
    listens, and scoring. To be entered first, before torch is imported. Only a signal in the
    interpreter's own start, some 50 ms, ends it with the signal.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    threading.Thread(target=_end_if_asked, args=(reading,), daemon=True).start()
    before: dict[int, Any] = {}
    try:
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        for number in SIGNALS:
            before[number] = signal.signal(number, _raise)
        yield
    except _Asked:
        print("asked to stop: nothing is lost, start again to go on", flush=True)
        _end()  # without the interpreter's end, where torch may wait for other ranks, or abort
    finally:
        listen_no_longer()
        for number, handler in before.items():
            if signal.getsignal(number) is _raise:
                signal.signal(number, handler)
        os.close(writing)


def listen_no_longer() -> None:
    """Somebody else is about to handle SIGNALS."""
    signal.set_wakeup_fd(-1)


def _raise(number: int, frame: FrameType | None) -> None:
    for each in SIGNALS:  # SLURM sends several; SIG_IGN would complain about those under way
        signal.signal(each, lambda number, frame: None)
    raise _Asked


def _end_if_asked(reading: int) -> None:
    """In a thread: C writes the number of every signal into the pipe, whatever Python does."""
    with open(reading, "rb", buffering=0) as signals:
        while number := signals.read(1):
            if number[0] in SIGNALS:
                time.sleep(_PATIENCE_SECONDS)
                _end()


def _end() -> None:
    sys.stdout.flush()
    os._exit(REQUEUE_STATUS)


def ignore_signals() -> None:
    """No longer listen to SIGNALS, until the process ends."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def serve_until_parent_ends() -> None:
    """From now on this process ends with its parent, and not before.

    SLURM sends the signals that ask to leave to the children of a rank too, which it needs to save.
    """
    ignore_signals()
    end_with_parent()
