"""Reads single layers out of a checkpoint, whatever layout wrote it: no process group, no model."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.utils import _create_file_view

from lctw_megatron.conversion.hf_safetensors import as_bytes, tensor_of
from lctw_megatron.conversion.placement import StoredTensor
from lctw_megatron.errors import InputError, few
from lctw_megatron.model.checkpoint import check_files, read_manifest
from lctw_megatron.model.checksums import check_sums

_WEIGHTS = ("embedding.", "decoder.", "output_layer.")


class CheckpointReader:
    """The weights of a checkpoint folder whose files were found good (``open_checked``)."""

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self._metadata: Metadata = FileSystemReader(checkpoint).read_metadata()
        self._boxes: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # where they begin and end

    def shape(self, key: str) -> tuple[int, ...] | None:
        """Of the whole tensor ``key``; None if there is none."""
        entry = self._metadata.state_dict_metadata.get(key)
        return tuple(entry.size) if isinstance(entry, TensorStorageMetadata) else None

    def check(self, tensors: list[StoredTensor], described: str = "its manifest") -> None:
        """Raise InputError naming all weights that are missing, unknown or wrongly shaped.
        ``described``: where ``tensors`` come from."""
        wanted = {stored.key: stored.global_shape for stored in tensors}
        found = {
            key: tuple(entry.size)
            for key, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and key.startswith(_WEIGHTS)
        }
        problems = [f"{key} is missing" for key in wanted if key not in found]
        problems += [f"{key} is unknown" for key in found if key not in wanted]
        problems += [
            f"{key} is {list(found[key])}, expected {list(shape)}"
            for key, shape in wanted.items()
            if found.get(key, shape) != shape
        ]
        if problems:
            raise InputError(
                f"{self.checkpoint}: its weights are not those of {described}: "
                + few(problems, "; ")
            )

    def dtype(self, stored: StoredTensor) -> torch.dtype:
        return self._entry(stored).properties.dtype

    def read(self, stored: StoredTensor, memory: np.ndarray) -> Tensor:
        """One layer, contiguous [stored.shape], read from the boxes that hold it into ``memory``
        (uint8, large enough), whose first bytes the tensor is."""
        entry = self._entry(stored)
        wanted = ChunkStorageMetadata(torch.Size(stored.offsets), torch.Size(stored.box))
        items = create_read_items_for_chunk_list(stored.key, self._near(stored), [wanted])
        covered = sum(math.prod(item.lengths) for item in items)
        if covered != math.prod(stored.box):
            raise InputError(
                f"{self.checkpoint}: {covered} of {math.prod(stored.box)} elements of "
                f"{stored.key}{stored.where}, are stored; the checkpoint is damaged"
            )
        value = tensor_of(memory, entry.properties.dtype, stored.box)
        for item in items:
            self._fill(_narrow(value, item.dest_offsets, item.lengths), item)
        return value.view(stored.shape)

    def _fill(self, place: Tensor, item: ReadItem) -> None:
        """Read ``item`` into ``place``."""
        info = self._metadata.storage_data[item.storage_index]
        path = self.checkpoint / info.relative_path
        try:
            with open(path, "rb") as file:
                part: Any = _create_file_view(file, info.offset, info.length)  # type: ignore[arg-type]
                # Without its data: how the box lies in the archive that torch.save wrote.
                box = torch.load(part, map_location="meta", weights_only=True)
                begin = getattr(box.untyped_storage(), "_checkpoint_offset", None)
                plain = box.is_contiguous() and box.storage_offset() == 0
                if (
                    begin is not None  # torch 2.6 does not say
                    and plain
                    and (box.shape, box.dtype) == (place.shape, place.dtype)
                    and place.is_contiguous()
                ):
                    part.seek(begin)
                    if part.readinto(as_bytes(place)) != place.nbytes:
                        raise EOFError("the file ends too early")
                    return
                part.seek(0)
                box = torch.load(part, map_location="cpu", weights_only=True)
                place.copy_(_narrow(box, item.storage_offsets, item.lengths))
        except Exception as error:  # whatever a damaged archive makes torch raise
            found = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(
                f"{path}: {item.storage_index.fqn} cannot be read ({found}); the checkpoint is "
                "damaged, use another"
            ) from None

    def _near(self, stored: StoredTensor) -> TensorStorageMetadata:
        """Of all boxes those that hold some of ``stored``. torch looks at each in Python, which
        takes longer than reading where every expert of every layer has its own: 6,144 of them in
        Qwen3-30B-A3B."""
        entry = self._entry(stored)
        if stored.key not in self._boxes:
            corners = [(chunk.offsets, chunk.sizes) for chunk in entry.chunks]
            begins, sizes = np.array(corners).reshape(-1, 2, len(stored.box)).swapaxes(0, 1)
            self._boxes[stored.key] = begins, begins + sizes
        begins, ends = self._boxes[stored.key]
        below = begins < np.add(stored.offsets, stored.box)
        near = np.flatnonzero((below & (ends > stored.offsets)).all(axis=1))
        return replace(entry, chunks=[entry.chunks[number] for number in near])

    def _entry(self, stored: StoredTensor) -> TensorStorageMetadata:
        entry = self._metadata.state_dict_metadata[stored.key]
        assert isinstance(entry, TensorStorageMetadata)
        return entry


def open_checked(checkpoint: Path) -> CheckpointReader:
    """The reader of a checkpoint of ours. InputError for what its checks find."""
    check_sums(checkpoint, read_manifest(checkpoint).checksums or {})
    check_files(checkpoint)
    return CheckpointReader(checkpoint)


def _narrow(tensor: Tensor, offsets: Sequence[int], lengths: Sequence[int]) -> Tensor:
    """The box at ``offsets`` as a view."""
    for axis, (start, length) in enumerate(zip(offsets, lengths, strict=True)):
        tensor = tensor.narrow(axis, start, length)
    return tensor
