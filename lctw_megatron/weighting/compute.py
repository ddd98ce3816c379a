"""Losses to weights for one batch, under any context-parallel layout."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lctw_megatron.weighting.context_parallel import is_first, own_part, whole_sequences
from lctw_megatron.weighting.parse import Weighting
from lctw_megatron.weighting.schemes import Targets, Uniform


class WeightCounts(NamedTuple):
    """What happened to the targets of a batch: int64 scalars whose plain sum over the ranks of
    DP × CP (and over micro batches) is the count of the global batch."""

    targets: Tensor
    """Live targets of this rank's part."""
    unscored: Tensor
    """Those of them without a short loss."""
    fallback_sequences: Tensor
    """Sequences whose scores were all zero and that trained with uniform weights, counted by the
    first rank of a context-parallel group; 0 on the others."""


def compute_weights(
    weighting: Weighting,
    long_loss: Tensor,
    short_loss: Tensor | None,
    mask: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    boundaries: Tensor | None = None,
) -> Tensor:
    """The weight of every target, [sequences, targets], without gradient.

    Args:
        weighting: from ``parse_weighting``.
        long_loss: [sequences, targets], nats, each row one sequence, or with ``group`` this rank's
            part of it.
        short_loss: likewise; NaN (or infinite) where a target has no short loss. May be None for
            schemes that need none (uniform, eslm, position).
        mask: likewise, non-zero on live targets; None: all are live. Losses elsewhere may be
            anything.
        group: the context-parallel process group whose ranks hold the parts of the same sequences,
            cut by ``data.zigzag.cut``. A collective call: all its ranks must make it.
        boundaries: int [sequences, pieces + 1], the pieces of the *whole* sequence (position).

    Returns float32, or float64 where a loss is float64 (everything is then computed in it); 0 on
    targets that are not live. Equal bit for bit for every size of ``group``.

    A target without a short loss scores 0 and is never kept before one that has one. With
    `unscored: one` it gets weight 1 instead and the rest of the sequence is weighted as if it were
    not there. Where all scores of a sequence are zero its weights are 1. `interpolation` λ makes
    λ + (1 - λ)·w of every scheme's w.
    """
    return compute_weights_and_counts(weighting, long_loss, short_loss, mask, group, boundaries)[0]


@torch.no_grad()
def compute_weights_and_counts(
    weighting: Weighting,
    long_loss: Tensor,
    short_loss: Tensor | None,
    mask: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    boundaries: Tensor | None = None,
) -> tuple[Tensor, WeightCounts]:
    """``compute_weights``, with the counts that training logs."""
    scheme, config = weighting.scheme, weighting.config
    dtype = _working_dtype(scheme.needs_short_loss, long_loss, short_loss, mask)
    own_live = torch.ones_like(long_loss, dtype=torch.bool) if mask is None else mask != 0
    if isinstance(scheme, Uniform):  # no gathering: it costs nothing
        zero = torch.zeros((), dtype=torch.int64, device=long_loss.device)
        return own_live.to(dtype), WeightCounts(own_live.sum(), zero, zero)

    streams = (long_loss, short_loss if scheme.needs_short_loss else long_loss, own_live)
    long_loss, short_loss, live = whole_sequences([x.to(dtype) for x in streams], group)  # type: ignore[union-attr]
    live = live != 0
    targets = known_targets(weighting, long_loss, short_loss, live, boundaries)
    weighted, scored = targets.live, targets.scored
    scores = scheme.scores(targets)
    weights = scheme.weights(scores, targets)
    flat = ((scores == 0) | ~weighted).all(1, keepdim=True)
    weights = weights.masked_fill(flat, 1)
    weights = config.interpolation + (1 - config.interpolation) * weights
    weights = weights.masked_fill(~weighted, 1).masked_fill(~live, 0)

    own_live, own_scored = own_part(live, group), own_part(scored, group)
    fallback = (flat & weighted.any(1, keepdim=True)).sum() * is_first(group)
    counts = WeightCounts(own_live.sum(), (own_live & ~own_scored).sum(), fallback)
    return own_part(weights, group), counts


def known_targets(
    weighting: Weighting,
    long_loss: Tensor,
    short_loss: Tensor,
    live: Tensor,
    boundaries: Tensor | None,
) -> Targets:
    """What the scheme sees of whole sequences [sequences, targets]: of losses that may be anything
    where ``live`` (bool) is false, and NaN or infinite elsewhere, those that are known."""
    scored, known = live, live & long_loss.isfinite()
    if weighting.scheme.needs_short_loss:
        scored = known & short_loss.isfinite()
    long_loss = long_loss.where(known, torch.zeros_like(long_loss))
    short_loss = short_loss.where(scored, long_loss)
    weighted = scored if weighting.config.unscored == "one" else live
    return Targets(long_loss, short_loss, weighted, scored, boundaries)


def _working_dtype(
    needs_short_loss: bool, long_loss: Tensor, short_loss: Tensor | None, mask: Tensor | None
) -> torch.dtype:
    """At least float32, whatever precision the training runs in. Checks the shapes on the way."""
    if long_loss.ndim != 2:
        raise ValueError(f"long_loss is {tuple(long_loss.shape)}, expected [sequences, targets]")
    for name, stream in (("short_loss", short_loss), ("mask", mask)):
        if stream is not None and stream.shape != long_loss.shape:
            raise ValueError(
                f"{name} is {tuple(stream.shape)} but long_loss is {tuple(long_loss.shape)}"
            )
    dtype = torch.promote_types(long_loss.dtype, torch.float32)
    if short_loss is not None:
        return torch.promote_types(dtype, short_loss.dtype)
    if needs_short_loss:
        raise ValueError("short_loss is None, but the scheme compares it with long_loss")
    return dtype
