"""The safetensors files of a Hugging Face folder: any rows of any tensor, read by the library.

With several files, model.safetensors.index.json says which tensor is in which. The library maps
files into memory, and every page that was read counts as memory of the process until the file is
closed. So a file is closed once some of that has gathered, and opened again.
"""

import math
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lctw_megatron.closing import Closing
from lctw_megatron.conversion.dtypes import BY_SAFETENSORS
from lctw_megatron.conversion.finite import check_finite
from lctw_megatron.data.git_lfs import refuse_pointers
from lctw_megatron.data.json_object import parse_json, read_json_object
from lctw_megatron.data.tokenizer_files import CONFIG
from lctw_megatron.errors import InputError, few

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_ADAPTER = "adapter_config.json"
_LARGEST_HEADER = 10**8
"""Bytes; the library reads no larger one."""
_MOST_MAPPED = 1 << 28
"""Bytes that may be read of a file before it is opened anew."""


@dataclass(frozen=True)
class Entry:
    """What the header of ``file`` says about a tensor."""

    file: Path
    dtype: str
    """As the format spells it: BF16."""
    shape: tuple[int, ...]
    inside: tuple[tuple[Any, ...], int] | None = None
    """Of one that is part of another: that one's name and the place on its first axes, and the
    first row there (fused_experts.py)."""


class SafetensorsFolder(Closing):
    """The tensors of a folder; a context manager that closes the file read last.

    Opening checks every file and the index against the headers. Raises InputError naming every
    file and tensor that is wrong.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open = ExitStack()
        self._path: Path | None = None  # which ``_file`` has open
        self._file: Any = None
        self._mapped = 0  # bytes read of it
        if (folder / SINGLE).is_file():
            refuse_pointers([folder / SINGLE])
            self.entries = read_header(folder / SINGLE)
        elif (folder / INDEX).is_file():
            self.entries = _read_indexed(folder)
        else:
            raise InputError(_nothing_to_read(folder))
        _refuse_another(folder, SINGLE if (folder / SINGLE).is_file() else INDEX)

    def close(self) -> None:
        self._open.close()

    def dtype(self, name: str) -> torch.dtype:
        return BY_SAFETENSORS[self.entries[name].dtype]

    def read(self, name: str) -> Tensor:
        """The whole tensor, in its dtype."""
        with safe_open(self.entries[name].file, "pt") as file:
            return file.get_tensor(name)

    def read_rows(self, name: str, row: int, out: Tensor, check: bool = False) -> None:
        """Fill ``out`` (on the CPU) with the rows from ``row`` on, in its dtype. ``check``:
        InputError unless they are finite, there and here."""
        entry = self.entries[name]
        # Not for every tensor: to open it is to read its header, 5 ms where it names 3,000 experts.
        if entry.file != self._path or self._mapped > _MOST_MAPPED:
            self._open.close()
            self._file = self._open.enter_context(safe_open(entry.file, "pt"))
            self._path, self._mapped = entry.file, 0
        self._mapped += out.numel() * out.element_size()
        (stored, *place), first = entry.inside or ((name,), 0)
        rows = slice(first + row, first + row + len(out))
        value = self._file.get_slice(stored)[(*place, rows)]
        if check:
            check_finite(value, out.dtype, name, entry.file)
        out.copy_(value)


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def tensor_of(memory: np.ndarray, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The first bytes of ``memory`` (uint8) as a tensor that owns no more than them."""
    size = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(memory[:size]).view(dtype).view(shape)


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of one file. Raises InputError if the header and the file do not fit."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(min(length, _LARGEST_HEADER))
    try:
        parse_json(text, _check_object)
        with safe_open(path, "pt") as file:
            found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {
                name: Entry(path, tensor.get_dtype(), tuple(tensor.get_shape()))
                for name, tensor in found.items()
            }
    except (SafetensorError, ValueError) as error:
        raise InputError(
            f"{path}: damaged: its header is not valid ({error}); fetch it again"
        ) from None


def _check_object(pairs: list[tuple[str, Any]]) -> None:
    """ValueError for what the library lets pass, a name that occurs twice, and for a tensor whose
    size is wrong, of which the library does not say more."""
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name occurs twice")
    match values:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]}:
            if not all(isinstance(size, int) for size in shape) or dtype not in BY_SAFETENSORS:
                return  # the library's to judge
            if end - begin != math.prod(shape) * BY_SAFETENSORS[dtype].itemsize:
                raise ValueError(f"{end - begin} bytes for {dtype} {shape}")


def _read_indexed(folder: Path) -> dict[str, Entry]:
    """All tensors of the files that the index names; index and headers must say the same."""
    index = folder / INDEX
    where = read_json_object(index).get("weight_map")
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
    refuse_pointers([folder / name for name in names])
    headers = _collect(names, lambda name: read_header(folder / name))
    inside = {tensor: name for name, header in headers.items() for tensor in header}
    wrong = [f"{t} is not in {f}" for t, f in where.items() if t not in headers[f]]
    wrong += [f"{t} is in {f} too" for f, h in headers.items() for t in h if where.get(t, f) != f]
    wrong += [f"{t} of {inside[t]} is not in the index" for t in inside if t not in where]
    _raise_all(f"{index} and the files differ", wrong)
    return {tensor: headers[name][tensor] for tensor, name in where.items()}


def _refuse_another(folder: Path, name: str) -> None:
    """InputError if transformers would load other weights than ``name``: those that config.json
    names (5), or with peft those of an adapter."""
    if (folder / _ADAPTER).is_file():
        raise InputError(
            f"{folder / _ADAPTER}: makes the folder an adapter's, which is not read; merge it into "
            "its base model first (peft: merge_and_unload, save_pretrained), or remove the file if "
            f"{name} holds the merged weights"
        )
    config = folder / CONFIG
    named = read_json_object(config).get("transformers_weights") if config.is_file() else None
    if named is not None and os.path.normpath(str(named)) != name:
        raise InputError(
            f"{config}: transformers_weights is {named!r:.80}, but {name} is what would be read; "
            f"keep the weights that are meant, as {SINGLE} or with {INDEX}, and remove the field"
        )


def _collect(names: list[str], read: Callable[[str], Any]) -> dict[str, Any]:
    """``read`` of every name; all failures in one InputError."""
    results, failures = {}, []
    for name in names:
        try:
            results[name] = read(name)
        except InputError as error:
            failures.append(str(error))
    if failures:
        raise InputError(few(failures, "; "))
    return results


def _raise_all(what: str, names: list[str]) -> None:
    if names:
        raise InputError(f"{what}: {few(names)}")


def _nothing_to_read(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder}: no such folder; expected a Hugging Face model folder"
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        return (
            f"{folder}: {few(pickles)}: pickled weights are not read, for a pickle can run "
            "any code; convert them to safetensors (transformers: save_pretrained) first"
        )
    if (folder / _ADAPTER).is_file():
        return (
            f"{folder}: holds an adapter ({_ADAPTER}), not a model; merge it into its base model "
            "first (peft: merge_and_unload, save_pretrained)"
        )
    if others := sorted(path.name for path in folder.glob("*.safetensors")):
        return f"{folder}: {few(others)}, but neither {SINGLE} nor {INDEX} that names them"
    return f"{folder}: no {SINGLE} and no {INDEX}; expected a Hugging Face model folder"
