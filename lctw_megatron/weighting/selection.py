"""Post-processing shared by the schemes: normalising, and keeping the largest.

Every function treats each row as one whole sequence and looks at live targets only. Scores must be
finite where live.
"""

from fractions import Fraction

import torch
from torch import Tensor


def normalise(scores: Tensor, live: Tensor) -> Tensor:
    """Scale non-negative ``scores`` [sequences, targets] to mean 1 over each row's live targets.

    The sum is taken in float64, so that it does not depend on how padding groups the additions.
    A row whose sum is 0 stays 0.
    """
    total = scores.where(live, torch.zeros_like(scores)).sum(1, keepdim=True, dtype=torch.float64)
    scale = live.sum(1, keepdim=True) / total.where(total > 0, torch.inf)
    return (scores * scale).to(scores.dtype)


def number_to_keep(targets: Tensor, fraction: float) -> Tensor:
    """max(1, ⌊κ·n⌋) for every n in ``targets`` (int64), exactly; 0 for 0 targets.

    Not in floating point, where 0.29 · 100 is 28.999…: κ is the nearest fraction of a denominator
    up to 10^9, which is the decimal that the user wrote (and a third for 0.3333333333333333), and
    small enough for the integer product.
    """
    kappa = Fraction(fraction).limit_denominator(10**9)
    return (targets * kappa.numerator // kappa.denominator).clamp(min=1).minimum(targets)


def keep_largest(
    scores: Tensor, live: Tensor, fraction: float, scored: Tensor | None = None
) -> Tensor:
    """The ``number_to_keep`` largest ``scores`` of each row's live targets, as bool.

    Exactly that many: of equal scores at the threshold a pseudo-random part is kept, see
    ``choose_fairly``. Live targets that are not ``scored`` (bool; None: all are) come after all
    that are, alike. Costs a sort.
    """
    keep = number_to_keep(live.sum(1, keepdim=True), fraction)
    known = live if scored is None else live & scored
    values = scores.masked_fill(~known, -torch.inf)
    falling = values.sort(dim=1, descending=True).values
    threshold = falling.gather(1, (keep - 1).clamp(min=0))
    above = live & (values > threshold)
    tied = live & (values == threshold)
    return above | choose_fairly(tied, live, keep - above.sum(1, keepdim=True))


def choose_fairly(candidates: Tensor, live: Tensor, count: Tensor) -> Tensor:
    """``count`` [sequences, 1] of each row's ``candidates`` (bool), without positional bias.

    Every candidate draws a hash of its number among the row's live targets, mixed with a hash of
    *which* targets are candidates; the smallest hashes win. So the choice favours neither early
    nor late targets, differs from sequence to sequence, and depends on nothing but the sequence
    itself: not on padding, the batch, the layout or a random state.
    """
    number = live.cumsum(1)
    which = _hash(number).where(candidates, 0).sum(1, keepdim=True)
    draw = _hash(number ^ which).where(candidates, torch.iinfo(torch.int64).max)
    order = draw.argsort(dim=1, stable=True)
    wins = torch.arange(draw.shape[1], device=draw.device) < count
    return torch.zeros_like(candidates).scatter_(1, order, wins) & candidates


def _hash(x: Tensor) -> Tensor:
    """A bijection of int64 that mixes all bits: the finaliser of SplitMix64.

    Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's own copies the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(constant: int) -> int:
    """The int64 with the bits of an unsigned 64-bit ``constant``; products wrap around."""
    return constant - (1 << 64) if constant >= 1 << 63 else constant
