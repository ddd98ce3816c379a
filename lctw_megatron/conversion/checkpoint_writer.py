"""Writes a model checkpoint tensor by tensor: no process group, no model, one tensor in memory.

The files are those that megatron-core's dist_checkpointing writes in its `torch_dist` format:

    __0_0.distcp, ...   tensors, one torch.save after the other; several files, so that ranks that
                        load different layers read different ones
    .metadata           torch.distributed.checkpoint's Metadata: every tensor's shape, the boxes it
                        is stored in, and each box's file, offset and length
    common.pt           what is no tensor: the marks of megatron-core, and what else is given
    metadata.json       megatron-core's name of the format

torch.distributed.checkpoint's own writer is used for `.metadata` only: its `write_data` keeps a
reference to the last tensor of every name, which would double the memory.
"""

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from lctw_megatron.atomic import write_json
from lctw_megatron.closing import Closing
from lctw_megatron.conversion.placement import StoredTensor

FILE_BYTES = 10**9
"""A new file is begun when one has become this large."""

_CONTENT = {"distrib_optim_sharding_type": "fully_reshardable"}
"""As megatron-core marks the layout-independent checkpoints of training."""

_LAYER_STATES = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "self_attention.core_attention",
    "self_attention.q_layernorm",
    "self_attention.k_layernorm",
)
_MLP_STATES = ("mlp.linear_fc1", "mlp.linear_fc2")
"""Modules of a layer that have an `_extra_state` object in megatron-core's sharded state dict:
always empty for its own linear layers, FP8 scales for TransformerEngine's modules. Empty ones are
written for all of them, so that loading finds what it asks for whichever layers the model has."""


@contextmanager
def _no_checksums() -> Iterator[None]:
    """torch never reads the checksums of its archives, and making them halves the speed."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _save(value: Any, file: IO[bytes]) -> None:
    """torch.save, whose archive ends in an error of its own when a write fails, which hides what
    the operating system said (a full disk)."""
    try:
        torch.save(value, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


class CheckpointFiles(Closing):
    """``add`` every tensor and leave the context: without an error the files are complete.

    common: what else belongs into common.pt.
    """

    def __init__(self, folder: Path, common: Mapping[str, Any] = MappingProxyType({})) -> None:
        self._folder = folder
        self._common = common
        self._file: IO[bytes] | None = None
        self._files = 0
        self._metadata = Metadata(state_dict_metadata={})
        self._results: list[WriteResult] = []

    def add(self, stored: StoredTensor, value: Tensor) -> None:
        """Write ``value`` (stored.shape, contiguous, owning no more memory than it shows)."""
        tensors = self._metadata.state_dict_metadata
        if stored.key not in tensors:
            tensors[stored.key] = TensorStorageMetadata(
                TensorProperties(dtype=value.dtype), torch.Size(stored.global_shape), []
            )
        offsets = torch.Size(stored.offsets)
        box = ChunkStorageMetadata(offsets, torch.Size(stored.box))
        chunks = tensors[stored.key].chunks  # type: ignore[union-attr]
        chunks.append(box)
        file = self._open()
        begin = file.tell()
        with _no_checksums():
            _save(value.view(stored.box), file)
        self._wrote(MetadataIndex(stored.key, offsets, len(chunks) - 1), begin)

    def add_empty_states(self, tensors: list[StoredTensor]) -> None:
        """Write the `_extra_state` objects of the model that has these tensors."""
        layers = max(stored.stack for stored in tensors)[0]
        experts = max((stored.stack[1] for stored in tensors if len(stored.stack) > 1), default=0)
        names = [
            f"decoder.layers.{module}._extra_state/shard_{layer}_{layers}"
            for layer in range(layers)
            for module in (*_LAYER_STATES, *(() if experts else _MLP_STATES))
        ]
        names += [
            f"decoder.layers.mlp.experts.experts.{module}._extra_state/"
            f"shard_{layer}.{expert}_{layers}.{experts}"
            for layer in range(layers)
            for expert in range(experts)
            for module in ("linear_fc1", "linear_fc2")
        ]
        buffer = io.BytesIO()
        torch.save([None], buffer)  # a list of this rank's parts, as megatron-core writes it
        for name in [*names, "decoder.final_layernorm._extra_state/shard_0_1"]:
            self._metadata.state_dict_metadata[name] = BytesStorageMetadata()
            file = self._open()
            begin = file.tell()
            file.write(buffer.getbuffer())
            self._wrote(MetadataIndex(name), begin)

    def close(self) -> None:
        self._close_file()
        FileSystemWriter(self._folder).finish(self._metadata, [self._results])
        with open(self._folder / "common.pt", "wb") as file:
            _save({**self._common, "content_metadata": _CONTENT}, file)
        write_json(
            self._folder / "metadata.json",
            {
                "sharded_backend": "torch_dist",
                "sharded_backend_version": 1,
                "common_backend": "torch",
                "common_backend_version": 1,
            },
        )

    def give_up(self, error: BaseException) -> None:
        self._close_file()

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> IO[bytes]:
        """The current file, or a new one once it is full."""
        if self._file is not None and self._file.tell() >= FILE_BYTES:
            self._close_file()
        if self._file is None:
            name = f"__0_{self._files}.distcp"
            self._file = open(self._folder / name, "wb")  # noqa: SIM115  closed when full, or at exit
            self._files += 1
        return self._file

    def _wrote(self, index: MetadataIndex, begin: int) -> None:
        assert self._file is not None
        length = self._file.tell() - begin
        info = _StorageInfo(f"__0_{self._files - 1}.distcp", begin, length)
        self._results.append(WriteResult(index, length, info))
