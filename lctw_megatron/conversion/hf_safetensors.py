"""The safetensors files of a Hugging Face folder, read in place: any rows of any tensor.

A file is: <Q length of the header; the header (JSON: name to dtype, shape and data_offsets, begin
and end in the data); the data. With several files, model.safetensors.index.json says which tensor
is in which. Nothing is mapped into memory: what is read goes straight to where it is wanted, so
that the caller decides how much memory that is.
"""

import json
import math
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lctw_megatron.conversion.dtypes import BY_SAFETENSORS
from lctw_megatron.conversion.hf_config import read_json
from lctw_megatron.errors import InputError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_PIECE = 1 << 26
"""Bytes converted at a time when the dtype changes."""


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies."""

    file: Path
    dtype: str
    """As the format spells it: BF16."""
    shape: tuple[int, ...]
    offset: int
    """Of its first byte in the file."""
    size: int
    """Bytes."""


class SafetensorsFolder:
    """The tensors of a folder; a context manager that closes the files.

    Opening checks every header against its file and the index against the headers. Raises
    InputError naming every file and tensor that is wrong.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[Path, int] = {}
        if (folder / SINGLE).is_file():
            self.entries = read_header(folder / SINGLE)
        elif (folder / INDEX).is_file():
            self.entries = _read_indexed(folder)
        else:
            raise InputError(_nothing_to_read(folder))

    def __enter__(self) -> "SafetensorsFolder":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def dtype(self, name: str) -> torch.dtype:
        return BY_SAFETENSORS[self.entries[name].dtype]

    def prefetch(self, name: str) -> None:
        """Ask the system to begin reading a tensor into its page cache. Costs no memory of ours."""
        entry = self.entries[name]
        os.posix_fadvise(
            self._descriptor(entry.file), entry.offset, entry.size, os.POSIX_FADV_WILLNEED
        )

    def read_rows(self, name: str, row: int, out: Tensor) -> None:
        """Fill ``out`` (contiguous, on the CPU) with the rows from ``row`` on, in its dtype."""
        entry = self.entries[name]
        source = BY_SAFETENSORS[entry.dtype]
        width = math.prod(entry.shape[1:])
        begin = entry.offset + row * width * source.itemsize
        flat = out.view(-1)
        if source == out.dtype:
            self._read(entry.file, begin, as_bytes(flat))
            return
        step = _PIECE // source.itemsize
        for start in range(0, flat.numel(), step):
            piece = torch.empty(min(step, flat.numel() - start), dtype=source)
            self._read(entry.file, begin + start * source.itemsize, as_bytes(piece))
            flat[start : start + step].copy_(piece)

    def _read(self, path: Path, offset: int, out: memoryview) -> None:
        descriptor = self._descriptor(path)
        done = 0
        while done < len(out):  # one call reads at most 2 GiB
            count = os.preadv(descriptor, [out[done:]], offset + done)
            if count == 0:
                raise InputError(f"{path}: became shorter while it was read")
            done += count

    def _descriptor(self, path: Path) -> int:
        if path not in self._files:
            self._files[path] = os.open(path, os.O_RDONLY)
        return self._files[path]


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def tensor_of(memory: np.ndarray, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The first bytes of ``memory`` (uint8) as a tensor that owns no more than them."""
    size = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(memory[:size]).view(dtype).view(shape)


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of one file. Raises InputError if the header and the file do not fit."""

    def damaged(what: str) -> InputError:
        return InputError(f"{path}: damaged: {what}; fetch it again")

    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= size - 8:
            raise damaged(f"a file of {size} bytes with a header of {length}")
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_no_duplicates)
    except ValueError as error:
        raise damaged(f"its header is not valid ({error})") from None
    entries: dict[str, Entry] = {}
    end = 0
    try:
        header.pop("__metadata__", None)
        for name, fields in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            shape = tuple(int(n) for n in fields["shape"])
            begin, stop = (int(n) for n in fields["data_offsets"])
            if begin != end:
                raise damaged(f"{name} begins at {begin}, expected {end}")
            dtype = fields["dtype"]
            if (
                dtype in BY_SAFETENSORS
                and stop - begin != math.prod(shape) * BY_SAFETENSORS[dtype].itemsize
            ):
                raise damaged(f"{name} has {stop - begin} bytes for {dtype} {list(shape)}")
            entries[name] = Entry(path, dtype, shape, 8 + length + begin, stop - begin)
            end = stop
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise damaged(f"its header is not valid ({error!r})") from None
    if size != 8 + length + end:
        raise damaged(f"{size} bytes, its header says {8 + length + end}")
    return entries


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name occurs twice")
    return values


def _read_indexed(folder: Path) -> dict[str, Entry]:
    """All tensors of the files that the index names; index and headers must say the same."""
    index = folder / INDEX
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(f, str) for f in where.values()):
        raise InputError(f"{index}: weight_map with a file for every tensor was expected")
    names = sorted(set(where.values()))
    _raise_all(
        f"{index} names files that do not belong here",
        [name for name in names if Path(name).name != name],
    )
    _raise_all(
        f"{folder}: missing, but named in {INDEX}",
        [name for name in names if not (folder / name).is_file()],
    )
    headers = _collect(names, lambda name: read_header(folder / name))
    inside = {tensor: name for name, header in headers.items() for tensor in header}
    wrong = [f"{t} is not in {f}" for t, f in where.items() if t not in headers[f]]
    wrong += [f"{t} is in {f} too" for f, h in headers.items() for t in h if where.get(t, f) != f]
    wrong += [f"{t} of {inside[t]} is not in the index" for t in inside if t not in where]
    _raise_all(f"{index} and the files differ", wrong)
    return {tensor: headers[name][tensor] for tensor, name in where.items()}


def _collect(names: list[str], read: Callable[[str], Any]) -> dict[str, Any]:
    """``read`` of every name; all failures in one InputError."""
    results, failures = {}, []
    for name in names:
        try:
            results[name] = read(name)
        except InputError as error:
            failures.append(str(error))
    if failures:
        raise InputError("; ".join(failures))
    return results


def _raise_all(what: str, names: list[str]) -> None:
    if names:
        raise InputError(f"{what}: {', '.join(names)}")


def _nothing_to_read(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder}: no such folder; expected a Hugging Face model folder"
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        return (
            f"{folder}: {', '.join(pickles)}: pickled weights are not read, for a pickle can run "
            "any code; convert them to safetensors (transformers: save_pretrained) first"
        )
    if others := sorted(path.name for path in folder.glob("*.safetensors")):
        return f"{folder}: {', '.join(others)}, but neither {SINGLE} nor {INDEX} that names them"
    return f"{folder}: no {SINGLE} and no {INDEX}; expected a Hugging Face model folder"
