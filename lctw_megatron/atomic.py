"""Files and folders that appear whole or not at all."""

import errno
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from filelock import lock_descriptor

from lctw_megatron.errors import InputError
from lctw_megatron.work_folder import make_work_folder, remove_work_folder, temporary_name

_WINDOWS = os.name == "nt"
LOCKLESS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""Errors of a file system without locks."""


def sync_directory(directory: Path) -> None:
    """Make renames inside ``directory`` survive a power cut, but on Windows, which opens none."""
    if _WINDOWS:
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Let one process of all in, the others wait. It is let go by a crash too.

    Yields whether it is the only one: where the file system has no locks, all are let in. The file
    ``path`` is made if it is missing, and never written to. InputError if it is a link.
    """
    descriptor = open_lock(path)
    try:
        try:
            alone = lock_descriptor(descriptor)
        except OSError as error:
            if error.errno not in LOCKLESS:
                raise
            alone = False
        yield alone
    finally:
        os.close(descriptor)  # which lets go


def open_lock(path: Path) -> int:
    """The lock file, opened as it is: filelock itself empties it in some versions, and follows
    links. Links are refused, for what they lead to is somebody else's."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    try:
        if not path.is_symlink():
            return os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
    raise InputError(f"{path}: a link, where a lock file was expected; remove it")


def check_not_read(option: str, output: str | Path, inputs: Iterable[str | Path]) -> None:
    """InputError if writing ``output``, which the user names by ``option``, would replace one of
    the files that are read."""
    if os.path.realpath(output) in map(os.path.realpath, inputs):
        raise InputError(f"{option} {output}: is read from, and would be replaced; name another")


@contextmanager
def writing(path: str | Path, *own: Path) -> Iterator[None]:
    """An OSError that names no file, as of a full disk, is one of ``path``; so is one that names
    one of ``own``, or what lies in it: files and folders made for ``path``, under names that the
    user has never seen."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        for field in ("filename", "filename2"):
            name = getattr(error, field)
            if isinstance(name, str) and any(Path(name).is_relative_to(place) for place in own):
                setattr(error, field, str(path))
        raise


@contextmanager
def atomic_file(path: str | Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a temporary file beside ``path``; on success fsync it and rename it to ``path``.

    On any exception (a full disk too) the temporary file is removed and ``path`` is untouched. The
    temporary name is random, so that two processes, on two nodes too, never write the same file.
    Text is UTF-8 under every locale.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        with writing(path, temporary):
            with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_directory(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically. NaN and infinity are refused."""
    with atomic_file(path, "w") as file:
        json.dump(value, file, indent=1, allow_nan=False)
        file.write("\n")


@contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``; on success rename it to ``path``.

    An existing ``path`` is replaced only after the new folder is complete. What the body writes
    inside is fsynced file by file before the rename. After a kill the temporary folder stays, with
    our mark in it: `work_folder.remove_leftovers`.
    """
    path = Path(os.path.abspath(path))
    work = temporary_name(path)
    new, old = work / path.name, work / "replaced"
    with writing(path, work):
        make_work_folder(work)
        try:
            new.mkdir()
            yield new
            for root, _, names in os.walk(new):
                for name in names:
                    with open(Path(root) / name, "r+b" if _WINDOWS else "rb") as file:
                        os.fsync(file.fileno())
                sync_directory(Path(root))
            if os.path.lexists(path):
                os.replace(path, old)
                try:
                    os.replace(new, path)
                except OSError:
                    if not path.exists():
                        os.replace(old, path)
                    raise
            else:
                os.replace(new, path)
            sync_directory(path.parent)
        finally:
            remove_work_folder(work)
