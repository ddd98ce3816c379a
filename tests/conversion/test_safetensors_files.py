"""Safetensors files as they are written and read: which tensor is in which, and what is mapped."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from lctw_megatron.conversion import hf_safetensors
from lctw_megatron.conversion.hf_safetensors import SafetensorsFolder, read_header
from lctw_megatron.conversion.safetensors_writer import (
    SafetensorsWriter,
    parse_size,
    plan_files,
)
from lctw_megatron.errors import InputError
from tests.conversion.hf_models import make_model


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("originals")
    make_model("llama", folder / "sharded", shard_size="100KB")
    make_model("qwen2", folder / "single")
    return folder


@given(
    st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3), min_size=1, max_size=12),
    st.integers(1, 600),
)
def test_shards_hold_every_tensor_once_in_order_and_keep_the_limit(shapes, limit):
    tensors = {f"t{i}": tuple(shape) for i, shape in enumerate(shapes)}
    planned = plan_files(tensors, torch.bfloat16, limit)
    assert [n for shard in planned for n in shard.tensors] == list(tensors)
    for shard in planned:
        size = sum(2 * torch.Size(shape).numel() for shape in shard.tensors.values())
        assert size <= limit or len(shard.tensors) == 1
    assert len({shard.name for shard in planned}) == len(planned)


@pytest.mark.parametrize("limit", [10**9, 3000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_written_is_what_the_safetensors_library_and_we_read(limit, dtype, tmp_path):
    tensors = {f"layer.{i}.weight": torch.randn(7 + i, 5, 3) for i in range(9)}
    planned = plan_files({n: tuple(t.shape) for n, t in tensors.items()}, dtype, limit)
    with SafetensorsWriter(tmp_path, planned, dtype) as writer:
        for name, tensor in tensors.items():
            writer.begin(name)
            writer.write(tensor[:2].contiguous())
            writer.write(tensor[2:].contiguous())
    read = {}
    for path in sorted(tmp_path.glob("*.safetensors")):
        read |= load_file(path)
        assert read_header(path)
    with SafetensorsFolder(tmp_path) as source:
        for name, tensor in tensors.items():
            assert torch.equal(read[name], tensor.to(dtype))
            rows = torch.empty(3, 5, 3, dtype=dtype)
            source.read_rows(name, 4, rows)
            assert torch.equal(rows, tensor[4:7].to(dtype))
            wide = torch.empty(3, 5, 3)
            source.read_rows(name, 4, wide)
            assert torch.equal(wide, tensor[4:7].to(dtype).float())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc to list what is mapped")
def test_only_the_file_of_the_tensor_read_last_is_mapped_into_memory(originals):
    def mapped() -> int:
        maps = Path("/proc/self/maps").read_text()
        return sum(path.name in maps for path in (originals / "sharded").glob("*.safetensors"))

    most = 0
    with SafetensorsFolder(originals / "sharded") as source:
        for name, entry in source.entries.items():
            source.read_rows(name, 0, torch.empty(entry.shape))
            most = max(most, mapped())
    assert most == 1 and mapped() == 0


@pytest.mark.parametrize("limit, expected", [(1 << 28, 1), (0, 12)])
def test_a_file_is_opened_again_only_for_the_memory_of_what_was_read(
    originals, monkeypatch, limit, expected
):
    """A header that names thousands of experts takes longer than to read one of them."""
    monkeypatch.setattr(hf_safetensors, "_MOST_MAPPED", limit)
    opened = []
    real = hf_safetensors.safe_open
    with SafetensorsFolder(originals / "single") as source:
        monkeypatch.setattr(hf_safetensors, "safe_open", lambda *of: opened.append(of) or real(*of))
        for name in list(source.entries)[:12]:
            source.read_rows(name, 0, torch.empty(source.entries[name].shape))
    assert len(opened) == expected


@pytest.mark.parametrize(
    "text, size",
    [("5GB", 5 * 10**9), ("2GiB", 2**31), ("1.5 MB", 1500000), ("700", 700), ("3kb", 3000)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5XB", "-1GB", "0", "five"])
def test_sizes_that_are_none(text):
    with pytest.raises(InputError, match="5GB"):
        parse_size(text)
