"""The files of a corpus, and how they are cut into shards that are tokenised independently.

Everything here is a function of the files alone: the same corpus gives the same files, slices and
shards in the same order, however many processes then work on them.
"""

import glob
import os
import stat
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from lctw_megatron.data.git_lfs import MOST_BYTES, refuse_pointers
from lctw_megatron.data.preprocessing.our_files import is_of_a_dataset, is_own
from lctw_megatron.errors import InputError, few, one_line
from lctw_megatron.work_folder import MARK

KINDS = {".jsonl": "jsonl", ".json": "jsonl", ".txt": "txt", ".parquet": "parquet"}
COMPRESSIONS = {".gz": "gz", ".zst": "zst"}
STDLIB = "stdlib"
"""The input that stands for the installed Python standard library."""
_METADATA = {"dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json"}
"""What the `datasets` library writes beside the text; no text itself."""
_NOT_STDLIB = {"site-packages", "dist-packages", "__pycache__"}
_SMALLEST_SHARD = 256 << 10
_LARGEST_SHARD = 64 << 20
_SHARDS = 64
"""A small corpus is cut into this many shards or up to twice, so that all workers have work."""


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


@dataclass
class PassedOver:
    """What lies in the searched folders (or fits a glob) and is not read."""

    paths: dict[str, str] = field(default_factory=dict)
    """Path to the reason, in the words of the summary."""

    def __str__(self) -> str:
        """`3 .csv (a.csv, b.csv, c.csv), 1 hidden (.git)`; empty if nothing was passed over."""
        reasons: dict[str, list[str]] = {}
        for path, reason in self.paths.items():
            name = os.path.basename(path)
            reasons.setdefault(reason, []).append(name if name.isprintable() else repr(name))
        most = sorted(reasons.items(), key=lambda item: -len(item[1]))
        return few([f"{len(names)} {why} ({few(names, most=3)})" for why, names in most], most=12)


def find_files(
    inputs: Sequence[str], output_prefix: str, passed_over: PassedOver | None = None
) -> list[CorpusFile]:
    """All corpus files that files, folders and globs name, each once, inputs in the given order and
    the contents of folders and globs sorted by path.

    Folders are searched with all their subfolders, linked ones too, each once. What is not read is
    listed in ``passed_over``: hidden, empty and other files, the metadata of a `datasets` folder,
    a further name of a file that is read already, and what earlier runs wrote for
    ``output_prefix`` or another. Raises InputError for an input that does not exist, is empty or
    holds nothing of a known kind, for a file that is there plain and compressed, and for a pointer
    of git-lfs.
    """
    left_out = PassedOver() if passed_over is None else passed_over
    files: dict[tuple[int, int], CorpusFile] = {}
    for name in inputs:
        packages = name == STDLIB
        if packages and os.path.exists(STDLIB):
            raise InputError(
                f"input {STDLIB} means Python's standard library, but there is a file or folder of "
                f"that name here; name it ./{STDLIB}, or rename it"
            )
        found = list(_stdlib_packages() if packages else _find(name, output_prefix, left_out))
        if not any(file.size for file in found):
            what = f"{len(found)} files, all empty" if len(found) != 1 else "an empty file"
            raise InputError(f"input {name}: {what}; there is no text to tokenise")
        for file in found:
            first = files.setdefault(_identity(file.path), file) if file.size else None
            if first is None:
                left_out.paths[file.path] = "empty"
            elif first.path != file.path:
                left_out.paths[file.path] = "linked to what is read already"
    _refuse_twice(files.values())
    small = (file for file in files.values() if file.size < MOST_BYTES and file.kind != "package")
    refuse_pointers(file.path for file in small)
    return list(files.values())


def _refuse_twice(files: Iterable[CorpusFile]) -> None:
    """InputError for a file beside its compressed form, which zstd leaves and gzip -k: all its
    documents would come twice, held-out ones into the training data. Either may be the one that
    was cut short or is older, so none is chosen."""
    plain: dict[str, str] = {}
    twice = []
    for file in files:
        folder, name = os.path.split(file.path)
        # Where a link leads, of the folder or of the file, it may be the other's neighbour.
        places = {os.path.join(os.path.realpath(folder), name), os.path.realpath(file.path)}
        for place in sorted(places):
            text = os.path.splitext(place)[0] if file.compression else place
            first = plain.setdefault(text, file.path)
            if first != file.path:
                twice.append(f"{first} and {os.path.basename(file.path)}")
                break
    if twice:
        raise InputError(
            f"{few(twice)}: by their names the same text, plain and compressed, whose documents "
            "would come twice; remove one of them, or name those that are meant, as *.jsonl does"
        )


def is_there(name: str) -> bool:
    """Whether there is a file or folder that an input names, or one that its glob matches."""
    return os.path.exists(name) or next(_matches(name), None) is not None


def _find(name: str, output_prefix: str, passed_over: PassedOver) -> Iterator[CorpusFile]:
    if os.path.exists(name) and not os.path.isdir(name):
        if is_own(name, output_prefix):
            raise InputError(
                f"input {name}: would be overwritten, or was written, by --output-prefix "
                f"{output_prefix}; choose another prefix"
            )
        yield _describe(name)
        return
    if os.path.isdir(name):
        paths = [name]
    else:
        paths = sorted(_matches(name))
        if not paths:
            raise InputError(f"input {name}: no such file or folder, and no glob that matches any")
    here = PassedOver()
    some = False
    for path in paths:
        for each in _files(path, here) if os.path.isdir(path) else [path]:
            if reason := _no_corpus(each, output_prefix):
                here.paths[os.path.abspath(each)] = reason
            else:
                some = True
                yield _describe(each)
    if not some:
        found = f"; found {here}" if here.paths else ""
        raise InputError(f"input {name}: holds no files ending in {_endings()}{found}")
    passed_over.paths |= here.paths


