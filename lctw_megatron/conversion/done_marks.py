"""Running a conversion again: finished work is recognised, nothing of the user's is overwritten."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lctw_megatron.atomic import write_json
from lctw_megatron.data.json_object import read_json
from lctw_megatron.errors import InputError, few

MARK = "conversion.json"
"""In every folder that a conversion wrote: what it was made from, and its files."""


def write_mark(folder: Path, source: dict[str, Any]) -> None:
    """The last thing written into a new folder."""
    write_json(folder / MARK, {"source": source, "files": sorted(_files(folder))})


def already_done(output: Path, source: dict[str, Any], log: Callable[[str], None]) -> bool:
    """Whether ``output`` was made from ``source``; if not, it may be written.

    A folder that was made from something else (a checkpoint of an earlier step) is to be replaced
    if it holds nothing but what the conversion wrote. Raises InputError if it holds anything else.
    """
    above = next(parent for parent in output.absolute().parents if parent.exists())
    if not above.is_dir():
        raise InputError(f"{output}: {above} is a file, a folder was expected")
    for ending in ("tmp", "old"):  # see atomic_directory
        for leftover in sorted(output.parent.glob(f".{output.name}.*.{ending}")):
            log(f"{leftover}: left by a conversion that was interrupted; it can be deleted")
    if not output.exists():
        return False
    if not output.is_dir():
        raise InputError(f"{output}: is a file; choose another --output")
    if not any(output.iterdir()):
        return False
    try:
        mark = read_json(output / MARK)
        if mark["source"] == source:
            log(f"{output}: is finished, nothing to do")
            return True
        known = {MARK, *mark["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(
            f"{output}: exists and was not written by this command; remove it or choose another "
            "--output"
        ) from None
    if foreign := sorted(_files(output) - known):
        raise InputError(
            f"{output}: was made from something else and holds files of yours: "
            f"{few(foreign)}; remove it or choose another --output"
        )
    log(f"{output}: was made from something else, is replaced")
    return False


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}
