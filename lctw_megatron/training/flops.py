"""Floating-point operations of training, as the mathematics needs them.

Model FLOPs: every matrix product counted exactly (2 m n k), attention by its causal pairs (those of
a training step as if each sequence were one document), of experts those that a token goes to, the
backward pass as twice the forward. What a layout or recomputation does on top is not counted, so
that figures compare between layouts (Chowdhery et al. 2022, "PaLM", appendix B).
"""

from collections.abc import Iterable

from lctw_megatron.config.model_sizes import layer_sizes
from lctw_megatron.config.schema import ModelConfig, RunConfig
from lctw_megatron.config.schemes import needs_short_loss
from lctw_megatron.scoring.windows import windows


def forward_flops(model: ModelConfig, lengths: Iterable[int], head_rows: int) -> int:
    """FLOPs of one forward pass over causal sequences of ``lengths`` tokens, ``head_rows`` of them
    with logits. With a document mask, the lengths are those of the pieces."""
    layer = layer_sizes(model)
    lengths = list(lengths)
    tokens = sum(lengths)
    pairs = sum(n * (n + 1) // 2 for n in lengths)
    # Queries with keys, then probabilities with values: 2 FLOPs per pair and channel each.
    per_layer = 2 * tokens * layer.active + 4 * pairs * layer.query
    head = 2 * head_rows * model.hidden_size * (model.vocab_size or 0)
    return model.num_layers * per_layer + head


def sequence_flops(model: ModelConfig, sequence_length: int) -> int:
    """FLOPs of forward and backward over one sequence that is one document."""
    return 3 * forward_flops(model, [sequence_length], sequence_length)


def self_scoring_flops(model: ModelConfig, sequence_length: int, window: int, stride: int) -> int:
    """FLOPs that scoring one sequence by its own windows adds: forward passes, the head only for
    the targets each window scores. The first window is not run: both contexts are the same there.
    """
    table = windows(sequence_length + 1, window, stride)[1:]  # the inputs and the last label
    scored = int((table[:, 3] - table[:, 2]).sum())
    return forward_flops(model, (table[:, 1] - table[:, 0]).tolist(), scored)


def step_flops(run: RunConfig) -> int:
    """FLOPs of one optimizer step over the global batch, over all ranks together."""
    model, length, weighting = run.model, run.data.sequence_length, run.weighting
    flops = sequence_flops(model, length)
    if weighting.mode == "self" and needs_short_loss(weighting.scheme):
        assert weighting.window and weighting.stride
        flops += self_scoring_flops(model, length, weighting.window, weighting.stride)
    return run.training.global_batch_size * flops
