"""A Hugging Face folder to a checkpoint, streamed: one tensor of one layer in memory at a time,
and what is mapped of the file that it is read from.

Everything is checked before anything is written: the configuration, the header of every file, and
that the tensors are exactly those of the architecture.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lctw_megatron.config.rope import rope_line
from lctw_megatron.config.schema import ModelConfig
from lctw_megatron.conversion import dtypes, side_files
from lctw_megatron.conversion.checkpoint_writer import CheckpointFiles
from lctw_megatron.conversion.done_marks import conversion_into
from lctw_megatron.conversion.fused_experts import split_fused
from lctw_megatron.conversion.hf_config import read_config
from lctw_megatron.conversion.hf_safetensors import SafetensorsFolder, tensor_of
from lctw_megatron.conversion.placement import StoredTensor, stored_tensors
from lctw_megatron.conversion.weightless import FREQUENCY_NAMES, is_weightless
from lctw_megatron.data.tokenizer_files import CONFIG, tokenizer_files
from lctw_megatron.errors import InputError, few
from lctw_megatron.model.checkpoint import CheckpointManifest, write_manifest
from lctw_megatron.progress import Progress

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Conversion:
    """What a conversion did."""

    tensors: int
    """Hugging Face tensors."""
    parameters: int
    bytes: int
    """Of the converted weights; 0 if the output was there already."""


def import_hf(
    hf: Path, output: Path, dtype: str = dtypes.KEEP, log: Callable[[str], None] = print
) -> Conversion:
    """Convert the folder ``hf`` to the checkpoint folder ``output``.

    It appears whole or not at all. dtype: of the stored weights, `fp32`, `bf16`, `fp16` or `keep`.
    Raises InputError naming all that is wrong with the folder. Notes for the user go through
    ``log``.
    """
    config = read_config(hf)
    tensors = list(stored_tensors(config.model))
    if config.ignored:
        log(f"{hf / CONFIG}: without meaning for {config.model.architecture}: "
            + ", ".join(config.ignored))  # fmt: skip
    for note in config.notes:
        log(note)
    with SafetensorsFolder(hf) as source:
        if passed := check_tensors(source, config.model, tensors):
            log(f"{hf}: hold no weights, left out: {few(passed, most=2)}")
        name = _target_dtype(source, tensors, dtype)
        sizes = [math.prod(part.shape) for stored in tensors for part in stored.parts]
        source_of = _source(hf, source, name)
        manifest = CheckpointManifest(
            step=0,
            model=config.model,
            dtype=name,  # type: ignore[arg-type]
            tokenizer=side_files.tokenizer_identity(hf),
        )
        with conversion_into(output, source_of, log, [hf]) as folder:
            if folder is None:
                return Conversion(len(sizes), sum(sizes), 0)
            log(f"rope: {rope_line(config.model)}")
            side_files.bring_in(hf, folder, log)
            _write(source, tensors, dtypes.TORCH[name], folder)
            write_manifest(folder, manifest)
    return Conversion(len(sizes), sum(sizes), sum(sizes) * dtypes.TORCH[name].itemsize)


def check_tensors(
    source: SafetensorsFolder, model: ModelConfig, tensors: list[StoredTensor]
) -> list[str]:
    """Raise InputError naming every tensor that is missing, unknown, of another shape or dtype.

    Two kinds of tensors that say nothing new may be there if they say nothing false: a copy of tied
    embeddings, and what holds no weights (``weightless``), which is returned.
    """
    split_fused(source.entries, tensors)
    passed = []
    wanted = {part.name: part.shape for stored in tensors for part in stored.parts}
    found = source.entries
    problems = [f"{name} is missing" for name in wanted if name not in found]
    for name, entry in found.items():
        if name in wanted:
            if entry.shape != wanted[name]:
                problems.append(f"{name} is {list(entry.shape)}, expected {list(wanted[name])}")
            if entry.dtype not in dtypes.BY_SAFETENSORS:
                problems.append(f"{name} has dtype {entry.dtype}")
        elif name == _HEAD and model.tie_word_embeddings:
            if _EMBEDDING in found and not _equal(source, _HEAD, _EMBEDDING):
                problems.append(f"{name} differs from {_EMBEDDING}, although config.json ties them")
        elif is_weightless(source, name, model):
            passed.append(name)
        elif name.endswith(FREQUENCY_NAMES):
            problems.append(f"{name} does not follow from rope_theta {model.rope_theta:g}")
        else:
            problems.append(f"{name} is unknown")
    if problems:
        raise InputError(
            f"{source.folder}: the tensors are not those of its config.json: "
            + (_prefixed(list(found), list(wanted)) or few(problems, "; "))
        )
    return passed


def _prefixed(found: list[str], wanted: list[str]) -> str | None:
    """What wrappers (torch.compile, multimodal models) do to every name, if that is the reason."""
    for name in found:
        prefix = name.removesuffix(wanted[0])
        if prefix.endswith(".") and name != prefix:
            count = sum(other.startswith(prefix) for other in found)
            share = f"all {count}" if count == len(found) else f"{count} of {len(found)}"
            return (
                f"{share} names begin with {prefix}, expected e.g. {wanted[0]}; save the model "
                "inside its wrapper, or rename them"
            )
    return None


def read_stored(
    source: SafetensorsFolder, stored: StoredTensor, out: Tensor, check: bool = False
) -> None:
    """Fill ``out`` (stored.shape) from the folder: parts in place, padding rows zero. ``check``: as
    of ``read_rows``."""
    for part in stored.parts:
        for block in part.blocks:
            rows = out[block.row : block.row + block.rows]
            source.read_rows(part.name, block.hf_row, rows, check)
    out[stored.covered_rows :].zero_()


def largest_bytes(tensors: list[StoredTensor], dtype: torch.dtype) -> int:
    return max(math.prod(stored.shape) for stored in tensors) * dtype.itemsize


def _write(
    source: SafetensorsFolder, tensors: list[StoredTensor], dtype: torch.dtype, folder: Path
) -> None:
    memory = np.empty(largest_bytes(tensors, dtype), np.uint8)
    total = sum(math.prod(stored.shape) for stored in tensors) * dtype.itemsize
    with Progress("import", total, "B") as progress, CheckpointFiles(folder) as files:
        for stored in tensors:
            value = tensor_of(memory, dtype, stored.shape)
            read_stored(source, stored, value, check=True)
            files.add(stored, value)
            progress.update(value.nbytes, tensors=len(stored.parts))
        files.add_empty_states(tensors)


def _target_dtype(source: SafetensorsFolder, tensors: list[StoredTensor], wanted: str) -> str:
    if wanted != dtypes.KEEP:
        return wanted
    names = [part.name for stored in tensors for part in stored.parts]
    kinds = sorted({dtypes.name_of(source.dtype(name)) for name in names})
    if len(kinds) > 1:
        counts = (
            f"{sum(dtypes.name_of(source.dtype(name)) == kind for name in names)} in {kind}"
            for kind in kinds
        )
        raise InputError(f"{source.folder}: tensors {', '.join(counts)}; choose one with --dtype")
    return kinds[0]


def _source(hf: Path, source: SafetensorsFolder, dtype: str) -> dict[str, Any]:
    """What the checkpoint is made from: every file's size and time."""
    paths = {entry.file for entry in source.entries.values()}
    paths |= {hf / CONFIG, *tokenizer_files(hf)}
    return {"format": "lctw-megatron import 1", "dtype": dtype, "files": stamps(paths)}


def stamps(paths: set[Path]) -> dict[str, list[int]]:
    """Size and time of those that are there, by name."""
    return {
        path.name: [path.stat().st_size, path.stat().st_mtime_ns]
        for path in sorted(paths)
        if path.is_file()
    }


def _equal(source: SafetensorsFolder, one: str, other: str) -> bool:
    """Whether two tensors are the same, compared a few rows at a time."""
    a, b = source.entries[one], source.entries[other]
    if a.shape != b.shape or a.dtype != b.dtype or a.dtype not in dtypes.BY_SAFETENSORS:
        return False
    width = math.prod(a.shape[1:]) * source.dtype(one).itemsize
    step = max(1, (1 << 26) // max(1, width))
    for row in range(0, a.shape[0], step):
        shape = (min(step, a.shape[0] - row), *a.shape[1:])
        parts = [torch.empty(shape, dtype=source.dtype(one)) for _ in range(2)]
        source.read_rows(one, row, parts[0])
        source.read_rows(other, row, parts[1])
        if not torch.equal(parts[0].view(torch.uint8), parts[1].view(torch.uint8)):
            return False
    return True
