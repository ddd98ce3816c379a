"""A checkpoint, written under any layout, to a folder that Megatron-LM's `--load` takes, streamed.

    OUTPUT/
      latest_checkpointed_iteration.txt   the step; `release` for weights that were only imported
      iter_0000100/ or release/           the distributed checkpoint, and in its common.pt what
                                          Megatron-LM reads: iteration, arguments, version
      tokenizer/                          as in the checkpoint

Plain megatron-core loads the inner folder. It holds weights only: optimizer and random states are
those of tools/train.py, which no other loop continues.
"""

import math
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lctw_megatron.config.layout_rules import padded_vocabulary
from lctw_megatron.config.model_sizes import head_width
from lctw_megatron.config.rope import rope_line
from lctw_megatron.config.schema import ModelConfig
from lctw_megatron.conversion import dtypes
from lctw_megatron.conversion.checkpoint_reader import open_checked
from lctw_megatron.conversion.checkpoint_writer import CheckpointFiles
from lctw_megatron.conversion.done_marks import conversion_into, source_of
from lctw_megatron.conversion.finite import check_finite
from lctw_megatron.conversion.hf_import import Conversion
from lctw_megatron.conversion.placement import query_groups, stored_tensors
from lctw_megatron.data.tokenizer_files import copy_tokenizer_files
from lctw_megatron.errors import InputError
from lctw_megatron.model.checkpoint import TOKENIZER, find_checkpoint, read_manifest
from lctw_megatron.progress import Progress

TRACKER = "latest_checkpointed_iteration.txt"
_SAID_BY_ARGUMENTS = ("llama", "mistral", "qwen2", "qwen3")
"""Architectures of which ``arguments`` says everything."""


def export_megatron_lm(
    checkpoint: Path,
    output: Path,
    dtype: str = dtypes.KEEP,
    log: Callable[[str], None] = print,
) -> Conversion:
    """Convert ``checkpoint`` (or the newest of a run folder) to the folder ``output``, which
    appears whole or not at all. dtype: of the stored weights, `fp32`, `bf16`, `fp16` or `keep`.
    Raises InputError. ``log`` gets the arguments that load it.
    """
    checkpoint = find_checkpoint(checkpoint)
    manifest = read_manifest(checkpoint)
    model = manifest.model
    if model.architecture not in _SAID_BY_ARGUMENTS:
        raise InputError(
            f"{checkpoint}: architecture {model.architecture} cannot be exported to Megatron-LM; "
            f"supported: {', '.join(_SAID_BY_ARGUMENTS)}"
        )
    tensors = list(stored_tensors(model))
    reader = open_checked(checkpoint)
    reader.check(tensors)
    name = manifest.dtype if dtype == dtypes.KEEP else dtype
    target = dtypes.TORCH[name]
    kind = "lctw-megatron export to megatron-lm 1"
    source = source_of(checkpoint, kind, step=manifest.step, dtype=name)
    sizes = [math.prod(stored.shape) for stored in tensors]
    with conversion_into(output, source, log, [checkpoint]) as folder:
        if folder is None:
            return Conversion(len(tensors), sum(sizes), 0)
        inner = folder / (f"iter_{manifest.step:07d}" if manifest.step else "release")
        inner.mkdir()
        common = {
            "checkpoint_version": 3.0,
            "iteration": manifest.step,
            "num_floating_point_operations_so_far": 0,
            "args": Namespace(**arguments(model)),
        }
        memory = np.empty(max(sizes) * max(reader.dtype(s).itemsize for s in tensors), np.uint8)
        with (
            Progress("export", sum(sizes) * target.itemsize, "B") as progress,
            CheckpointFiles(inner, common) as files,
        ):
            for stored in tensors:
                value = reader.read(stored, memory)
                check_finite(value, target, stored.key + stored.where, checkpoint)
                value = value.to(target, copy=True)
                files.add(stored, value)
                progress.update(value.nbytes, tensors=1)
            files.add_empty_states(tensors)
        if (checkpoint / TOKENIZER).is_dir():
            copy_tokenizer_files(checkpoint / TOKENIZER, folder / TOKENIZER)
        (folder / TRACKER).write_text(str(manifest.step or "release"))
        log(f"load it with: {' '.join(loading_arguments(model, output))}")
        if model.rope_scaling is not None:
            log(f"rope: {rope_line(model)}; Megatron-LM takes the scaling from no checkpoint: set "
                "it in the run's arguments or script")  # fmt: skip
    return Conversion(len(tensors), sum(sizes), sum(sizes) * target.itemsize)


def arguments(model: ModelConfig) -> dict[str, Any]:
    """Megatron-LM's arguments that say what the model is, under its names."""
    assert model.vocab_size is not None
    theta = model.rope_theta
    return {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "group_query_attention": True,
        "num_query_groups": query_groups(model),
        "kv_channels": head_width(model),
        "seq_length": model.max_position_embeddings,
        "max_position_embeddings": model.max_position_embeddings,
        "position_embedding_type": "rope",
        "add_position_embedding": True,  # its name for having any
        "rotary_base": int(theta) if theta.is_integer() else theta,
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "normalization": "RMSNorm",
        "norm_epsilon": model.layernorm_epsilon,
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": model.qkv_bias,
        "qk_layernorm": model.qk_norm,
        "untie_embeddings_and_output_weights": not model.tie_word_embeddings,
        "attention_dropout": model.attention_dropout,
        "hidden_dropout": model.hidden_dropout,
        "vocab_size": model.vocab_size,
        "padded_vocab_size": padded_vocabulary(model.vocab_size),
        "make_vocab_size_divisible_by": 128,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "ckpt_format": "torch_dist",
        "no_save_optim": True,
        "no_save_rng": True,
    }


def loading_arguments(model: ModelConfig, output: Path) -> list[str]:
    """What must be given besides, since Megatron-LM does not take it from a checkpoint."""
    found = ["--load", str(output), "--use-checkpoint-args", "--no-load-optim", "--no-load-rng"]
    found += ["--norm-epsilon", f"{model.layernorm_epsilon:g}"]
    return found + (["--qk-layernorm"] if model.qk_norm else [])
