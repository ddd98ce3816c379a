"""Held-out losses sorted into bins, every sequence apart. Pure numpy.

Sums are kept for each sequence, so that two models measured on the same sequences can be compared
in pairs: the text of a sequence is easier or harder for both, and only what remains is noise.

Legend of shapes: n targets, B bins, N sequences.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

LEFT_OUT = -1
"""The bin of a target that is not counted."""


def bucket_starts(largest: int) -> np.ndarray:
    """First values of log-spaced buckets of whole numbers 1 ... ``largest``: 1, 2, 3, 4, 6, 8, 12,
    16, 24, ... (powers of two and what lies halfway between them), int64 [B].

    The last bucket reaches up to ``largest``; none holds that number alone.
    """
    powers = 2 ** np.arange(max(1, int(largest).bit_length()), dtype=np.int64)
    starts = np.union1d(powers, powers[1:] + powers[1:] // 2)
    return starts[(starts < largest) | (starts == 1)]


def bucket_of(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """The bucket of each value, int64; LEFT_OUT below 1. The last bucket has no upper end."""
    bucket = np.searchsorted(starts, values, side="right") - 1
    return np.where(np.asarray(values) < 1, LEFT_OUT, bucket)


class SequenceSums:
    """Σ loss and the number of targets in every bin, for every sequence apart."""

    def __init__(self, sequences: int, bins: int) -> None:
        self.loss = np.zeros((sequences, bins))
        """float64 [N, B]: nats"""
        self.targets = np.zeros((sequences, bins), dtype=np.int64)
        """int64 [N, B]"""

    def add(self, sequence: int, loss: np.ndarray, bins: np.ndarray) -> None:
        """Count the targets of one sequence: loss [n] in nats, bins int [n].

        Left out are targets in bin LEFT_OUT and those whose loss is NaN (not scored).
        """
        kept = (bins != LEFT_OUT) & ~np.isnan(loss)
        chosen, values = bins[kept], loss[kept].astype(np.float64)
        width = self.loss.shape[1]
        self.loss[sequence] += np.bincount(chosen, weights=values, minlength=width)
        self.targets[sequence] += np.bincount(chosen, minlength=width)

    def means(self) -> list[float | None]:
        """Mean loss of each bin over all its targets; None where there is none."""
        return bin_means(self.loss, self.targets)

    def summary(self) -> dict[str, Any]:
        """As plain lists, for a JSON file: means and targets of all, sums of each sequence."""
        return {
            "loss": self.means(),
            "targets": self.targets.sum(0).tolist(),
            "sequence_loss": self.loss.round(6).tolist(),
            "sequence_targets": self.targets.tolist(),
        }


def bin_means(loss: np.ndarray, targets: np.ndarray) -> list[float | None]:
    """Σ over sequences of loss [N, B] ÷ that of targets [N, B]; None for a bin without targets."""
    pairs = zip(loss.sum(0).tolist(), targets.sum(0).tolist(), strict=True)
    return [total / count if count else None for total, count in pairs]


@dataclass(frozen=True)
class Estimate:
    """A mean over samples, or the difference of two models' means, and how sure it is."""

    mean: float
    error: float | None
    """Standard error of ``mean``; None where one sample says nothing of others."""


class Pair(NamedTuple):
    """The sums of two models over the same targets."""

    ours: np.ndarray
    """Σ loss [N]"""
    theirs: np.ndarray
    """Σ loss [N]"""
    targets: np.ndarray
    """[N]"""


def paired_difference(pair: Pair) -> Estimate | None:
    """The difference of the mean losses of two models, ours - theirs. None without targets.

    Sequences are the sampling units and hold different numbers of targets, so the mean is a ratio;
    its standard error is the usual linearised one, √(N/(N-1) Σ (Δ_s - m·n_s)²) / Σ n_s (Cochran,
    "Sampling Techniques", 1977, chapter 6). Sequences of one document are not independent: read it
    as a lower bound where few documents gave many sequences.
    """
    targets = pair.targets.astype(np.float64)
    total = targets.sum()
    if total == 0:
        return None
    gap = pair.ours - pair.theirs
    mean = float(gap.sum() / total)
    used = targets > 0
    units = int(used.sum())
    if units < 2:
        return Estimate(mean, None)
    residual = (gap - mean * targets)[used]
    error = float(np.sqrt(units / (units - 1) * (residual**2).sum()) / total)
    return Estimate(mean, error)
