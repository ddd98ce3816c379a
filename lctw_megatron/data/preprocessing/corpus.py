"""The files of a corpus, and how they are cut into shards that are tokenised independently.

Everything here is a function of the files alone: the same corpus gives the same files, slices and
shards in the same order, however many processes then work on them.
"""

import glob
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from lctw_megatron.errors import InputError

KINDS = {".jsonl": "jsonl", ".json": "jsonl", ".txt": "txt", ".parquet": "parquet"}
COMPRESSIONS = {".gz": "gz", ".zst": "zst"}
STDLIB = "stdlib"
"""The input that stands for the installed Python standard library."""
_NOT_STDLIB = {"site-packages", "dist-packages", "__pycache__"}
_SMALLEST_SHARD = 256 << 10
_LARGEST_SHARD = 64 << 20
_SHARDS = 64
"""A small corpus is cut into about this many shards, so that all workers have work."""


@dataclass(frozen=True, slots=True)
class CorpusFile:
    """One file; of kind `package`, one folder of Python modules that is one document."""

    path: str
    kind: str
    """jsonl (a document a line), txt (one document), parquet (a document a row), package."""
    compression: str
    """gz, zst or empty."""
    size: int
    """Bytes on disk."""
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Slice:
    """The part of a file that one shard reads."""

    file: CorpusFile
    begin: int
    """jsonl without compression: byte positions; lines that begin in [begin, end) belong to the
    slice. parquet without compression: row groups [begin, end). Otherwise 0 and the file's size."""
    end: int
    weight: int
    """Bytes on disk, about: what there is to do."""


Shard = tuple[Slice, ...]


def find_files(inputs: Sequence[str], output_prefix: str) -> list[CorpusFile]:
    """All corpus files that files, folders and globs name, each once, inputs in the given order and
    the contents of folders and globs sorted by path.

    Folders are searched with all their subfolders; hidden files, files of other suffixes and what
    an earlier run wrote for ``output_prefix`` are passed over. Raises InputError for an input that
    does not exist, is empty or holds nothing of a known kind.
    """
    files: dict[str, CorpusFile] = {}
    for name in inputs:
        found = list(_stdlib_packages() if name == STDLIB else _find(name, output_prefix))
        if not any(file.size for file in found):
            what = f"{len(found)} files, all empty" if len(found) != 1 else "an empty file"
            raise InputError(f"input {name}: {what}; there is no text to tokenise")
        files.update({file.path: file for file in found if file.size})
    return list(files.values())


def _find(name: str, output_prefix: str) -> Iterator[CorpusFile]:
    if os.path.isfile(name):
        if _is_own(name, output_prefix):
            raise InputError(
                f"input {name}: would be overwritten, or was written, by --output-prefix "
                f"{output_prefix}; choose another prefix"
            )
        yield _describe(name)
        return
    if os.path.isdir(name):
        paths = [name]
    else:
        paths = sorted(glob.glob(name, recursive=True))
        if not paths:
            raise InputError(f"input {name}: no such file or folder, and no glob that matches any")
    some = False
    for path in paths:
        for each in _walk(path) if os.path.isdir(path) else [path]:
            if _kind(each) and not _is_own(each, output_prefix):
                some = True
                yield _describe(each)
    if not some:
        raise InputError(f"input {name}: holds no files ending in {_endings()}")


def _walk(folder: str) -> Iterator[str]:
    """Files below a folder, in the order of their paths; hidden ones are left out."""
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(each for each in folders if not each.startswith("."))
        yield from (os.path.join(root, each) for each in sorted(names) if each[0] != ".")


def _kind(path: str) -> tuple[str, str] | None:
    """(kind, compression) by the name's ending; None for other files."""
    stem, ending = os.path.splitext(path.lower())
    compression = COMPRESSIONS.get(ending, "")
    if compression:
        ending = os.path.splitext(stem)[1]
    return (KINDS[ending], compression) if ending in KINDS else None


def _describe(path: str) -> CorpusFile:
    known = _kind(path)
    if known is None:
        raise InputError(f"input {path}: unknown ending; expected {_endings()}")
    status = os.stat(path)
    return CorpusFile(os.path.abspath(path), *known, status.st_size, status.st_mtime_ns)


def _endings() -> str:
    return f"{', '.join(KINDS)} (plain, {' or '.join(COMPRESSIONS)})"


def _is_own(path: str, output_prefix: str) -> bool:
    """Whether ``path`` is written for ``output_prefix``: a manifest, held-out text or shards."""
    path, prefix = os.path.abspath(path), os.path.abspath(output_prefix)
    rest = path.removeprefix(prefix) if path.startswith(prefix) else ""
    manifest = rest.startswith(".") and rest.endswith(".json") and "/" not in rest
    return manifest or rest.startswith((".shards/", "-validation.json"))


def _stdlib_packages() -> Iterator[CorpusFile]:
    """Every folder of the standard library that holds modules (tests included), as one document.

    Small ones first, so that the first few megabytes are many documents and not one.
    """
    root = Path(sysconfig.get_path("stdlib"))
    packages = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - _NOT_STDLIB)
        modules = [os.stat(os.path.join(folder, name)) for name in names if name.endswith(".py")]
        if modules:
            size = sum(module.st_size for module in modules)
            newest = max(module.st_mtime_ns for module in modules)
            packages.append(CorpusFile(folder, "package", "", size, newest))
    return iter(sorted(packages, key=lambda package: (package.size, package.path)))


def plan_shards(files: Sequence[CorpusFile]) -> list[Shard]:
    """Slices of all files, in order, gathered into shards of about equal weight."""
    total = sum(file.size for file in files)
    target = min(max(total // _SHARDS, _SMALLEST_SHARD), _LARGEST_SHARD)
    shards: list[Shard] = []
    gathered: list[Slice] = []
    weight = 0
    for file in files:
        for part in _cut(file, target):
            if gathered and weight + part.weight > target:
                shards.append(tuple(gathered))
                gathered, weight = [], 0
            gathered.append(part)
            weight += part.weight
    return [*shards, tuple(gathered)] if gathered else shards


def _cut(file: CorpusFile, target: int) -> Iterator[Slice]:
    """Slices of about ``target`` bytes where a file can be entered in the middle, else one."""
    if file.kind == "jsonl" and not file.compression:
        for begin in range(0, file.size, target):
            end = min(begin + target, file.size)
            yield Slice(file, begin, end, end - begin)
    elif file.kind == "parquet" and not file.compression:
        groups = _row_groups(file.path)
        each = file.size // max(groups, 1)
        for group in range(groups):
            yield Slice(file, group, group + 1, each)
    else:
        yield Slice(file, 0, file.size, file.size)


def _row_groups(path: str) -> int:
    import pyarrow  # here, because only parquet needs it and it takes a while
    from pyarrow import parquet

    try:
        return parquet.read_metadata(path).num_row_groups
    except (pyarrow.ArrowException, OSError) as error:
        refuse_damage(path, error)


def refuse_damage(path: str, error: Exception) -> NoReturn:
    """InputError for what pyarrow says of a damaged file: also OSErrors, which have no errno."""
    if getattr(error, "errno", None) is not None:
        raise error
    raise InputError(f"{path}: not a parquet file, or damaged ({error})") from None
