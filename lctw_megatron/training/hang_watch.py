"""A step that hangs ends the job, with every rank's Python stack in the log."""

import faulthandler
import os
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress

STATUS = 1
"""Exit status: a failure that may be a node's, so batch scripts try again, but not for ever. A rank
that hung has nothing to save, so it is not REQUEUE_STATUS; 2, a mistake of the user's, would be
final."""

_GRACE_SECONDS = 10.0
"""From the stacks to the end: the first rank that ends makes the launcher end the others, who must
have written theirs."""
_LAST_RESORT_SECONDS = 60.0
"""For a rank whose thread cannot run, as C code holds the interpreter's lock."""


class HangWatch:
    """Ends this process with STATUS when ``progress`` was not called for ``minutes``; None: never.

    A thread writes the stacks in one piece with the rank before every line, as the lines of all
    ranks meet in one log. Should it not get to run, faulthandler's timer, which needs no lock,
    writes them as they come and ends the process.
    """

    def __init__(
        self, minutes: float | None, rank: int, dump: Callable[[], str | None] = lambda: None
    ) -> None:
        """dump: what else to do before the end; what it returns is a line for the log."""
        self._seconds = minutes * 60 if minutes else None
        self._rank, self._dump = rank, dump
        self._what = ""
        self._moved = threading.Event()
        self._closed = False
        if self._seconds is not None:
            threading.Thread(target=self._watch, name="hang watch", daemon=True).start()

    def progress(self, what: str) -> None:
        """The run moves: it now begins with ``what``, as `step 7`."""
        self._what = what
        self._moved.set()
        if self._seconds is not None and not self._closed:
            # Armed again each time, at the price of a thread of C.
            faulthandler.dump_traceback_later(
                self._seconds + _LAST_RESORT_SECONDS, exit=True, file=2
            )

    def close(self) -> None:
        self._closed = True
        self._moved.set()
        if self._seconds is not None:
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        self._moved.wait()  # nothing has begun yet
        while not self._closed:
            self._moved.clear()
            if not self._moved.wait(self._seconds) and not self._closed:
                self._end()

    def _end(self) -> None:
        begin = f"[rank {self._rank}] "
        head = f"hangs: no progress for {self._seconds:g} s since the begin of {self._what}:"
        _write([begin + line for line in [head, *_stacks(), f"ends with status {STATUS}"]])
        try:
            line = self._dump()
        except Exception as error:
            line = f"{type(error).__name__}: {error}"
        if line:
            _write([begin + line])
        threading.Event().wait(_GRACE_SECONDS)
        os._exit(STATUS)


def _stacks() -> list[str]:
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read().decode(errors="replace").splitlines()


def _write(lines: list[str]) -> None:
    """In one call, so that the lines of several ranks do not mix."""
    with suppress(OSError):
        os.write(2, ("\n".join(lines) + "\n").encode())
