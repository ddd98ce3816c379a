"""Which folders are checkpoints, by their names. Without torch: tools/launch.py looks, too."""

import re
from pathlib import Path

MANIFEST = "checkpoint.json"
_STEP_NAME = re.compile(r"step_(\d+)")


def step_name(step: int) -> str:
    return f"step_{step:08d}"


def complete_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints inside ``folder``, oldest first."""
    found = [
        (int(match.group(1)), path)
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := _STEP_NAME.fullmatch(path.name)) and (path / MANIFEST).is_file()
    ]
    return [path for _, path in sorted(found)]


def newest_complete(path: Path) -> Path | None:
    """``path`` itself, or the newest complete checkpoint of a run folder or its `checkpoints`."""
    if (path / MANIFEST).is_file():
        return path
    for folder in (path / "checkpoints", path):
        if steps := complete_checkpoints(folder):
            return steps[-1]
    return None
