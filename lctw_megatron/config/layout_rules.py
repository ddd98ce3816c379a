"""Which parallel sizes fit a model, a sequence length, a batch and a number of ranks.

Experts are whole on a rank (megatron-core's expert_tensor_parallel_size is 1): theirs are narrow,
and split over tensor-parallel ranks they would be narrower still. So the tensor x context x data
ranks of a pipeline stage are, for the experts alone, EP x what is left as their data parallelism.

Pure arithmetic, no GPU and no process group, so that ``--dry-run`` can refuse a layout for 512
ranks on a laptop.
"""

import math
from dataclasses import dataclass

from lctw_megatron.config.rope import check_rope
from lctw_megatron.config.schema import LayoutConfig, ModelConfig, RunConfig
from lctw_megatron.errors import InputError

VOCABULARY_MULTIPLE = 128
"""The embedding and the head are padded to a multiple of this under every layout, so that
checkpoints of all layouts have the same shapes (and Tensor Cores like it).
"""


LOGITS_MIB = {"cuda": 2048, "cpu": 64}
"""Logits of a block of rows in the loss, in float32. The backward reads and writes the gradient of
the whole head once for every block, which takes as long as the products of about 180 rows on an
H100 (600 TFLOP/s, 3.35 TB/s), however wide the head: 18 % of its time in blocks of 1,024 rows, 4 %
of 4,096. A CPU has no such price, but caches.
"""


@dataclass(frozen=True)
class LayoutSizes:
    """What follows from a layout. ``None`` needs the number of ranks, which is not known."""

    world_size: int | None
    data: int | None
    """Data-parallel ranks: world_size / (tensor x pipeline x context)."""
    model_ranks: int
    """Ranks that hold one copy of the model and work on the same sequences: TP x PP x CP."""
    sequences: int | None
    """Sequences of the global batch on one data-parallel rank."""
    micro_batches: int | None
    """Forward passes of one data-parallel rank in one optimizer step. Also None while the micro
    batch size is not chosen."""
    layers_per_chunk: int
    """Layers of one model chunk; a pipeline rank holds `virtual_pipeline` chunks."""
    chunks: int
    """Model chunks on each pipeline rank."""
    tokens_per_rank: int
    """Tokens of one sequence on one context-parallel rank: S / CP."""


