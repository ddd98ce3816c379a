"""What a group of runs measured, how sure that is, and how it differs from another group's.

A model is trained once with each seed, and every model is measured on the same samples: sequences
of held-out text, or questions. Both are drawn by chance, so both count:

    error² = s² / R + e²

s² is the variance over the R seeds of a run's mean, e the standard error over the samples of the
mean over the seeds (``buckets.paired_difference``: a ratio's linearised error). Noise that belongs
to a single pair of seed and sample is in both terms: the error is rather too large than too small
(Cameron, Gelbach and Miller, "Robust inference with multiway clustering", 2011, would subtract it).

A difference of two groups is taken sample by sample, and run by run where both have the same seeds;
then s² and e are those of the differences. With other seeds, s² / R becomes s²·(1/R + 1/R'), s² the
variance within both groups together. With one seed each only e is left, and what another seed would
have given is not known.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from lctw_megatron.evaluation.buckets import Estimate, Pair, paired_difference

BEYOND = 2.0
"""Standard errors from which on a difference is called one."""


@dataclass(frozen=True)
class Block:
    """One quantity on one set of samples; its mean is Σ values / Σ units."""

    values: np.ndarray
    """float64 [R, N]"""
    units: np.ndarray
    """[N]: targets or answer tokens, of every model the same."""

    @property
    def by_seed(self) -> np.ndarray:
        """float64 [R]"""
        return self.values.sum(1) / self.units.sum()


@dataclass(frozen=True)
class Measured:
    """The mean of one or several blocks' means: of one task, or of all."""

    seeds: tuple[int, ...]
    samples: Hashable
    """What was measured on: only equals are compared."""
    by_seed: np.ndarray
    """float64 [R]"""
    blocks: tuple[Block, ...] = ()
    error: float | None = None
    """Standard error over samples, where only that is known and not every sample's value."""


def of_blocks(seeds: Sequence[int], samples: Hashable, blocks: Sequence[Block]) -> Measured | None:
    """None if a block has no units."""
    if not blocks or any(block.units.sum() == 0 for block in blocks):
        return None
    by_seed = np.mean([block.by_seed for block in blocks], axis=0)
    return Measured(tuple(seeds), samples, by_seed, tuple(blocks))


def level(measured: Measured) -> Estimate:
    """Its mean with the error of the module's docstring; no error with one seed and one sample."""
    return Estimate(
        float(measured.by_seed.mean()),
        _error(_spread(measured.by_seed), _sample_error(measured.blocks, measured.error)),
    )


def difference(ours: Measured | None, theirs: Measured | None) -> Estimate | None:
    """ours - theirs; None if one is missing or they were measured on other samples."""
    if ours is None or theirs is None or ours.samples != theirs.samples:
        return None
    mean = float(ours.by_seed.mean() - theirs.by_seed.mean())
    if sorted(ours.seeds) == sorted(theirs.seeds):
        order = [theirs.seeds.index(seed) for seed in ours.seeds]
        spread = _spread(ours.by_seed - theirs.by_seed[order])
    else:
        spread = _pooled_spread(ours.by_seed, theirs.by_seed)
    if ours.blocks and theirs.blocks:
        gaps = [
            Block(a.values.mean(0)[None] - b.values.mean(0)[None], a.units)
            for a, b in zip(ours.blocks, theirs.blocks, strict=True)
        ]
        return Estimate(mean, _error(spread, _sample_error(gaps, None)))
    both = [ours.error, theirs.error]
    error = None if None in both else math.hypot(*(e for e in both if e is not None))
    return Estimate(mean, _error(spread, error))


def is_beyond(found: Estimate | None) -> bool:
    """Whether a difference is more than BEYOND standard errors from 0."""
    return found is not None and found.error is not None and abs(found.mean) > BEYOND * found.error


def _spread(by_seed: np.ndarray) -> float | None:
    """Standard error of the mean over seeds."""
    return float(by_seed.std(ddof=1) / math.sqrt(len(by_seed))) if len(by_seed) > 1 else None


def _pooled_spread(ours: np.ndarray, theirs: np.ndarray) -> float | None:
    freedom = len(ours) + len(theirs) - 2
    if not freedom:
        return None
    squares = sum(float(((part - part.mean()) ** 2).sum()) for part in (ours, theirs))
    return math.sqrt(squares / freedom * (1 / len(ours) + 1 / len(theirs)))


def _sample_error(blocks: Sequence[Block], known: float | None) -> float | None:
    """Of the mean over blocks, whose samples are independent."""
    if not blocks:
        return known
    errors = []
    for block in blocks:
        mean = block.values.mean(0)
        found = paired_difference(Pair(mean, np.zeros_like(mean), block.units))
        if found is None or found.error is None:
            return None
        errors.append(found.error)
    return math.sqrt(sum(error**2 for error in errors)) / len(errors)


def _error(*parts: float | None) -> float | None:
    known = [part for part in parts if part is not None]
    return math.hypot(*known) if known else None
