"""A checkpoint folder: megatron-core's distributed checkpoint and our manifest.

    CHECKPOINT/
      checkpoint.json       the manifest: format, step, model, tokenizer, run (CheckpointManifest)
      .metadata, *.distcp   weights (and optimizer state) in torch's distributed checkpoint format,
      metadata.json         written by megatron-core; loadable under any layout
      common.pt             what is no tensor; from megatron-core 0.19 on it is in the .distcp files
      tokenizer/            Hugging Face tokenizer files, if the run had a tokenizer

The folder gets its name only when everything in it is on the disk: a folder with a manifest is
complete. A run's folder holds `checkpoints/step_00000100/`, ...
"""

import errno
import hashlib
import io
import json
import math
import pickle
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from pydantic import ValidationError

from lctw_megatron.atomic import write_json
from lctw_megatron.config.schema import ModelConfig, RunConfig, Section
from lctw_megatron.data.json_object import read_json, read_json_object
from lctw_megatron.errors import InputError, one_line
from lctw_megatron.model.checkpoint_folder import MANIFEST, newest_complete
from lctw_megatron.model.checkpoint_metadata import read_index
from lctw_megatron.model.checksums import check_sums_together, folder_names, sum_files
from lctw_megatron.model.initialize import sharded_parameters, sharding
from lctw_megatron.model.not_taken import check_weights_taken
from lctw_megatron.platform.world import first_rank_decides

TOKENIZER = "tokenizer"
FORMAT = "lctw-megatron checkpoint 1"
EXTRA_STATE = "_extra_state"
"""How the names of a module's extra state end."""


class CheckpointManifest(Section):
    """What a checkpoint holds."""

    format: Literal["lctw-megatron checkpoint 1"] = FORMAT  # type: ignore[assignment]
    step: int
    """Optimizer steps behind it; 0 for imported weights."""
    model: ModelConfig
    """The model, its vocabulary and maximum positions filled in."""
    dtype: Literal["fp32", "bf16", "fp16"]
    """dtype of the stored weights."""
    tokenizer: dict[str, Any] | None = None
    """Identity of the tokenizer, as in a token dataset's manifest."""
    run: RunConfig | None = None
    """The run that wrote it."""
    start: str | None = None
    """What it began with: the ``identity`` of its start. None: with random weights, or
    not known, as in older checkpoints."""
    skipped: int = 0
    """Steps that were left out so far, of training.nonfinite_budget."""
    ranks: int | None = None
    """How many ranks it had."""
    loader: dict[str, Any] | None = None
    """Where the data loader stood."""
    optimizer: bool = False
    """Whether the optimizer state is in it."""
    machine: str | None = None
    """The machine and the versions that trained it: platform.capabilities."""
    checksums: dict[str, str] | None = None
    """CRC-32 of every other file (checksums.py). None, as in older checkpoints: not compared."""

    @property
    def identity(self) -> str | None:
        """`step N, DIGEST`, with a digest of the checksums of the stored tensors, wherever the
        folder lies; None without checksums."""
        sums = {k: v for k, v in (self.checksums or {}).items() if k.endswith(".distcp")}
        digest = hashlib.blake2b(json.dumps(sums, sort_keys=True).encode(), digest_size=8)
        return f"step {self.step}, {digest.hexdigest()}" if sums else None


def find_checkpoint(path: str | Path) -> Path:
    """What ``newest_complete`` finds. InputError if that is nothing."""
    if found := newest_complete(Path(path)):
        return found
    raise InputError(
        f"{path}: no complete checkpoint found (a folder with {MANIFEST}, or a run folder with "
        "checkpoints/step_*); train, or import one with tools/convert.py"
    )


def read_manifest(checkpoint: str | Path) -> CheckpointManifest:
    path = Path(checkpoint) / MANIFEST
    try:
        return CheckpointManifest.model_validate(read_json(path))
    except FileNotFoundError:
        raise InputError(f"{path}: missing, so {checkpoint} is no complete checkpoint") from None
    except ValidationError as error:
        found = str(error).splitlines()[0]
        raise InputError(f"{path}: damaged or of another version ({found})") from None


def agreed_checkpoint(path: str | Path) -> tuple[Path, CheckpointManifest]:
    """The checkpoint that ``path`` stands for (``find_checkpoint``) and its manifest, as the first
    rank sees them. All ranks call it."""

    def look() -> tuple[Path, CheckpointManifest]:
        checkpoint = find_checkpoint(path)
        return checkpoint, read_manifest(checkpoint)

    return first_rank_decides(look)


