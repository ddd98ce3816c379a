"""What `git clone` leaves in the place of a large file where git-lfs is not set up: three lines
that say which file it is, under its name. As text they would be a document of a corpus."""

from collections.abc import Iterable
from pathlib import Path

from lctw_megatron.errors import InputError, few

MOST_BYTES = 1024
"""A pointer is shorter, says its specification."""
_BEGIN = b"version https://git-lfs.github.com/spec/v1\n"


def refuse_pointers(paths: Iterable[str | Path]) -> None:
    """InputError that names those of ``paths``, which are there, that are pointers."""
    if found := [path for path in paths if _is_pointer(path)]:
        raise InputError(
            f"{few(found)}: only the pointer that git leaves where git-lfs did not fetch the file; "
            "run git lfs install and git lfs pull in its repository, or download it anew"
        )


def _is_pointer(path: str | Path) -> bool:
    with open(path, "rb") as file:
        return file.read(len(_BEGIN)) == _BEGIN
