"""Sequence indices on disk, memory-mapped: built once, and shared by the ranks of a node.

An entry is a folder with one .npy file for every array of the SequenceIndex and index.json, which
holds the price of this way of packing and the checksums of the arrays.
"""

import errno
import hashlib
import json
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

import numpy as np

from lctw_megatron.atomic import atomic_directory, locked, write_json
from lctw_megatron.data.json_object import read_json_object
from lctw_megatron.data.sequences import (
    FORMAT_VERSION,
    Packing,
    PackingCost,
    SequenceIndex,
    Tails,
    build_index,
    packing_cost,
)
from lctw_megatron.errors import InputError
from lctw_megatron.work_folder import leftovers, remove_leftovers

INDEX_CACHE = "index_cache"
"""The usual folder of the indices, beside a dataset."""


class Indexable(Protocol):
    """What ``cached_index`` needs of a TokenDataset."""

    @property
    def prefix(self) -> str | Path: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def lengths(self) -> np.ndarray: ...


def cached_index(
    dataset: Indexable,
    sequence_length: int,
    packing: Packing,
    tails: Tails,
    folder: str | Path | None = None,
    setting: str | None = "data.index_cache",
) -> tuple[SequenceIndex, PackingCost]:
    """``build_index`` and ``packing_cost`` of a token dataset, kept in ``folder`` on disk.

    The cache entry is named by the content fingerprint of the dataset, a checksum of its lengths,
    the settings and the format version, and carries checksums: changed data gets a new entry, a
    damaged entry is rebuilt. Many ranks may ask at once: one builds, the others wait for it.

    setting: what the user calls ``folder``; None where it cannot be set. Raises InputError if the
    folder (default: ``index_cache`` beside the dataset) is not writable.
    """
    prefix = Path(dataset.prefix)
    folder = Path(folder) if folder else prefix.parent / INDEX_CACHE
    if packing == "pack":
        tails = "keep"  # no meaning there, hence not two entries
    content = [dataset.fingerprint, _checksum(dataset.lengths)]
    settings = [FORMAT_VERSION, content, sequence_length, packing, tails]
    key = hashlib.blake2b(json.dumps(settings).encode(), digest_size=8).hexdigest()
    entry = folder / f"{prefix.name}-{packing}-{tails}-{sequence_length}-{key}"
    found = _read(entry)
    if found and not leftovers(entry):
        return found
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / ".lock") as alone:
            if alone:  # else they may be of ranks that build at this moment
                remove_leftovers(entry, lambda line: None)  # of ranks killed while they built it
            found = _read(entry)
            if found:
                return found
            index = build_index(dataset.lengths, sequence_length, packing, tails)
            cost = packing_cost(dataset.lengths, sequence_length, index)
            _write(entry, index, cost)
    except OSError as error:
        if found:
            return found
        if error.errno not in (errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT):
            raise
        if setting is None:  # held-out data, whose index takes no time
            index = build_index(dataset.lengths, sequence_length, packing, tails)
            return index, packing_cost(dataset.lengths, sequence_length, index)
        raise InputError(
            f"{setting}: {folder} cannot be written ({error.strerror}); name a folder with room "
            "that is writable"
        ) from error
    return _read(entry) or (index, cost)


def _write(entry: Path, index: SequenceIndex, cost: PackingCost) -> None:
    arrays: dict[str, np.ndarray] = vars(index)
    try:
        with atomic_directory(entry) as temporary:
            for name, array in arrays.items():
                np.save(temporary / f"{name}.npy", array)
            checksums = {name: _checksum(array) for name, array in arrays.items()}
            write_json(temporary / "index.json", {"price": asdict(cost), "checksums": checksums})
    except OSError as error:
        # Without locks another rank may have put the same entry there between our steps.
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
            raise


def _read(entry: Path) -> tuple[SequenceIndex, PackingCost] | None:
    """A whole cache entry, memory-mapped; None if it is missing or damaged."""
    try:
        description = read_json_object(entry / "index.json")
        index = SequenceIndex(
            **{
                name: np.asarray(np.load(entry / f"{name}.npy", mmap_mode="r"))
                for name in SequenceIndex.__dataclass_fields__
            }
        )
        checksums = {name: _checksum(array) for name, array in vars(index).items()}
        if checksums != description["checksums"]:
            return None
        return index, PackingCost(**description["price"])
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, EOFError):
        return None


def _checksum(array: np.ndarray) -> str:
    crc = zlib.crc32(np.ascontiguousarray(array).data) if array.size else 0
    return f"{array.dtype} {array.shape} {crc:08x}"
