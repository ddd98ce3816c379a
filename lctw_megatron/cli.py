"""What every command line shares: exit statuses and one-line errors."""

import io
import os
import sys
import time
import warnings
from collections.abc import Callable

from lctw_megatron import __version__
from lctw_megatron.errors import MENDABLE, InputError, exit_status


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
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that is not UTF-8, or a file name that is not text: as standard error does.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = main(arguments) or 0
        sys.stdout.flush()
    except InputError as error:
        if debug:
            raise
        _complain(" ".join(str(error).split()))
        status = exit_status(error)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except OSError as error:
        if debug or error.errno not in MENDABLE:
            raise
        # Of two, as in a rename, the second is the one that the user named.
        name = error.filename2 or error.filename
        place = f"{name}: " if name else ""
        _complain(f"{place}{MENDABLE[error.errno]}")
        status = exit_status(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)


_PATIENCE_SECONDS = 5.0
"""In which a launcher ends the ranks that are left when one has failed."""


def _complain(line: str) -> None:
    """Print the error, once where several ranks have it: each waits for those before it, whose end
    is its own, and then it is the first to know."""
    others = [name for name in ("RANK", "LOCAL_RANK") if os.environ.get(name, "0") != "0"]
    time.sleep(_PATIENCE_SECONDS * len(others))
    print(f"error: {line}", file=sys.stderr)


def positive(text: str) -> int:
    """For argparse's `type`; what no array of numpy could count is none."""
    value = int(text)
    if not 0 < value < 2**62:
        raise ValueError
    return value


positive.__name__ = "positive integer"  # argparse names it in its error
