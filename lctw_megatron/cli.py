"""What every command line shares: exit statuses and one-line errors."""

import errno
import os
import sys
import warnings
from collections.abc import Callable

from lctw_megatron import __version__
from lctw_megatron.errors import InputError

# The errors of the operating system that a user can mend and that need no traceback.
_MENDABLE = {
    errno.ENOSPC: "no space left on the disk; free some or choose another folder",
    errno.EDQUOT: "the disk quota is used up; free some space or choose another folder",
    errno.EACCES: "permission denied",
    errno.EROFS: "the file system is read-only",
    errno.ENOENT: "no such file or folder",
    errno.EISDIR: "this is a folder, a file was expected",
    errno.ENOTDIR: "this is a file, a folder was expected",
}


def run_command(main: Callable[[list[str]], int | None]) -> None:
    """Run ``main(arguments)`` and exit: 0 or its status; 2 and one line for a user's mistake.

    ``--debug`` anywhere on the line is taken out of the arguments and shows the traceback;
    ``--version`` anywhere prints the version and does nothing else.
    """
    arguments = sys.argv[1:]
    if "--version" in arguments:
        print(f"lctw-megatron {__version__}")
        sys.exit(0)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    if not debug:
        # Libraries warn of missing optional accelerators and of their own deprecations, dozens of
        # times; what a user must know, the project says itself.
        warnings.simplefilter("ignore")
    try:
        status = main(arguments) or 0
        sys.stdout.flush()
    except InputError as error:
        if debug:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        status = 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except OSError as error:
        if debug or error.errno not in _MENDABLE:
            raise
        place = f"{error.filename}: " if error.filename else ""
        print(f"error: {place}{_MENDABLE[error.errno]}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)


def positive(text: str) -> int:
    """For argparse's `type`."""
    value = int(text)
    if value < 1:
        raise ValueError
    return value


positive.__name__ = "positive integer"  # argparse names it in its error