def padded_vocabulary(vocab_size: int) -> int:
    """``vocab_size`` rounded up to the padding of the embedding and the head."""
    return -(-vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def loss_block_rows(layout: LayoutConfig, vocab_size: int, device: str) -> int:
    """Rows of logits that exist at a time: `layout.loss_block_rows`, or as many as LOGITS_MIB of a
    ``device`` ("cuda", "cpu") hold of this rank's columns, in multiples of 128.

    On a GPU 4,096 for 128,256 tokens under TP 1, 8,320 under TP 2, 33,408 under TP 8; for 49,152
    tokens 10,880, 21,760 and 87,296.
    """
    columns = padded_vocabulary(vocab_size) // layout.tensor
    rows = LOGITS_MIB[device] * 2**20 // (4 * columns)
    return layout.loss_block_rows or max(rows // 128 * 128, 128)


def check_layout(run: RunConfig, world_size: int | None = None) -> LayoutSizes:
    """Check every rule that the known numbers allow and return the derived sizes.

    With ``world_size`` None the rules about data parallelism are left out; with
    ``model.vocab_size`` None (it comes from the tokenizer) the rule about the vocabulary is.
    Raises InputError naming the rule that is broken and its numbers.
    """
    layout = run.layout
    _check_switches(layout)
    check_model(run.model, layout)
    if run.model.num_moe_experts and layout.tensor > 1 and not layout.sequence:
        raise InputError(
            f"layout.tensor {layout.tensor} needs layout.sequence: true for a model with experts: "
            "whole experts take their tokens from the tensor-parallel ranks, which must share the "
            "tokens out"
        )
    check_sequence(run.data.sequence_length, "data.sequence_length", layout)
    if run.training.recall:
        for length in run.training.recall.lengths:
            check_sequence(length, f"{length} of training.recall.lengths", layout)
    data, sequences, micro_batches = _check_batch(run, world_size)
    chunks = layout.virtual_pipeline or 1
    return LayoutSizes(
        world_size=world_size,
        data=data,
        model_ranks=layout.model_ranks,
        sequences=sequences,
        micro_batches=micro_batches,
        layers_per_chunk=run.model.num_layers // (layout.pipeline * chunks),
        chunks=chunks,
        tokens_per_rank=run.data.sequence_length // layout.context,
    )


def _must_divide(number: int, number_name: str, divisor: int, divisor_name: str) -> None:
    if number % divisor:
        raise InputError(
            f"{number_name} ({number}) must be divisible by {divisor_name} ({divisor})"
        )


def _check_switches(layout: LayoutConfig) -> None:
    if layout.sequence and layout.tensor == 1:
        raise InputError(
            "layout.sequence: true splits norms over the tensor-parallel ranks and needs "
            "layout.tensor > 1, found 1"
        )
    if layout.virtual_pipeline and layout.pipeline == 1:
        raise InputError(
            f"layout.virtual_pipeline {layout.virtual_pipeline} needs layout.pipeline > 1, found 1"
        )


def check_model(model: ModelConfig, layout: LayoutConfig) -> None:
    """Refuse tensor and pipeline sizes that the model's shape cannot be split into. InputError."""
    heads, groups = model.num_attention_heads, model.num_query_groups
    _must_divide(heads, "model.num_attention_heads", groups or heads, "model.num_query_groups")
    if model.kv_channels is None:
        _must_divide(model.hidden_size, "model.hidden_size", heads, "model.num_attention_heads")
        if model.hidden_size // heads % 2:
            raise InputError(
                f"model.hidden_size / model.num_attention_heads is {model.hidden_size // heads}; "
                "rotary positions turn pairs of numbers and need an even width of a head"
            )
    check_rope(model)
    if model.parallel_block and (model.qk_norm or not model.qkv_bias):
        raise InputError(
            f"model.architecture phi needs model.qkv_bias true and model.qk_norm false, found "
            f"{model.qkv_bias} and {model.qk_norm}"
        )
    _check_experts(model, layout)
    tensor = layout.tensor
    _must_divide(heads, "model.num_attention_heads", tensor, "layout.tensor")
    if groups:
        _must_divide(groups, "model.num_query_groups", tensor, "layout.tensor")
    _must_divide(model.hidden_size, "model.hidden_size", tensor, "layout.tensor")
    if not model.num_moe_experts:
        _must_divide(model.ffn_hidden_size, "model.ffn_hidden_size", tensor, "layout.tensor")
    if model.vocab_size:
        padded = padded_vocabulary(model.vocab_size)
        name = f"model.vocab_size {model.vocab_size} padded to a multiple of {VOCABULARY_MULTIPLE}"
        _must_divide(padded, name, tensor, "layout.tensor")
    _must_divide(
        model.num_layers,
        "model.num_layers",
        layout.pipeline * (layout.virtual_pipeline or 1),
        "layout.pipeline x layout.virtual_pipeline"
        if layout.virtual_pipeline
        else "layout.pipeline",
    )


def _check_experts(model: ModelConfig, layout: LayoutConfig) -> None:
    experts = model.num_moe_experts
    if experts and model.parallel_block:
        raise InputError(
            f"model.num_moe_experts is {experts}, but model.architecture phi has no experts; leave "
            "it out"
        )
    if experts:
        _must_divide(experts, "model.num_moe_experts", layout.expert, "layout.expert")
        if model.moe_router_topk > experts:
            raise InputError(
                f"model.moe_router_topk is {model.moe_router_topk}, expected at most "
                f"model.num_moe_experts {experts}"
            )
        return
    if layout.expert > 1:
        raise InputError(
            f"layout.expert is {layout.expert}, but the model has no experts "
            "(model.num_moe_experts); leave it out"
        )
    for name, field in type(model).model_fields.items():
        if (name.startswith("moe_") or name == "norm_topk_prob") and getattr(
            model, name
        ) != field.default:
            raise InputError(
                f"model.{name} is {getattr(model, name)}, but the model has no experts; set "
                f"model.num_moe_experts, or leave {name} out"
            )


def without_gradients(layout: LayoutConfig, model: ModelConfig) -> LayoutConfig:
    """``layout`` as scoring and evaluation take it: experts shared out to the ranks that run the
    same sequences, as evenly as their numbers allow, so that no rank must hold all of them."""
    ranks = layout.tensor * layout.context
    return layout.model_copy(update={"expert": math.gcd(model.num_moe_experts or 1, ranks)})


def check_sequence(length: int, name: str, layout: LayoutConfig) -> None:
    """Refuse a ``length``, called ``name``, that the ranks of a layout cannot share. InputError."""
    if layout.context > 1:  # two zigzag chunks a rank
        _must_divide(length, name, 2 * layout.context, "2 x layout.context")
    if layout.sequence:
        _must_divide(
            length // layout.context,
            f"{name} / layout.context",
            layout.tensor,
            "layout.tensor (layout.sequence is on)",
        )


def _check_batch(
    run: RunConfig, world_size: int | None
) -> tuple[int | None, int | None, int | None]:
    """Data-parallel ranks, sequences and micro batches of each, as far as they are known."""
    layout, training = run.layout, run.training
    # One that is chosen later may be 1: whatever suits no other size is refused then.
    micro_batch = training.micro_batch_size or 1
    _must_divide(
        training.global_batch_size,
        "training.global_batch_size",
        micro_batch,
        "training.micro_batch_size",
    )
    if world_size is None:
        return None, None, None
    model_ranks = layout.model_ranks
    _must_divide(
        world_size,
        "number of ranks",
        model_ranks,
        "layout.tensor x layout.pipeline x layout.context",
    )
    _must_divide(
        world_size // layout.pipeline,
        "number of ranks / layout.pipeline",
        layout.expert,
        "layout.expert",
    )
    data = world_size // model_ranks
    of = "training.micro_batch_size x " if training.micro_batch_size else ""
    _must_divide(
        training.global_batch_size,
        "training.global_batch_size",
        micro_batch * data,
        f"{of}the {data} data-parallel ranks",
    )
    sequences = training.global_batch_size // data
    # megatron-core's interleaved schedule raises on this (schedules.py, "dependency bubbles").
    if layout.virtual_pipeline:
        _must_divide(
            sequences // micro_batch,
            "micro batches of a step",
            layout.pipeline,
            "layout.pipeline (layout.virtual_pipeline is on)",
        )
    return data, sequences, sequences // micro_batch if training.micro_batch_size else None
