"""Environment variables that name a place in the folder of the run, unless the user named one."""

import os


def point(name: str, place: str) -> None:
    """Let the variable ``name`` be ``place``. What an earlier run of this process, or of the one
    that started it, put there is replaced: a second variable, inherited alike, says it was ours."""
    mark = f"LCTW_{name}"
    if os.environ.get(name) in (None, os.environ.get(mark)):
        os.environ[name] = os.environ[mark] = place