def _matches(pattern: str) -> Iterator[str]:
    """Paths that a glob matches. `**` enters every folder once, which the library's own does not:
    of two links to a folder above it would make millions of paths."""
    before, stars, after = pattern.partition("**/")
    if not stars or before[-1:] not in ("", "/"):
        yield from glob.glob(pattern.removesuffix("**") if pattern.endswith("/**") else pattern)
        return
    for start in sorted(glob.glob(before or "./")):
        for folder, _ in _walk(start, PassedOver()):
            yield from _matches(os.path.join(glob.escape(folder), after))


def _files(folder: str, passed_over: PassedOver) -> Iterator[str]:
    """Files below a folder, in the order of their paths."""
    for root, names in _walk(folder, passed_over):
        yield from (os.path.join(root, each) for each in names)


def _walk(folder: str, passed_over: PassedOver) -> Iterator[tuple[str, list[str]]]:
    """A folder and the folders below it, but for hidden ones and our work in progress, each with
    the names of its files. One that several links lead to is entered once, so that a link to a
    folder above does no harm."""

    def refuse(error: OSError) -> NoReturn:  # os.walk would go on without the folder
        raise error

    entered = {_identity(folder)}
    for root, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        inside = []
        for each in sorted(folders):
            path = os.path.join(root, each)
            if each.startswith("."):
                passed_over.paths[os.path.abspath(path)] = "hidden"
            elif os.path.exists(os.path.join(path, MARK)):
                passed_over.paths[os.path.abspath(path)] = "work in progress"
            elif _identity(path) not in entered:
                entered.add(_identity(path))
                inside.append(each)
        folders[:] = inside
        yield root, sorted(names)


def _identity(path: str) -> tuple[int, int]:
    """Equal for all names of one file or folder: links of both kinds, and a mount of it."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _no_corpus(path: str, output_prefix: str) -> str:
    """Why a file that was found is not read; empty if it is."""
    name = os.path.basename(path)
    if name.startswith("."):
        return "hidden"
    if _kind(path) is None:
        stem, ending = os.path.splitext(name)
        inner = os.path.splitext(stem)[1]
        return (inner if inner.lower() in KINDS else "") + ending or "without an ending"
    if name.lower() in _METADATA:
        return "metadata of a dataset"
    if is_own(path, output_prefix):
        return "written for this prefix"
    return "written for another prefix" if is_of_a_dataset(path) else ""


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
    try:
        status = os.stat(path)
    except OSError as error:  # a link that leads nowhere, or to itself
        raise InputError(f"input {path}: cannot be read ({error.strerror})") from None
    if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for, and can be read only once
        raise InputError(f"input {path}: not a regular file; write what it holds into one")
    return CorpusFile(os.path.abspath(path), *known, status.st_size, status.st_mtime_ns)


def _endings() -> str:
    return f"{', '.join(KINDS)} (plain, {' or '.join(COMPRESSIONS)})"


def _stdlib_packages() -> Iterator[CorpusFile]:
    """Every folder of the standard library that holds modules (tests included), as one document.

    Small ones first, so that the first few megabytes are many documents and not one.
    """
    root = Path(sysconfig.get_path("stdlib"))
    packages = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - _NOT_STDLIB)
        if any(name.endswith(".py") for name in names):
            packages.append(CorpusFile(folder, "package", "", *size_and_time(folder, "package")))
    return iter(sorted(packages, key=lambda package: (package.size, package.path)))


def size_and_time(path: str, kind: str) -> tuple[int, int]:
    """What a CorpusFile says of ``path``, as it is now: bytes, and time of the last change; of a
    package, of its modules."""
    paths = [path]
    if kind == "package":
        paths = [os.path.join(path, name) for name in os.listdir(path) if name.endswith(".py")]
    found = [os.stat(each) for each in paths]
    size = sum(status.st_size for status in found)
    return size, max((status.st_mtime_ns for status in found), default=0)


def plan_shards(files: Sequence[CorpusFile]) -> list[Shard]:
    """Slices of all files, in order, gathered into shards of about equal weight."""
    total = sum(file.size for file in files)
    # A power of two: else a line that is mended, or a new file, would cut all others anew too.
    target = 1 << (total // _SHARDS).bit_length() >> 1
    target = min(max(target, _SMALLEST_SHARD), _LARGEST_SHARD)
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
    from pyarrow import parquet  # here, because only parquet needs it and it takes a while

    with parquet_errors(path):
        return parquet.read_metadata(path).num_row_groups


@contextmanager
def parquet_errors(path: str) -> Iterator[None]:
    """InputError for whatever pyarrow raises of a damaged file: its own exceptions, OSErrors
    without a number, and those of Python that its bindings let through (UnicodeDecodeError of a
    name, OverflowError of a size, MemoryError of a page that claims terabytes)."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if getattr(error, "errno", None) is not None:
            raise  # the operating system's
        raise InputError(f"{path}: not a parquet file, or damaged ({one_line(error)})") from None
