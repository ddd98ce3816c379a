"""A checkpoint, written under any layout, to a Hugging Face folder, streamed.

Two tensors of a layer are in memory at a time: one is written while the next is read. config.json
describes the model as it was trained: its rope_theta, scaling and maximum positions are those of
the checkpoint's manifest.
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from lctw_megatron.atomic import write_json
from lctw_megatron.config.rope import rope_line
from lctw_megatron.conversion import dtypes, side_files
from lctw_megatron.conversion.checkpoint_reader import CheckpointReader, open_checked
from lctw_megatron.conversion.done_marks import conversion_into, source_of
from lctw_megatron.conversion.finite import check_finite
from lctw_megatron.conversion.hf_config import config_values
from lctw_megatron.conversion.hf_import import Conversion
from lctw_megatron.conversion.placement import StoredTensor, stored_tensors
from lctw_megatron.conversion.safetensors_writer import SafetensorsWriter, plan_files
from lctw_megatron.data.tokenizer_files import CONFIG
from lctw_megatron.model.checkpoint import find_checkpoint, read_manifest
from lctw_megatron.progress import Progress

MAX_FILE_BYTES = 5 * 10**9
"""As transformers' save_pretrained."""


def export_hf(
    checkpoint: Path,
    output: Path,
    dtype: str = dtypes.KEEP,
    max_file_bytes: int = MAX_FILE_BYTES,
    log: Callable[[str], None] = print,
) -> Conversion:
    """Convert ``checkpoint`` (or the newest of a run folder) to the folder ``output``.

    The folder appears whole or not at all. dtype: of the exported weights, `fp32`, `bf16`, `fp16`
    or `keep`. Raises InputError. Notes for the user go through ``log``.
    """
    checkpoint = find_checkpoint(checkpoint)
    manifest = read_manifest(checkpoint)
    tensors = list(stored_tensors(manifest.model))
    reader = open_checked(checkpoint)
    reader.check(tensors)
    name = manifest.dtype if dtype == dtypes.KEEP else dtype
    target = dtypes.TORCH[name]
    shapes = {part.name: part.shape for stored in tensors for part in stored.parts}
    parameters = sum(math.prod(shape) for shape in shapes.values())
    settings = {"step": manifest.step, "dtype": name, "max_shard_bytes": max_file_bytes}
    source = source_of(checkpoint, "lctw-megatron export 1", **settings)
    config_values(manifest.model, name, {})  # refuses what has none, before anything is written
    with conversion_into(output, source, log, [checkpoint]) as folder:
        if folder is None:
            return Conversion(len(shapes), parameters, 0)
        log(f"rope: {rope_line(manifest.model)}")
        files = plan_files(shapes, target, max_file_bytes)
        with SafetensorsWriter(folder, files, target) as writer:
            _write(reader, tensors, writer)
        token_ids = side_files.take_out(checkpoint, manifest, folder)
        write_json(folder / CONFIG, config_values(manifest.model, name, token_ids))
    return Conversion(len(shapes), parameters, parameters * target.itemsize)


def _write(
    reader: CheckpointReader, tensors: list[StoredTensor], writer: SafetensorsWriter
) -> None:
    sizes = [math.prod(stored.shape) * reader.dtype(stored).itemsize for stored in tensors]
    memory = [np.empty(max(sizes), np.uint8) for _ in range(2)]
    with ThreadPoolExecutor(1) as pool, Progress("export", sum(sizes), "B") as progress:
        reading = pool.submit(reader.read, tensors[0], memory[0])
        for number, stored in enumerate(tensors):
            value = reading.result()
            if number + 1 < len(tensors):  # read while this one is written
                free = memory[(number + 1) % 2]
                reading = pool.submit(reader.read, tensors[number + 1], free)
            for part in stored.parts:
                writer.begin(part.name)
                for block in part.blocks:
                    rows = value[block.row : block.row + block.rows]
                    check_finite(rows, writer.dtype, stored.key + stored.where, reader.checkpoint)
                    writer.write(rows)
            progress.update(value.nbytes, tensors=len(stored.parts))
