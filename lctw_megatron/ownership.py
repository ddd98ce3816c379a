"""Who may write a file or folder: one process at a time."""

import contextlib
import json
import os
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import psutil
from filelock import lock_descriptor

from lctw_megatron.atomic import LOCKLESS, open_lock, writing
from lctw_megatron.data.json_object import parse_json
from lctw_megatron.errors import InputError
from lctw_megatron.squeue import ask_squeue
from lctw_megatron.work_folder import leftovers, remove_leftovers

FORMAT = "lctw-megatron owner 1"
_PATIENCE_SECONDS = 120.0
"""For the lock of an owner that has ended: a server of NFS keeps it for a while, the kernel until
all memory of the process is free."""
_PAUSE_SECONDS = 1.0
"""Between two looks at it, which may ask squeue."""


@contextlib.contextmanager
def owned(lock: Path, what: str) -> Iterator[None]:
    """Let one process at a time write ``what``; the file ``lock`` says which, and goes at the end.

    InputError if another one does, naming its host, process and SLURM job. Who has died is
    succeeded. The kernel's lock decides where there is one, which a crash lets go, on all nodes of
    NFS, GPFS and Lustre with `-o flock`. Where locks end at the node (Lustre's `localflock`, BeeGFS
    by default) or are missing, what the file names is asked: a process of this host, or its job.
    Limits: there, an owner on another host without a job cannot be asked (with locks of the node it
    counts as dead, without any as alive), and two starting at the same moment may both enter.
    """
    with _entered(lock, what) as file:
        with writing(lock):
            _write(file.fileno())
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # Windows removes no open file
                if _is_at(file.fileno(), lock):
                    os.unlink(lock)


@contextlib.contextmanager
def sole_writer(output: Path, log: Callable[[str], None]) -> Iterator[None]:
    """Own ``output``, a file or folder, and remove what killed writers have left beside it."""
    output = Path(os.path.abspath(output))
    output.parent.mkdir(parents=True, exist_ok=True)
    lock = _lock_of(output)
    with writing(output, lock), owned(lock, str(output)):
        remove_leftovers(output, log)
        yield


def left_unfinished(output: Path) -> bool:
    """Whether a writer of ``output`` is at work, or was killed and has left something."""
    output = Path(os.path.abspath(output))
    return os.path.lexists(_lock_of(output)) or bool(leftovers(output))


def _lock_of(output: Path) -> Path:
    return output.with_name(f".{output.name}.lock")


def check_free(lock: Path, what: str) -> None:
    """InputError as ``owned`` if a living process owns ``lock``. It is not taken, and any number
    may ask at once."""
    if os.path.lexists(lock):
        with _entered(lock, what):
            pass


def holder(lock: Path) -> tuple[str, bool] | None:
    """Who owns ``lock``, for a person, and whether that process has ended, as far as can be told.
    None if nobody does. It is not taken, not even for a moment: for who only looks on."""
    try:
        with open(lock) as file:
            owner = _read(file, lock)
    except (FileNotFoundError, InputError):
        return None
    return (_named(owner), _has_ended(owner, False, takes=False)) if owner else None


@contextlib.contextmanager
def _entered(lock: Path, what: str) -> Iterator[IO[str]]:
    """The lock file, as the last owner left it, and nobody else's while the context lasts."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        with _open_locked(lock) as (file, locked):
            owner = _read(file, lock)
            if locked is False and time.monotonic() < deadline and _has_ended(owner, False):
                time.sleep(_PAUSE_SECONDS)
                continue
            if locked is False or (owner and not _has_ended(owner, locked is True)):
                hint = f" (if nothing of it runs any more, remove {lock})"
                raise InputError(
                    f"{what}: is being written by {_named(owner)}; wait for it to end or choose "
                    f"another{'' if locked is False else hint}"
                )
            yield file
            return


@contextlib.contextmanager
def _open_locked(lock: Path) -> Iterator[tuple[IO[str], bool | None]]:
    """The file, and whether the kernel let us in; None where there are no locks."""
    while True:
        descriptor = open_lock(lock)
        with os.fdopen(descriptor, "r+") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise InputError(f"{lock}: not a file, where a lock file was expected; move it")
            try:
                locked: bool | None = lock_descriptor(descriptor, blocking=False)
            except OSError as error:
                if error.errno not in LOCKLESS:
                    raise
                locked = None
            if not _is_at(descriptor, lock):
                continue  # an owner that ended has removed it between our two steps
            _HELD.add(descriptor)
            try:
                yield file, locked
            finally:
                _HELD.discard(descriptor)
            return


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


_HELD: set[int] = set()
"""Descriptors of the locks of this process."""


def _let_go() -> None:
    """In a forked child, such as a writer in the background: it shares the locks of its parent, and
    may outlive it."""
    for descriptor in _HELD:
        os.close(descriptor)
    _HELD.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


def _read(file: IO[str], lock: Path) -> dict[str, Any]:
    """Who holds it, or held it when it was killed; empty if nobody. InputError if the file is not
    ours, which is left as it is."""
    try:
        text = file.read(4096)
        if not text:
            return {}
        owner = parse_json(text)
        if owner["format"] == FORMAT:
            return owner
    except (ValueError, KeyError, TypeError):
        pass
    raise InputError(f"{lock}: not a lock file of ours, and in the place of one; move it away")


def _write(descriptor: int) -> None:
    owner = {
        "format": FORMAT,
        "host": socket.gethostname(),
        "process": os.getpid(),
        "started": psutil.Process().create_time(),
        "job": os.environ.get("SLURM_JOB_ID"),
    }
    line = (json.dumps(owner) + "\n").encode()
    # Not buffered: what a full disk does not take would be tried again when the file is closed.
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.write(descriptor, line)
    os.ftruncate(descriptor, len(line))


def _named(owner: dict[str, Any]) -> str:
    if not owner:
        return "another process"
    job = f", SLURM job {owner.get('job')}" if owner.get("job") else ""
    return f"process {owner.get('process')} on host {owner.get('host')}{job}"


def _has_ended(owner: dict[str, Any], locked: bool, takes: bool = True) -> bool:
    """Whether the owner that the file names is gone; ``locked``: the kernel let us in; ``takes``:
    it is asked to take its place, not by who looks on, perhaps from within its job."""
    if owner.get("host") == socket.gethostname():
        if locked:
            return True
        try:
            process = psutil.Process(int(owner["process"]))
            again = abs(process.create_time() - float(owner["started"])) > 1
            return again or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True
        except (psutil.Error, KeyError, TypeError, ValueError):
            return False
    job = owner.get("job")
    if takes and job and job == os.environ.get("SLURM_JOB_ID"):
        return True  # requeued: SLURM ends a job before it starts it again
    running = _runs(str(job)) if job else None
    return locked if running is None else not running


def _runs(job: str) -> bool | None:
    """What squeue says of a job; None if it can't be asked."""
    try:
        found = ask_squeue("--jobs", job, "--states", "RUNNING,SUSPENDED,STOPPED", "--format", "%A")
    except (OSError, subprocess.TimeoutExpired):
        return None
    if found.returncode:
        # It knows no ended jobs; any other failure is no answer.
        return False if "Invalid job id" in found.stderr else None
    return any(line.strip().isdigit() for line in found.stdout.splitlines())  # no banner
