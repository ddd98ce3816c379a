"""Safetensors files written tensor after tensor, in an order and with shapes known beforehand.

The layout is that of transformers' `save_pretrained`: one model.safetensors, or files
model-00001-of-00003.safetensors with an index, none larger than the limit unless one tensor is.

safetensors' own `save_file` wants all tensors of a file in memory at once, 5 GB of them; this needs
one, so that the size of a model does not matter.
"""

import json
import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from lctw_megatron.atomic import write_json
from lctw_megatron.closing import Closing
from lctw_megatron.conversion import dtypes
from lctw_megatron.conversion.hf_safetensors import INDEX, SINGLE, as_bytes
from lctw_megatron.errors import InputError

_PIECE = 1 << 24
"""Elements converted at a time when the dtype changes."""
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip


def parse_size(text: str) -> int:
    """Bytes of `5GB` (decimal), `5GiB` (binary) or a plain number. Raises InputError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    size = float(match[1]) * _UNITS.get(match[2].upper(), 0) if match else 0
    if not 1 <= size < 2**63:
        raise InputError(f"size {text!r}: expected a number and a unit, for example 5GB or 512MiB")
    return int(size)


@dataclass(frozen=True)
class WeightFile:
    """One file: its tensors in the order in which they are written."""

    name: str
    tensors: dict[str, tuple[int, ...]]
    """Name to shape."""


def plan_files(
    tensors: dict[str, tuple[int, ...]], dtype: torch.dtype, max_bytes: int
) -> list[WeightFile]:
    """Fill one file after the other, in the given order."""
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    used = 0
    for name, shape in tensors.items():
        size = math.prod(shape) * dtype.itemsize
        if groups[-1] and used + size > max_bytes:
            groups.append({})
            used = 0
        groups[-1][name] = shape
        used += size
    if len(groups) == 1:
        return [WeightFile(SINGLE, groups[0])]
    return [
        WeightFile(f"model-{i:05d}-of-{len(groups):05d}.safetensors", group)
        for i, group in enumerate(groups, start=1)
    ]


class SafetensorsWriter(Closing):
    """Writes FOLDER's weight files: ``begin`` a tensor, ``write`` its rows, and so on to the last.

    A context manager; leaving it without an error checks that everything was written and writes the
    index if there are several files.
    """

    def __init__(self, folder: Path, files: list[WeightFile], dtype: torch.dtype) -> None:
        self._folder = folder
        self._files = files
        self.dtype = dtype
        self._order = [(file, name) for file in files for name in file.tensors]
        self._next = 0
        self._left = 0  # elements of the current tensor still to be written
        self._file: IO[bytes] | None = None

    def close(self) -> None:
        self._close_file()
        assert self._left == 0 and self._next == len(self._order)
        if len(self._files) > 1:
            self._write_index()

    def give_up(self, error: BaseException) -> None:
        self._close_file()

    def begin(self, name: str) -> None:
        """The next tensor of the plan is ``name``."""
        file, expected = self._order[self._next]
        assert self._left == 0 and name == expected, (name, expected, self._left)
        if name == next(iter(file.tensors)):
            self._close_file()
            # Unbuffered: what is written is large, and is copied once less this way.
            path = self._folder / file.name
            self._file = open(path, "wb", buffering=0)  # noqa: SIM115  closed by the next, or at exit
            self._put(memoryview(_header(file, self.dtype)))
        self._left = math.prod(file.tensors[name])
        self._next += 1

    def write(self, rows: Tensor) -> None:
        """The next rows (contiguous, on the CPU, of any float dtype) of the current tensor."""
        flat = rows.view(-1)
        self._left -= flat.numel()
        if flat.dtype == self.dtype:
            self._put(as_bytes(flat))
            return
        for start in range(0, flat.numel(), _PIECE):
            self._put(as_bytes(flat[start : start + _PIECE].to(self.dtype)))

    def _put(self, data: memoryview) -> None:
        assert self._file is not None
        done = 0
        while done < len(data):  # one call writes at most 2 GiB
            done += self._file.write(data[done:])

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write_index(self) -> None:
        sizes = [math.prod(shape) for file in self._files for shape in file.tensors.values()]
        weight_map = {name: file.name for file, name in self._order}
        total = sum(sizes) * self.dtype.itemsize
        write_json(
            self._folder / INDEX,
            {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
        )


def _header(file: WeightFile, dtype: torch.dtype) -> bytes:
    spelled = dtypes.SAFETENSORS[dtypes.name_of(dtype)]
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in file.tensors.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": spelled, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data to 8 bytes
    return struct.pack("<Q", len(text)) + text
