"""The one exception for mistakes a user can mend."""


class InputError(ValueError):
    """Something the user gave is wrong: a file, a field, a combination.

    The message is one line that names the file or field, what was found, what was expected and
    what to do. Every command prints it without a traceback and exits with status 2 (see ``cli``).
    """
