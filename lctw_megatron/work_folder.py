"""Files and folders of work in progress: how they are named, and which of them may be removed."""

import contextlib
import re
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from lctw_megatron.errors import InputError

MARK = ".lctw-megatron"
"""In every folder of work in progress: it was made here, and may be removed."""


def temporary_name(path: Path) -> Path:
    """Beside ``path``, and new: two processes, on two nodes too, never get the same."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def leftovers(path: Path) -> list[Path]:
    """What has a ``temporary_name`` of ``path``: files, and folders with our mark. No links."""
    name = re.compile(re.escape(f".{path.name}.") + r"[0-9a-f]{8}\.tmp")
    found = path.parent.iterdir() if path.parent.is_dir() else ()
    named = sorted(entry for entry in found if name.fullmatch(entry.name))
    return [each for each in named if not each.is_symlink() and (each.is_file() or _is_ours(each))]


def remove_leftovers(path: Path, log: Callable[[str], None]) -> None:
    """Remove the ``leftovers`` of ``path``. Only for whoever owns it: then all who wrote them are
    dead."""
    for leftover in leftovers(path):
        if leftover.is_dir():
            remove_work_folder(leftover)
        else:
            remove(leftover)
        log(f"{leftover}: left by a run that was killed, removed")


def make_work_folder(folder: Path) -> None:
    """Make ``folder`` and mark it as ours. InputError as ``check_work_folder``."""
    check_work_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).touch()


def check_work_folder(folder: Path) -> None:
    """InputError if ``folder`` is there and not ours, or a link.

    An empty one is taken: a kill may leave it before its mark is made, or after it is removed.
    """
    if folder.is_symlink() or (folder.exists() and not _is_ours(folder)):
        raise InputError(
            f"{folder}: exists and was not made by this command, which needs the name for its work "
            "in progress; move it away or choose another name for the output"
        )


def _is_ours(folder: Path) -> bool:
    try:
        return folder.is_dir() and ((folder / MARK).is_file() or not any(folder.iterdir()))
    except FileNotFoundError:  # removed at this moment
        return False


def remove_work_folder(folder: Path) -> None:
    """Remove a folder that ``make_work_folder`` made, its mark last; anything else stays."""
    if folder.is_symlink() or not _is_ours(folder):
        return
    with contextlib.suppress(OSError):  # Windows removes no open file, and keeps the folder
        for path in folder.iterdir():
            if path.name != MARK:
                remove(path)
        if any(path.name != MARK for path in folder.iterdir()):
            return
        (folder / MARK).unlink(missing_ok=True)
        folder.rmdir()


def remove(path: Path) -> None:
    """Remove a file, a link or a folder of ours. Of a link, never what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
