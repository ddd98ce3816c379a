"""The one exception for mistakes a user can mend, and how its one line says things."""

import errno
from collections.abc import Sequence


class InputError(ValueError):
    """Something the user gave is wrong: a file, a field, a combination.

    The message is one line that names the file or field, what was found, what was expected and
    what to do. Every command prints it without a traceback and exits with status 2 (see ``cli``).
    """


MENDABLE = {
    errno.ENOSPC: "no space left on the disk; free some or choose another folder",
    errno.EDQUOT: "the disk quota is used up; free some space or choose another folder",
    errno.EACCES: "permission denied",
    errno.EROFS: "the file system is read-only",
    errno.ENOENT: "no such file or folder",
    errno.EISDIR: "this is a folder, a file was expected",
    errno.ENOTDIR: "this is a file, a folder was expected",
    errno.EEXIST: "something else has this name (a file, a link that leads nowhere); move it",
    errno.ELOOP: "links that lead in a circle; remove them",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
    errno.EFBIG: "the file is larger than may be written (ulimit -f); raise the limit",
    errno.EMFILE: "more files are open than allowed (ulimit -n); raise the limit",
    errno.EPERM: "operation not permitted",
}
"""The errors of the operating system that a user can mend and that need no traceback."""


def exit_status(error: InputError | OSError) -> int:
    """What a command ends with: 2 for what a user can mend, 1, which batch scripts try again, for
    what may be the machine's."""
    return 2 if isinstance(error, InputError) or error.errno in MENDABLE else 1


def one_line(error: BaseException) -> str:
    """What a library says, on one line of at most 300 characters; its type if that is nothing."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def few(items: Sequence[object], separator: str = ", ", most: int = 8) -> str:
    """The first ``most`` of ``items`` and how many more there are, for a line that stays one."""
    shown = [text if len(text := str(item)) <= 200 else f"{text[:197]}..." for item in items[:most]]
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return separator.join(shown) + more
