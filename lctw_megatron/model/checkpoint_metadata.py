"""`.metadata` of a checkpoint, read without running anything that it names.

torch.distributed.checkpoint keeps its index of tensors as a pickle and reads it with pickle.load,
which calls whatever the file names: a checkpoint from elsewhere could run any code. Here the same
bytes are read first by an unpickler in whose world nothing real exists. Names are looked up in a
closed list; what stands behind them are functions of this file, which check their arguments, and
empty records, which take the fields of torch's data class of that name and no others. No attribute
of anything is looked up, getattr itself knows the members of two enumerations. What passes names
only what belongs there, with the arguments that belong there, so that torch may read it, too.
"""

import io
import pickle
from dataclasses import fields
from pathlib import PurePosixPath
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata, planner

from lctw_megatron.errors import InputError

_RECORDS = (
    metadata.Metadata, metadata.TensorStorageMetadata, metadata.BytesStorageMetadata,
    metadata.ChunkStorageMetadata, metadata.MetadataIndex, metadata.StorageMeta,
    filesystem._StorageInfo, filesystem._StoragePrefix,
    planner.SavePlan, planner.WriteItem, planner.TensorWriteData, planner.BytesIOWriteData,
)  # fmt: skip
_FURTHER = {"Metadata": {"all_local_plans", "mcore_data"}}
"""What megatron-core hangs on them besides."""
_ENUMS = (metadata._MEM_FORMAT_ENCODING, planner.WriteItemType)


class _Refused(Exception):
    """Why the file is not loaded."""


class Record:
    """Stands for an object of one of torch's data classes; its attributes are that object's."""

    _name = ""
    _fields: frozenset[str] = frozenset()

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, dict) or not state.keys() <= self._fields:
            raise _Refused(f"a {self._name} with other fields than its own")
        self.__dict__.update(state)


class _Properties(Record):
    """TensorProperties: a tuple of its own instead of fields."""

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise _Refused("a TensorProperties with other fields than its own")
        self.dtype = state[0]


def _record(kind: type) -> type[Record]:
    known = {field.name for field in fields(kind)} | _FURTHER.get(kind.__name__, set())
    return type(kind.__name__, (Record,), {"_name": kind.__name__, "_fields": frozenset(known)})


class _Enumeration:
    """Stands for an enumeration; members are called for by value or by name."""

    def __init__(self, kind: Any) -> None:
        self.members = {member.name: member.value for member in kind}

    def __call__(self, value: object) -> object:
        if type(value) is not int or value not in self.members.values():
            raise _Refused(f"{value!r:.40} as a member of an enumeration")
        return value


def _getattr(owner: object, name: object) -> object:
    if not isinstance(owner, _Enumeration) or name not in owner.members:
        raise _Refused("getattr of something else than a member of an enumeration")
    return owner.members[name]  # type: ignore[index]


def _size(values: object = ()) -> tuple[int, ...]:
    if not isinstance(values, tuple) or not all(type(n) is int and n >= 0 for n in values):
        raise _Refused("a torch.Size of something else than numbers")
    return values


def _words(*parts: object) -> str:
    """A path, a layout, a device: made of text and numbers, never looked at."""
    if not all(type(part) in (str, int) for part in parts):
        raise _Refused("a path, layout or device of something else than text")
    return "/".join(map(str, parts))


def _names() -> dict[tuple[str, str], Any]:
    known: dict[tuple[str, str], Any] = {
        ("builtins", "getattr"): _getattr,
        ("torch", "Size"): _size,
        ("torch", "device"): _words,
        ("torch.serialization", "_get_layout"): _words,
        ("pathlib", "Path"): _words,
        ("pathlib", "PosixPath"): _words,
        ("pathlib._local", "PosixPath"): _words,
        (metadata.__name__, "TensorProperties"): _Properties,
    }
    known |= {(kind.__module__, kind.__name__): _record(kind) for kind in _RECORDS}
    known |= {(kind.__module__, kind.__name__): _Enumeration(kind) for kind in _ENUMS}
    for name in dir(torch):
        if isinstance(getattr(torch, name), torch.dtype):
            known["torch", name] = name
    return known


class _Unpickler(pickle.Unpickler):
    known = _names()

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self.known[module, name]
        except KeyError:
            raise _Refused(f"{module}.{name}, which does not belong there") from None

    def persistent_load(self, pid: object) -> Any:
        raise _Refused("a reference to something outside")


def read_index(data: bytes) -> Record:
    """What ``data``, the bytes of a `.metadata`, says: torch's Metadata with records for objects,
    tuples for sizes and names for dtypes.

    InputError without the file's name if it names what does not belong there or is damaged.
    """
    try:
        found = _Unpickler(io.BytesIO(data)).load()
        if type(found) is not _Unpickler.known[metadata.__name__, "Metadata"]:
            raise _Refused(f"a {type(found).__name__} instead of its Metadata")
        _check_files(found)
        return found
    except _Refused as error:
        raise InputError(f"holds {error}; not loaded, use another checkpoint") from None
    except Exception as error:  # whatever damage makes an unpickler raise
        raise InputError(f"damaged ({type(error).__name__}); use another checkpoint") from None


def _check_files(found: Any) -> None:
    """Refuse places that are no files of the folder itself, or lie before its beginning."""
    for info in found.storage_data.values():
        name = info.relative_path
        plain = type(name) is str and name == PurePosixPath(name).name != ".."
        numbers = all(type(n) is int and n >= 0 for n in (info.offset, info.length))
        if not (plain and numbers):
            raise _Refused(f"{name!r:.80} as a file of the checkpoint")
