"""Locks: one live owner at a time, dead ones are succeeded, foreign files stay."""

import errno
import json
import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from lctw_megatron import ownership
from lctw_megatron.errors import InputError
from lctw_megatron.ownership import owned, sole_writer


def hold(lock: Path, pipe: Connection, fork: bool) -> None:
    with owned(lock, "the run"):
        child = os.fork() if fork else 0
        if fork and child == 0:
            signal.pause()
        pipe.send(child)
        signal.pause()


def start(lock: Path, fork: bool = False) -> tuple[multiprocessing.process.BaseProcess, int]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=hold, args=(lock, theirs, fork))
    process.start()
    return process, ours.recv()


def record(lock: Path, **changes: object) -> None:
    """What an owner that was killed leaves."""
    owner = {"format": ownership.FORMAT, "host": "elsewhere", "process": 1, "started": 0.0}
    lock.write_text(json.dumps(owner | changes))


def test_a_second_owner_is_refused_and_told_who_the_first_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    lock = tmp_path / ".lock"
    process, _ = start(lock)
    before = lock.read_bytes()
    try:
        with pytest.raises(InputError, match=f"the run: .*process {process.pid} .*SLURM job 4711"):
            owned(lock, "the run").__enter__()
        assert lock.read_bytes() == before
    finally:
        process.kill()
        process.join()


def test_a_full_disk_names_what_was_to_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")  # as write says it: without a name
    with pytest.raises(OSError, match="No space") as error, sole_writer(tmp_path / "out", print):
        raise full
    assert error.value.filename == str(tmp_path / "out")

    def write(descriptor: int, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ownership.os, "write", write)
    with pytest.raises(OSError, match="No space") as error, owned(tmp_path / "lock", "the run"):
        pass
    assert error.value.filename == str(tmp_path / "lock")
    with pytest.raises(OSError, match="No space") as error, sole_writer(tmp_path / "out", print):
        pass
    assert error.value.filename == str(tmp_path / "out"), "not that of its lock"


def test_a_killed_owner_is_succeeded_also_while_a_process_that_it_forked_lives(
    tmp_path: Path,
) -> None:
    lock = tmp_path / ".lock"
    process, child = start(lock, fork=True)
    process.kill()
    process.join()
    try:
        with owned(lock, "the run"):
            assert json.loads(lock.read_text())["process"] == os.getpid()
        assert not lock.exists()
    finally:
        os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("locks", [True, False])
def test_a_job_that_was_requeued_on_another_host_is_its_own_successor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locks: bool
) -> None:
    if not locks:
        without_locks(monkeypatch)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    record(tmp_path / ".lock", job="7")
    with owned(tmp_path / ".lock", "the run"):
        pass


def test_who_looks_on_from_within_the_job_does_not_take_its_owner_for_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(tmp_path / "lock", job="77")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setattr(ownership, "_runs", lambda job: True)
    found = ownership.holder(tmp_path / "lock")
    assert found is not None and not found[1]


@pytest.mark.parametrize(("answer", "enters"), [(True, False), (False, True), (None, True)])
def test_of_another_host_squeue_is_asked_and_then_the_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: bool | None, enters: bool
) -> None:
    monkeypatch.setattr(ownership, "_runs", lambda job: answer)
    record(tmp_path / ".lock", job="8")
    if enters:
        with owned(tmp_path / ".lock", "the run"):
            pass
    else:
        with pytest.raises(InputError, match="elsewhere, SLURM job 8"):
            owned(tmp_path / ".lock", "the run").__enter__()


@pytest.mark.parametrize(("job", "runs"), [("8", True), ("9", False)])
def test_what_squeue_prints_besides_is_no_job_and_its_users_variables_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: str, runs: bool
) -> None:
    stub = tmp_path / "squeue"
    greeting = 'echo "Welcome, it is 1999"\n[ -n "$SQUEUE_USERS" ] || grep -ow 8 <<< "$*"; exit 0'
    stub.write_text(f"#!/bin/bash\n{greeting}\n")
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("SQUEUE_USERS", "nobody")
    assert ownership._runs(job) is runs


def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(descriptor: int, blocking: bool) -> bool:
        raise OSError(ownership.LOCKLESS[0], "no locks available")

    monkeypatch.setattr(ownership, "lock_descriptor", none)


def test_without_locks_a_process_of_this_host_is_looked_for_by_number_and_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psutil

    without_locks(monkeypatch)
    lock, me = tmp_path / ".lock", psutil.Process()
    host = ownership.socket.gethostname()
    record(lock, host=host, process=me.pid, started=me.create_time())
    with pytest.raises(InputError, match=f"process {me.pid}"):
        owned(lock, "the run").__enter__()
    record(lock, host=host, process=me.pid, started=me.create_time() - 100)
    with owned(lock, "the run"):
        pass
    record(lock)  # another host, no job: nobody can be asked
    with pytest.raises(InputError, match="remove"):
        owned(lock, "the run").__enter__()


def test_a_file_in_the_place_of_a_lock_stays_as_it_is(tmp_path: Path) -> None:
    lock, letter = tmp_path / ".lock", tmp_path / "letter"
    for path in (lock, letter):
        path.write_text("Dear Ada")
    with pytest.raises(InputError, match="not a lock file of ours"):
        owned(lock, "the run").__enter__()
    lock.unlink()
    lock.symlink_to(letter)
    with pytest.raises(InputError, match="a link"):
        owned(lock, "the run").__enter__()
    assert letter.read_text() == "Dear Ada"


def test_asking_whether_a_lock_is_free_leaves_it_as_it_is(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    ownership.check_free(lock, "the run")
    assert not lock.exists()
    record(lock, host=ownership.socket.gethostname())
    dead = lock.read_bytes()
    ownership.check_free(lock, "the run")
    assert lock.read_bytes() == dead
    with owned(lock, "the run"), pytest.raises(InputError, match=f"process {os.getpid()}"):
        ownership.check_free(lock, "the run")
