"""What the weights of a step look like: four numbers worth watching.

- max: the largest weight;
- share of zero: targets that do not train at all;
- n_eff = (Σw)² / Σw²: how many equally weighted targets would average as well, in targets;
- Spearman's rank correlation of weight and loss: do the weights follow difficulty? A scheme that
  merely prefers hard tokens shows a high one.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from lctw_megatron.weighting.context_parallel import is_first, whole_sequences

_SUMS = ("targets", "zero", "weight", "weight_squared", "spearman", "sequences")


@dataclass
class WeightStatistics:
    """Sums from which the numbers follow, of any number of batches on any number of ranks.

    Everything but Spearman's correlation is exact for the union of all batches and ranks. That one
    is computed per sequence, exactly, and then averaged over the sequences where it is defined
    (neither weights nor losses all equal).
    """

    sums: Tensor
    """float64 [6]: targets, targets of weight 0, Σw, Σw², Σ over sequences of Spearman's
    correlation, and the number of sequences in that last sum. Reduced by adding."""
    largest: Tensor
    """float64 []: the largest weight; 0 where there is no target. Reduced by maximum."""

    def __add__(self, other: "WeightStatistics") -> "WeightStatistics":
        """The statistics of two batches together."""
        return WeightStatistics(self.sums + other.sums, self.largest.maximum(other.largest))

    def summary(self) -> dict[str, float]:
        """Numbers for the log; those that are not defined (no targets, uniform weights) are left
        out."""
        sums = dict(zip(_SUMS, self.sums.tolist(), strict=True))
        summary = {"max": float(self.largest)}
        if sums["targets"]:
            summary["zero_share"] = sums["zero"] / sums["targets"]
            summary["mean"] = sums["weight"] / sums["targets"]
        if sums["weight_squared"]:
            summary["n_eff"] = sums["weight"] ** 2 / sums["weight_squared"]
            summary["n_eff_share"] = summary["n_eff"] / sums["targets"]
        if sums["sequences"]:
            summary["spearman"] = sums["spearman"] / sums["sequences"]
        return summary


@torch.no_grad()
def weight_statistics(
    weights: Tensor, long_loss: Tensor, mask: Tensor, group: dist.ProcessGroup | None = None
) -> WeightStatistics:
    """The statistics of one batch: weights, losses and mask [sequences, targets]. A loss that is
    not known, NaN, is left out of Spearman's correlation.

    With a context-parallel ``group`` these are this rank's parts; the call gathers whole sequences
    for Spearman's correlation (a collective call) and the group's first rank counts it, so that
    reducing over DP × CP counts every sequence once.
    """
    live = mask != 0
    w = weights.double().where(live, 0.0)
    streams = [weights.double(), long_loss.double(), live.double()]
    whole_weights, whole_loss, whole_live = whole_sequences(streams, group)
    known = (whole_live != 0) & whole_loss.isfinite()
    correlation = spearman_correlation(whole_weights, whole_loss, known)
    defined = correlation.isfinite() & is_first(group)
    counts = torch.stack([correlation.where(defined, 0.0).sum(), defined.sum().double()])
    parts = [live.sum(), (live & (weights == 0)).sum(), w.sum(), w.square().sum()]
    sums = torch.cat([torch.stack([part.double() for part in parts]), counts])
    return WeightStatistics(sums, w.max() if w.numel() else w.new_zeros(()))


def spearman_correlation(x: Tensor, y: Tensor, live: Tensor) -> Tensor:
    """Spearman's rank correlation of x and y [sequences, values] where ``live`` (bool), float64
    [sequences]; equal values share their mean rank.

    NaN where it is not defined: fewer than two values, or all values of one equal. The host waits
    for nothing.
    """
    number = live.sum(1, keepdim=True).clamp(min=1)
    centred = []
    for values in (x, y):
        ranks = _mean_ranks(values, live).where(live, 0.0)
        centred.append((ranks - ranks.sum(1, keepdim=True) / number).where(live, 0.0))
    products = (centred[0] * centred[1]).sum(1)
    return products / (centred[0].square().sum(1).sqrt() * centred[1].square().sum(1).sqrt())


def _mean_ranks(x: Tensor, live: Tensor) -> Tensor:
    """float64 ranks among the live values of each row; equal values get the mean of the ranks they
    span. Anything where not live."""
    values, order = x.masked_fill(~live, torch.inf).sort(dim=1)
    place = torch.arange(x.shape[1], device=x.device).expand_as(order)
    begins = torch.ones_like(live)
    begins[:, 1:] = values[:, 1:] != values[:, :-1]
    ends = begins.roll(-1, dims=1)  # the first begins a run, so the last ends one
    first = place.where(begins, 0).cummax(1).values
    last = place.where(ends, x.shape[1]).flip(1).cummin(1).values.flip(1)
    ranks = (first + last).double() / 2 + 1
    return torch.empty_like(ranks).scatter_(1, order, ranks)
