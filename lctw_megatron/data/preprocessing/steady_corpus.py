"""The corpus stays as it was planned while it is read.

A file that is being downloaded, or replaced, would be tokenised in part, or held-out text and
tokens taken from two versions of it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from lctw_megatron.data.preprocessing.corpus import CorpusFile, size_and_time
from lctw_megatron.errors import InputError


@contextmanager
def unchanged(files: Sequence[CorpusFile]) -> Iterator[None]:
    """InputError, at the end, if one of ``files`` has another size or time than it had; also in
    place of the errors that come of reading such a file."""
    try:
        yield
    except (ValueError, FileNotFoundError):
        _check(files)
        raise
    _check(files)


def _check(files: Sequence[CorpusFile]) -> None:
    for file in files:
        try:
            found = size_and_time(file.path, file.kind)
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(
                f"{file.path}: was removed while it was read; bring it back, or name other files, "
                "and run again"
            ) from None
        if found != (file.size, file.mtime_ns):
            raise InputError(
                f"{file.path}: changed while it was read; wait until it is whole, and run again"
            )