def write_manifest(
    folder: Path, manifest: CheckpointManifest, sums: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Complete ``folder`` with the manifest, which gets the checksums of all its files: ``sums``,
    made by those who wrote them, and for the others made here."""
    rest = [name for name in folder_names(folder) if name != MANIFEST and name not in sums]
    found = dict(sorted({**sums, **sum_files(folder, rest)}.items()))
    whole = manifest.model_copy(update={"checksums": found})
    write_json(folder / MANIFEST, whole.model_dump(mode="json"))


def check_tensor_files(checkpoint: Path) -> Any:
    """Refuse a checkpoint with missing or cut files of tensors, or with an index that would run
    code when loaded. Returns the index (checkpoint_metadata.read_index)."""
    for name in (".metadata", "metadata.json"):
        if not (checkpoint / name).is_file():
            raise InputError(_missing(checkpoint / name))
    if not isinstance(read_json_object(checkpoint / "metadata.json").get("sharded_backend"), str):
        raise InputError(f"{checkpoint / 'metadata.json'}: damaged (it names no sharded_backend)")
    path = checkpoint / ".metadata"
    try:
        metadata: Any = read_index(path.read_bytes())
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    sizes: dict[str, int] = {}
    for info in metadata.storage_data.values():
        end = info.offset + info.length
        sizes[info.relative_path] = max(sizes.get(info.relative_path, 0), end)
    for name, size in sizes.items():
        path = checkpoint / name
        found = path.stat().st_size if path.is_file() else None
        if found is None or found < size:
            raise InputError(
                f"{path}: {'missing' if found is None else f'{found} bytes'}, expected {size} "
                "bytes; the checkpoint is damaged, use another"
            )
    return metadata


def check_files(checkpoint: Path) -> Any:
    """Refuse a checkpoint with missing or cut files, or that would run code when loaded. Returns
    its index (checkpoint_metadata.read_index).

    Three parts of it are pickles, and torch and megatron-core read some of them with an
    unrestricted unpickler (torch.distributed.checkpoint's `.metadata` and the items in the data
    files that are no tensors). Here they are read first: the one by checkpoint_metadata.py, the
    others by torch's own that knows tensors and plain values only.
    """
    metadata = check_tensor_files(checkpoint)
    places = metadata.storage_data.items()
    common = checkpoint / "common.pt"
    if common.is_file():
        _check_pickled(common)
    # From megatron-core 0.19 on it is one of the items.
    elif not any(item.fqn.startswith("common_state/") for item, _ in places):
        raise InputError(_missing(common))
    for item, info in places:
        if not hasattr(metadata.state_dict_metadata.get(item.fqn), "chunks"):  # not a tensor
            value = _check_pickled(checkpoint / info.relative_path, info.offset, info.length)
            if f".{EXTRA_STATE}/" in item.fqn and _holds_something(value):
                raise InputError(
                    f"{checkpoint}: {item.fqn} is not empty: it holds the scales of FP8 weights, "
                    "which nothing here reads; save it from a run without FP8"
                )
    return metadata


def agreed_index(checkpoint: Path) -> Any:
    """``check_files`` by the first rank, and the index for all. All ranks call it."""

    def look() -> bytes:
        check_files(checkpoint)
        return (checkpoint / ".metadata").read_bytes()

    return read_index(first_rank_decides(look))


def _missing(path: Path) -> str:
    return f"{path}: missing; the checkpoint is damaged, use another"


def _check_pickled(path: Path, offset: int = 0, length: int = -1) -> Any:
    """What torch.save wrote there. Refused if it holds more than tensors and plain values."""
    with open(path, "rb") as file:
        file.seek(offset)
        data = io.BytesIO(file.read(length))
    try:
        return torch.load(data, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's own advice would be to allow everything
        raise InputError(
            f"{path}: damaged, or holds what does not belong in a checkpoint "
            f"({type(error).__name__}); use another"
        ) from None


def load_weights(chunks: list[Any], checkpoint: str | Path) -> None:
    """Load the weights into this rank's model chunks, whatever layout wrote them. All ranks call
    it.

    Raises InputError if the checkpoint is damaged or names or shapes differ.
    """
    checkpoint = Path(checkpoint)
    sums = first_rank_decides(lambda: read_manifest(checkpoint).checksums or {})
    check_sums_together(checkpoint, sums)
    index = agreed_index(checkpoint)
    shards = [shard for _, shard in sharded_parameters(chunks)]
    check_weights_taken(shards, checkpoint, index)
    load_shards(shards, checkpoint, index)


def load_shards(shards: list[Any], checkpoint: Path, index: Any) -> dict[str, Any]:
    """Fill the data of megatron-core ShardedTensors; returns what the checkpoint holds besides
    tensors. index: what ``check_files`` gave. All ranks call it.

    What several data-parallel ranks ask for one of them reads and sends to the others. Nothing is
    asked for but tensors: extra states of modules are empty (``check_files`` looked).
    Raises InputError if the checkpoint is damaged or holds another model.
    """
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from megatron.core.dist_checkpointing.strategies.fully_parallel import (
        FullyParallelLoadStrategyWrapper,
    )
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
    from torch.distributed.checkpoint import CheckpointException

    _check_complete(checkpoint, index.state_dict_metadata)
    places = {str(number): shard.data.detach() for number, shard in enumerate(shards)}
    strategy = FullyParallelLoadStrategyWrapper(
        TorchDistLoadShardedStrategy(),
        parallel_state.get_data_parallel_group(with_context_parallel=True),
    )
    try:
        loaded = dist_checkpointing.load(
            {"shards": dict(zip(places, shards, strict=True))},
            str(checkpoint),
            strategy,
            # Copies may be loaded by several groups; that all is there was seen in the index.
            validate_access_integrity=False,
        )
    except CheckpointException as error:  # gathered from all ranks, raised on all
        reasons = [cause[0] for cause in error.failures.values()]
        if any(map(_is_machines_fault, reasons)):
            raise RuntimeError(f"{checkpoint}: {reasons}") from error
        raise _unloadable(checkpoint, reasons[0]) from None
    except CheckpointingException as error:
        raise _unloadable(checkpoint, error) from None
    except Exception as error:
        if _is_machines_fault(error):
            raise
        raise _unloadable(checkpoint, error) from None
    for number, value in loaded.pop("shards").items():
        if value.data_ptr() != places[number].data_ptr():  # not filled in its place
            places[number].copy_(value.view(places[number].shape))
    return loaded


def _holds_something(value: Any) -> bool:
    """Whether an extra state is more than an empty tensor, None or (megatron-core) a list of it."""
    if isinstance(value, list | tuple):
        return any(map(_holds_something, value))
    return value is not None and not (isinstance(value, torch.Tensor) and value.numel() == 0)


def _check_complete(checkpoint: Path, entries: dict[str, Any]) -> None:
    """Refuse an index whose boxes leave out some of a tensor: torch would load what was in the
    memory before."""
    for name, entry in entries.items():
        if hasattr(entry, "chunks"):
            whole, stored = math.prod(entry.size), sum(math.prod(c.sizes) for c in entry.chunks)
            if whole != stored:
                raise InputError(
                    f"{checkpoint}: {stored} of {whole} elements of {name} are stored; it is "
                    "damaged, use another"
                )


def _is_machines_fault(error: BaseException) -> bool:
    """Another try, on another node, may go well: memory, a broken connection, a failing disk."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError | torch.distributed.DistError):
        return True
    if isinstance(error, OSError):
        return error.errno not in (None, errno.ENOENT)
    return isinstance(error, RuntimeError) and bool(_CONNECTION.search(str(error)))


_CONNECTION = re.compile("gloo|nccl|connection|cuda error|timed out", re.IGNORECASE)


def _unloadable(checkpoint: Path, error: BaseException) -> InputError:
    # torch's words about a damaged pickle end with the advice to trust it.
    pickled = isinstance(error, pickle.UnpicklingError)
    reason = type(error).__name__ if pickled else one_line(error)
    return InputError(
        f"{checkpoint}: cannot be loaded ({reason}); it is damaged or holds another model"
    )


def model_state(chunks: list[Any]) -> dict[str, Any]:
    """The sharded state dict of the weights; chunk i under `model` or, with VPP, `model<i>`."""
    if len(chunks) == 1:
        return {"model": chunks[0].sharded_state_dict(metadata=sharding())}
    return {f"model{i}": c.sharded_state_dict(metadata=sharding()) for i, c in enumerate(chunks)}


def checkpoint_digest(checkpoint: str | Path) -> str:
    """blake2b-128 over the names and bytes of the data files: the identity of a frozen scorer."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(Path(checkpoint).glob("*.distcp")):
        digest.update(path.name.encode())
        with open(path, "rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    manifest = read_json_object(Path(checkpoint) / MANIFEST)
    digest.update(json.dumps(manifest["model"], sort_keys=True).encode())
    return digest.hexdigest()


def checkpoint_model(*places: str) -> ModelConfig:
    """The model of the checkpoint at the first of ``places`` that has one (see
    ``find_checkpoint``). Raises what is wrong with the first, an InputError, if none has."""
    try:
        return read_manifest(find_checkpoint(places[0])).model
    except InputError:
        for place in places[1:]:
            with suppress(InputError):
                return read_manifest(find_checkpoint(place)).model
        raise
