"""Nothing that a `.metadata` names is ever looked up or called: several families of payloads."""

import copyreg
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import metadata as torch_metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo

from lctw_megatron.errors import InputError
from lctw_megatron.model import checkpoint_metadata
from lctw_megatron.model.checkpoint_metadata import read_index

METADATA = "torch.distributed.checkpoint.metadata"
PLANNER = "torch.distributed.checkpoint.planner"


def text(value: str) -> bytes:
    return pickle.SHORT_BINUNICODE + bytes([len(value)]) + value.encode()


def name(module: str, qualified: str) -> bytes:
    return text(module) + text(qualified) + pickle.STACK_GLOBAL


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + pickle.MARK + b"".join(arguments) + pickle.TUPLE + pickle.REDUCE


def built(kind: bytes, state: bytes) -> bytes:
    return kind + pickle.EMPTY_TUPLE + pickle.NEWOBJ + state + pickle.BUILD


def mapping(key: str, value: bytes) -> bytes:
    return pickle.EMPTY_DICT + text(key) + value + pickle.SETITEM


ENCODING = name(METADATA, "_MEM_FORMAT_ENCODING")
GETATTR = name("builtins", "getattr")
COMMAND = text("touch executed")

PAYLOADS = {
    "a function": call(name("os", "system"), COMMAND),
    "a function by its old name": b"cposix\nsystem\n" + COMMAND + pickle.TUPLE1 + pickle.REDUCE,
    "through a module's imports": call(name(METADATA, "os.system"), COMMAND),
    "through an allowed class": call(name(METADATA, "Metadata.__init__"), COMMAND),
    "an enumeration made of a module": call(
        GETATTR,
        call(call(GETATTR, ENCODING, text("_convert_")), text("X"), text("os"), pickle.NONE),
        text("system"),
    ),
    "an attribute of an enumeration": call(GETATTR, ENCODING, text("__subclasses__")),
    "an attribute of a record": call(GETATTR, name(METADATA, "Metadata"), text("__init__")),
    "an attribute of a member": call(GETATTR, call(ENCODING, pickle.BININT1 + b"\0"), text("name")),
    "another class through BUILD": built(
        name(METADATA, "Metadata"), mapping("__class__", name(METADATA, "StorageMeta"))
    ),
    "another state method through BUILD": built(
        name(METADATA, "Metadata"), mapping("__setstate__", GETATTR)
    ),
    "slots through BUILD": built(
        name(METADATA, "Metadata"), pickle.NONE + mapping("__class__", ENCODING) + pickle.TUPLE2
    ),
    "an instance by the old opcode": b"(S'touch executed'\nios\nsystem\n",
    "an instance by OBJ": pickle.MARK + name("subprocess", "Popen") + COMMAND + pickle.OBJ,
    "an extension": pickle.EXT1 + b"\xf0",
    "something persistent": COMMAND + pickle.BINPERSID,
    "a loader": call(name("torch", "load"), COMMAND),
    "an evaluation": call(name("builtins", "eval"), COMMAND),
    "an import": call(name("importlib", "import_module"), COMMAND),
    "a size that is no size": call(name("torch", "Size"), call(GETATTR, ENCODING, COMMAND)),
    "a layout that is no text": call(name("torch.serialization", "_get_layout"), ENCODING),
    "a value that is no member": call(name(PLANNER, "WriteItemType"), pickle.BININT1 + b"\x63"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    copyreg.add_extension("os", "system", 0xF0)
    yield
    copyreg.remove_extension("os", "system", 0xF0)
    copyreg._extension_cache.clear()  # type: ignore[attr-defined]


@pytest.mark.parametrize("family", PAYLOADS)
def test_payloads_are_refused_in_one_line_and_nothing_runs(family: str) -> None:
    data = pickle.PROTO + b"\x04" + PAYLOADS[family] + pickle.STOP
    with pytest.raises(InputError) as error:
        read_index(data)
    assert "\n" not in str(error.value) and len(str(error.value)) < 200
    assert os.listdir() == []


def test_the_payloads_would_have_run(tmp_path: Path) -> None:
    for family in ("a function", "through a module's imports", "an instance by the old opcode"):
        pickle.loads(pickle.PROTO + b"\x04" + PAYLOADS[family] + pickle.STOP)
        assert os.listdir() == ["executed"], family
        os.unlink("executed")


def index(**changes: Any) -> torch_metadata.Metadata:
    place = torch_metadata.MetadataIndex("layer.weight", torch.Size([0, 0]), 0)
    tensor = torch_metadata.TensorStorageMetadata(
        torch_metadata.TensorProperties(dtype=torch.bfloat16),
        torch.Size([4, 8]),
        [torch_metadata.ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([4, 8]))],
    )
    info = {"relative_path": "__0_0.distcp", "offset": 0, "length": 64} | changes
    return torch_metadata.Metadata({"layer.weight": tensor}, None, {place: _StorageInfo(**info)})


def test_what_torch_writes_is_read_field_by_field() -> None:
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        found: Any = read_index(pickle.dumps(index(), protocol))
        (tensor,) = found.state_dict_metadata.values()
        assert tensor.size == (4, 8) and tensor.properties.dtype == "bfloat16"
        ((place, info),) = found.storage_data.items()
        assert (place.fqn, place.offset) == ("layer.weight", (0, 0))
        assert (info.relative_path, info.offset, info.length) == ("__0_0.distcp", 0, 64)


@pytest.mark.parametrize(
    "changes",
    [
        {"relative_path": "../elsewhere/__0_0.distcp"},
        {"relative_path": "/etc/passwd"},
        {"relative_path": ".."},
        {"offset": -1},
        {"length": 1.5},
    ],
)
def test_places_outside_the_folder_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="as a file of the checkpoint"):
        read_index(pickle.dumps(index(**changes)))


def test_no_name_stands_for_anything_real() -> None:
    for found in checkpoint_metadata._Unpickler.known.values():
        module = getattr(found, "__module__", checkpoint_metadata.__name__)
        assert isinstance(found, str) or module == checkpoint_metadata.__name__
