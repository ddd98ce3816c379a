"""A folder that Megatron-LM has saved (`--ckpt-format torch_dist`) to a checkpoint, streamed.

Only its tensors are read, under any of its layouts. What the model is comes from the Hugging Face
folder of the same model, with the tokenizer: Megatron-LM's own arguments are a pickle that names
classes (common.pt), which is never opened here.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from lctw_megatron.config.rope import rope_line
from lctw_megatron.conversion import dtypes, side_files
from lctw_megatron.conversion.checkpoint_reader import CheckpointReader
from lctw_megatron.conversion.checkpoint_writer import CheckpointFiles
from lctw_megatron.conversion.done_marks import conversion_into
from lctw_megatron.conversion.finite import check_finite
from lctw_megatron.conversion.hf_config import read_config
from lctw_megatron.conversion.hf_import import Conversion, largest_bytes, stamps
from lctw_megatron.conversion.hf_safetensors import tensor_of
from lctw_megatron.conversion.megatron_lm import TRACKER
from lctw_megatron.conversion.placement import StoredTensor, stored_tensors
from lctw_megatron.data.tokenizer_files import CONFIG, tokenizer_files
from lctw_megatron.errors import InputError
from lctw_megatron.model.checkpoint import CheckpointManifest, check_tensor_files, write_manifest
from lctw_megatron.progress import Progress

_OTHER_FORMATS = ("mp_rank_00", "mp_rank_00_000", "model_optim_rng.pt")
"""In an iteration's folder that `--ckpt-format torch` wrote: of the first rank, without and with
pipeline parallelism, and the pickle in it."""
_NORM, _NORM_OF_LOCAL_LAYERS = "pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"
"""The norm before experts: with TransformerEngine, and with `--transformer-impl local`, which names
it as if an MLP followed."""
_TABLES = ("embedding.word_embeddings.", "output_layer.")
"""Of the vocabulary, which Megatron-LM pads as its arguments say."""


def import_megatron_lm(
    load: Path,
    hf: Path,
    output: Path,
    dtype: str = dtypes.KEEP,
    log: Callable[[str], None] = print,
) -> Conversion:
    """Convert ``load`` (what `--save` named, or one iteration's folder) to the checkpoint folder
    ``output``, which appears whole or not at all.

    hf: a folder with config.json and tokenizer; its weights, if any, are not looked at. dtype: as
    of ``import_hf``. InputError, also if config.json does not describe these tensors.
    """
    folder = _iteration(load)
    config = read_config(hf)
    for note in config.notes:
        log(note)
    tensors = list(stored_tensors(config.model))
    check_tensor_files(folder)
    reader = CheckpointReader(folder)
    there = [_as_there(stored, reader) for stored in tensors]
    reader.check(there, str(hf / CONFIG))
    kinds = sorted({dtypes.name_of(reader.dtype(stored)) for stored in there})
    if dtype == dtypes.KEEP and len(kinds) > 1:
        raise InputError(f"{folder}: tensors in {' and '.join(kinds)}; choose one with --dtype")
    name = kinds[0] if dtype == dtypes.KEEP else dtype
    target = dtypes.TORCH[name]
    source = {
        "format": "lctw-megatron import of megatron-lm 1",
        "index": hashlib.blake2b((folder / ".metadata").read_bytes(), digest_size=16).hexdigest(),
        "dtype": name,
        "files": stamps({hf / CONFIG, *tokenizer_files(hf)}),
    }
    manifest = CheckpointManifest(
        step=0,
        model=config.model,
        dtype=name,  # type: ignore[arg-type]
        tokenizer=side_files.tokenizer_identity(hf),
    )
    parameters = sum(math.prod(part.shape) for stored in tensors for part in stored.parts)
    with conversion_into(output, source, log, [folder, hf]) as into:
        if into is None:
            return Conversion(len(tensors), parameters, 0)
        log(f"rope: {rope_line(config.model)}, as {hf / CONFIG} says")
        side_files.bring_in(hf, into, log)
        memory = np.empty(max(largest_bytes(tensors, dtypes.TORCH[kind]) for kind in kinds), "u1")
        total = sum(math.prod(stored.shape) for stored in tensors) * target.itemsize
        with Progress("import", total, "B") as progress, CheckpointFiles(into) as files:
            for stored, found in zip(tensors, there, strict=True):
                rows = replace(found, shape=(stored.covered_rows, *stored.shape[1:]))
                reader.read(rows, memory)
                value = tensor_of(memory, reader.dtype(found), stored.shape)
                value[stored.covered_rows :].zero_()
                check_finite(value, target, found.key + found.where, folder)
                value = value.to(target, copy=True)
                files.add(stored, value)
                progress.update(value.nbytes, tensors=1)
            files.add_empty_states(tensors)
        write_manifest(into, manifest)
    return Conversion(len(tensors), parameters, parameters * target.itemsize)


def _as_there(stored: StoredTensor, reader: CheckpointReader) -> StoredTensor:
    """``stored`` under the folder's name of it, and with as many rows as the folder has, if it is a
    table and they are enough."""
    if stored.key.endswith(_NORM) and reader.shape(stored.key) is None:
        return replace(stored, key=stored.key.removesuffix(_NORM) + _NORM_OF_LOCAL_LAYERS)
    found = reader.shape(stored.key)
    if stored.key.startswith(_TABLES) and found and found[0] >= stored.covered_rows:
        return replace(stored, shape=(found[0], *stored.shape[1:]))
    return stored


def _iteration(load: Path) -> Path:
    """The folder of the newest iteration, as the tracker names it."""
    tracker = load / TRACKER
    if tracker.is_file():
        step = tracker.read_text(errors="replace").strip()
        # Twelve digits are more than any run has, and fewer than a file name may have.
        if step != "release" and not (step.isascii() and step.isdigit() and len(step) < 13):
            raise InputError(f"{tracker}: is {step!r:.40}, expected an iteration or release")
        load = load / (step if step == "release" else f"iter_{int(step):07d}")
        if not load.is_dir():
            raise InputError(
                f"{load}: missing, but {TRACKER} names it; fetch it, or name another iteration's "
                "folder"
            )
    elif not any((load / name).exists() for name in (".metadata", *_OTHER_FORMATS)):
        raise InputError(
            f"{load}: holds neither {TRACKER}, as what Megatron-LM saves, nor .metadata, as one "
            "iteration of it; name what --save named"
        )
    if not (load / ".metadata").is_file():
        raise InputError(
            f"{load}: has no .metadata, as only --ckpt-format torch_dist writes; let Megatron-LM "
            "convert it (--ckpt-convert-format torch_dist --ckpt-convert-save DIR)"
        )
    return load
