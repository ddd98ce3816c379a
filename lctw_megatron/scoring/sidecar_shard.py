"""The file of a finished shard: losses, and behind them what they are.

    float32[n]   losses of the shard's scored targets, in the order of the corpus, little-endian
    JSON         {"format", "settings", "shard", "shards", "values": n, "digest": blake2b-128 of the
                 losses}
    uint64       bytes of the JSON, little-endian
    8 bytes      b"LCTWSHRD"

It is written under a temporary name and renamed when all of it is on the disk, so a file of this
name is finished; the last bytes prove it once more after a copy or a file system that lost some.
"""

import hashlib
import json
import os
import re
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lctw_megatron.atomic import atomic_file
from lctw_megatron.data.json_object import parse_json
from lctw_megatron.errors import InputError
from lctw_megatron.work_folder import make_work_folder

FORMAT = "lctw-megatron shard 1"
MAGIC = b"LCTWSHRD"
_TAIL = struct.Struct("<Q8s")
_NAME = re.compile(r"(\d+)-of-(\d+)\.losses")
_BLOCK_VALUES = 1 << 20

Settings = dict[str, Any]
"""Everything that a loss depends on: what ``job.Job.settings`` returns."""


def shard_path(folder: Path, shard: int, shards: int) -> Path:
    return folder / f"{shard:05d}-of-{shards:05d}.losses"


def shard_files(folder: Path) -> dict[Path, tuple[int, int]]:
    """The shard files in ``folder`` (which may be missing) and their (shard, shards)."""
    names = sorted(folder.iterdir()) if folder.is_dir() else []
    matches = ((path, _NAME.fullmatch(path.name)) for path in names)
    return {path: (int(match[1]), int(match[2])) for path, match in matches if match}


def write_shard(
    folder: Path, shard: int, shards: int, settings: Settings, losses: Iterable[np.ndarray]
) -> Path:
    """Write the shard; it appears when ``losses`` (float32 [n] arrays) has ended."""
    make_work_folder(folder)
    path = shard_path(folder, shard, shards)
    digest, values = hashlib.blake2b(digest_size=16), 0
    with atomic_file(path) as file:
        for part in losses:
            data = part.astype("<f4", copy=False).tobytes()
            file.write(data)
            digest.update(data)
            values += len(part)
        trailer = {
            "format": FORMAT,
            "settings": settings,
            "shard": shard,
            "shards": shards,
            "values": values,
            "digest": digest.hexdigest(),
        }
        text = json.dumps(trailer).encode()
        file.write(text + _TAIL.pack(len(text), MAGIC))
    return path


class ShardReader:
    """A finished shard. InputError if the file is not whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            try:
                file.seek(size - _TAIL.size)
                length, magic = _TAIL.unpack(file.read(_TAIL.size))
                if magic != MAGIC:
                    raise ValueError("no mark at its end")
                file.seek(size - _TAIL.size - length)
                trailer = parse_json(file.read(length))
                if trailer["format"] != FORMAT:
                    raise ValueError(f"format {trailer['format']!r}, expected {FORMAT!r}")
                self.settings: Settings = trailer["settings"]
                self.values: int = trailer["values"]
                self.digest: str = trailer["digest"]
                if size != 4 * self.values + length + _TAIL.size:
                    raise ValueError(f"{size} bytes, but it names {self.values} values")
            except (OSError, OverflowError, ValueError, KeyError, TypeError, struct.error) as error:
                raise InputError(
                    f"{path}: damaged ({error}); delete it and run tools/score.py again"
                ) from None

    def blocks(self) -> Iterator[np.ndarray]:
        """The losses, float32, a bounded part at a time. InputError at the end if they were
        changed."""
        digest, left = hashlib.blake2b(digest_size=16), self.values
        with open(self.path, "rb") as file:
            while left:
                data = file.read(4 * min(left, _BLOCK_VALUES))
                if not data:
                    break
                digest.update(data)
                left -= len(data) // 4
                yield np.frombuffer(data, "<f4")
        if digest.hexdigest() != self.digest:
            raise InputError(
                f"{self.path}: damaged (its losses are not those it was written with); delete it "
                f"and run tools/score.py again"
            )
