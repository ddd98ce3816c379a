"""The one exception for mistakes a user can mend, and how its one line lists things."""

from collections.abc import Sequence


class InputError(ValueError):
    """Something the user gave is wrong: a file, a field, a combination.

    The message is one line that names the file or field, what was found, what was expected and
    what to do. Every command prints it without a traceback and exits with status 2 (see ``cli``).
    """


def few(items: Sequence[object], separator: str = ", ", most: int = 8) -> str:
    """The first ``most`` of ``items`` and how many more there are, for a line that stays one."""
    shown = [text if len(text := str(item)) <= 200 else f"{text[:197]}..." for item in items[:most]]
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return separator.join(shown) + more
