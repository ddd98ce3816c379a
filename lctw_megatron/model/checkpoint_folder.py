"""Which folders are checkpoints, by their names. Without torch: tools/launch.py looks, too."""

import re
from pathlib import Path

MANIFEST = "checkpoint.json"
_STEP_NAME = re.compile(r"step_\d+")


def step_name(step: int) -> str:
    return f"step_{step:08d}"


def step_of(checkpoint: Path) -> int:
    """Of a folder with such a name."""
    return int(checkpoint.name.removeprefix("step_"))


def complete_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints inside ``folder``, oldest first."""
    paths = folder.iterdir() if folder.is_dir() else ()
    named = (path for path in paths if _STEP_NAME.fullmatch(path.name))
    whole = [path for path in named if (path / MANIFEST).is_file()]
    return sorted(whole, key=lambda path: (step_of(path), path))


def newest_complete(path: Path) -> Path | None:
    """``path`` itself, or the newest complete checkpoint of a run folder or its `checkpoints`."""
    if (path / MANIFEST).is_file():
        return path
    for folder in (path / "checkpoints", path):
        if steps := complete_checkpoints(folder):
            return steps[-1]
    return None
