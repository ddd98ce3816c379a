"""The schemes: how two losses a token become a weight a token.

A scheme is a class with two steps, kept apart:

    scores(targets)             how much does long context change this target?
    weights(scores, targets)    scores -> weights (dense or sparse, normalised)

d_i = log p_long - log p_short = short_loss_i - long_loss_i below, in nats; n is the number of live
targets of a sequence. All tensors are [sequences, targets], every row a whole sequence, whatever
the parallel layout: ``compute.py`` gathers and cuts, replaces unscored targets, interpolates, and
falls back to uniform weights where a sequence's scores are all zero. What a scheme returns where
``live`` is false is never used. An unscored target scores 0 and is chosen only after every scored
one; longce, whose weight is a ratio of probabilities, gives it 1.

A new scheme is one class here (its lower-case name is what recipes write, its dataclass fields are
the `weighting` parameters it takes), one line in config/schemes.py, which says which losses it
needs, and its name in ``WeightingConfig.scheme``'s docstring.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lctw_megatron.config.schemes import SCHEME_NEEDS
from lctw_megatron.weighting.custom_function import call, import_function
from lctw_megatron.weighting.selection import keep_largest, normalise

KEY_ALPHA, KEY_BETA = 2.0, -2.0
"""LongPPL's published bounds of a key token, nats: of d and of the long log-probability."""

SCHEMES: dict[str, type["Scheme"]] = {}
"""Name in a recipe -> class. Classes enter themselves."""


@dataclass(frozen=True)
class Targets:
    """What a scheme sees of a batch of whole sequences."""

    long_loss: Tensor
    """float32 or float64 [sequences, targets], nats; 0 where not live."""
    short_loss: Tensor
    """Likewise, from the short-context model; equal to ``long_loss`` where not scored."""
    live: Tensor
    """bool [sequences, targets]: the targets that count."""
    scored: Tensor
    """Likewise: those of them that have both losses, or all if the scheme needs no short loss."""
    boundaries: Tensor | None = None
    """int [sequences, pieces + 1], rising: piece p covers [boundaries[p], boundaries[p + 1]).
    None: every sequence is one piece."""

    @property
    def difference(self) -> Tensor:
        """d: positive where long context makes the target likelier. 0 where not scored."""
        return self.short_loss - self.long_loss

    @property
    def context_length(self) -> Tensor:
        """int64 [sequences, targets]: input tokens of its own piece that a target follows, >= 1."""
        sequences, length = self.long_loss.shape
        position = torch.arange(length, device=self.long_loss.device).expand(sequences, length)
        if self.boundaries is None:
            return position + 1
        starts = self.boundaries.to(position).contiguous()
        piece = torch.searchsorted(starts, position.contiguous(), right=True) - 1
        return position - starts.gather(1, piece) + 1


class Scheme(ABC):
    """Base of all schemes."""

    needs_short_loss: ClassVar[bool] = True
    """Whether training must provide short losses; config/schemes.py says it of the schemes here."""
    needs_long_loss: ClassVar[bool] = True
    """Whether the long losses, which training always has, matter; likewise."""

    def __init_subclass__(cls) -> None:
        name = cls.__name__.lower()
        if name in SCHEME_NEEDS:
            cls.needs_short_loss = SCHEME_NEEDS[name].short_loss
            cls.needs_long_loss = SCHEME_NEEDS[name].long_loss
        SCHEMES[name] = cls

    @abstractmethod
    def scores(self, targets: Targets) -> Tensor: ...

    @abstractmethod
    def weights(self, scores: Tensor, targets: Targets) -> Tensor: ...


@dataclass(frozen=True)
class Uniform(Scheme):
    """w_i = 1: plain next-token training."""

    def scores(self, targets: Targets) -> Tensor:
        return torch.ones_like(targets.long_loss)

    def weights(self, scores: Tensor, targets: Targets) -> Tensor:
        return scores


@dataclass(frozen=True)
class Dense(Scheme):
    """w_i = n·|d_i| / Σ|d|: every target in proportion to what long context changes.

    With `interpolation` λ: λ + (1 - λ)·w_i. Helm, Daheim, Gurevych, "Token Weighting for Long-Range
    Language Modeling", Findings of NAACL 2025 (arXiv:2503.09202), like sparse, ppmi and npmi.
    """

    def scores(self, targets: Targets) -> Tensor:
        return targets.difference.abs()

    def weights(self, scores: Tensor, targets: Targets) -> Tensor:
        return normalise(scores, targets.live)


@dataclass(frozen=True)
class Sparse(Scheme):
    """w_i = n/k on the k = max(1, ⌊κn⌋) largest |d_i|, else 0."""

    keep_fraction: float
    """κ"""

    def scores(self, targets: Targets) -> Tensor:
        return targets.difference.abs()

    def weights(self, scores: Tensor, targets: Targets) -> Tensor:
        return _equal_weights(scores, targets, self.keep_fraction)


@dataclass(frozen=True)
class LongCE(Scheme):
    """w_i = min(exp(d_i), γ): p_long / p_short, bounded.

    Fang et al., "What is Wrong with Perplexity for Long-context Language Modeling?", ICLR 2025
    (arXiv:2410.23771), who do not normalise: their weights change the effective step size too.
    """

    max_weight: float
    """γ >= 1: under less, a target that long context helps would weigh less than in plain training,
    and so would one without a short loss."""
    normalise: str | None = None
    """`none`, the default: as published. `sequence`: then scaled to mean 1."""

    def scores(self, targets: Targets) -> Tensor:
        return targets.difference.exp().clamp(max=self.max_weight)

    def weights(self, scores: Tensor, targets: Targets) -> Tensor:
        return _as_asked(scores, targets, self.normalise)


@dataclass(frozen=True)
class LongPPL(Scheme):
    """w_i = n/k on the k key tokens of LongPPL, where d_i > α and log p_long > β; else 0.

    Fang et al. (as longce) pick by this rule what LongPPL measures; here it is what trains. Where a
    sequence has no key token its weights are uniform. α = 2, β = -2 as published unless given.
    """

    min_difference: float | None = None
    """α"""
    min_log_probability: float | None = None
    """β"""

    def scores(self, targets: Targets) -> Tensor:
        alpha = KEY_ALPHA if self.min_difference is None else self.min_difference
        beta = KEY_BETA if self.min_log_probability is None else self.min_log_probability
        key = (targets.difference > alpha) & (-targets.long_loss > beta) & targets.scored
        return key.to(targets.long_loss.dtype)

    def weights(self, scores: Tensor, targets: Targets) -> Tensor:
        return normalise(scores, targets.live)


@dataclass(frozen=True)
class PPMI(Scheme):
    """Score max(0, d_i - log s): long context helps by more than a factor s.

    The largest ⌊κn⌋ scores (at least one), never one that is 0, share the weight equally:
    w_i = n / kept. Shifted positive pointwise mutual information (Helm et al. 2025).
    """

    keep_fraction: float
    """κ"""
    shift: float
    """s"""

    def scores(self, targets: Targets) -> Tensor:
        return _above(targets.difference - math.log(self.shift), targets)

    def weights(self, scores: Tensor, targets: Targets) -> Tensor:
        return _equal_weights(scores, targets, self.keep_fraction, least=0)


@dataclass(frozen=True)
class NPMI(Scheme):
    """Score max(0, -d_i - log s): long context harms by more than a factor s; then like ppmi.

    Shifted *negative* pointwise mutual information, not the normalised one (Helm et al. 2025).
    """

    keep_fraction: float
    """κ"""
    shift: float
    """s"""

    def scores(self, targets: Targets) -> Tensor:
        return _above(-targets.difference - math.log(self.shift), targets)

    def weights(self, scores: Tensor, targets: Targets) -> Tensor:
        return _equal_weights(scores, targets, self.keep_fraction, least=0)


@dataclass(frozen=True)
class Rho(Scheme):
    """w_i = n/k on the k = max(1, ⌊κn⌋) largest excess losses long_loss_i - short_loss_i, else 0.

    The short losses must come from a *reference* model (one trained on clean data): kept are the
    targets where the trained model lags most behind it. Excess may be negative; the largest are
    kept even so. Lin et al., "Rho-1: Not All Tokens Are What You Need", NeurIPS 2024
    (arXiv:2404.07965), which selects per batch; here, per sequence.
    """

    keep_fraction: float
    """κ"""

    def scores(self, targets: Targets) -> Tensor:
        return targets.long_loss - targets.short_loss

    def weights(self, scores: Tensor, targets: Targets) -> Tensor:
        return _equal_weights(scores, targets, self.keep_fraction)


@dataclass(frozen=True)
class ESLM(Scheme):
    """No scorer: w_i = n/k on the k = max(1, ⌊κn⌋) largest long losses, else 0.

    These are the losses from the value at risk up, the empirical quantile of level α = 1 - κ; their
    mean, which is then the objective, is the conditional value at risk. Bal, Cevher, Muehlebach,
    "ESLM: Risk-Averse Selective Language Modeling for Efficient Pretraining", 2025
    (arXiv:2505.19893), the loss-based variant, which takes the quantile over a batch; here, over a
    sequence, and equal losses at the threshold are not all kept.
    """

    keep_fraction: float
    """κ = 1 - α"""

    def scores(self, targets: Targets) -> Tensor:
        return targets.long_loss

    def weights(self, scores: Tensor, targets: Targets) -> Tensor:
        return _equal_weights(scores, targets, self.keep_fraction)


@dataclass(frozen=True)
class Position(Scheme):
    """No scorer: targets with a long left context, rare context lengths first.

    A target whose piece gives it c > `window` tokens of context scores 1 / (live targets of its
    sequence in the same bucket ⌈log2 c⌉), others 0; normalised to mean 1, so every bucket of the
    long tail gets the same total. Use it with `interpolation`: λ is then the weight of the short
    contexts and 1 - λ the extra weight that the long ones share.

    After EXACT: "Where Does Long-Context Supervision Actually Go? Effective-Context Exposure
    Balancing", 2026 (arXiv:2605.10544): a fixed extra weight for the long tail, by inverse
    frequency of logarithmic context buckets. EXACT counts frequencies over the corpus, this over a
    sequence, as every normalisation here: a bucket that few targets fall into makes them heavy.
    """

    window: int | None = None
    """Contexts longer than this are long; default: a quarter of the sequence."""

    def scores(self, targets: Targets) -> Tensor:
        context = targets.context_length
        window = self.window or context.shape[1] // 4
        long = targets.live & (context > window)
        # frexp(c - 1) gives the exponent e with 2^(e-1) <= c - 1 < 2^e, exactly: e = ⌈log2 c⌉.
        bucket = torch.frexp((context - 1).double()).exponent.long()
        size = torch.zeros(len(context), 64, dtype=torch.int64, device=context.device)
        size.scatter_add_(1, bucket, long.long())
        share = size.gather(1, bucket).clamp(min=1).to(targets.long_loss.dtype).reciprocal()
        return share.where(long, torch.zeros_like(share))

    def weights(self, scores: Tensor, targets: Targets) -> Tensor:
        return normalise(scores, targets.live)


@dataclass(frozen=True)
class Custom(Scheme):
    """w_i = function(long_loss, short_loss, mask)_i, an import path `package.module:function`.

    The function gets whole sequences: the losses in nats as in ``Targets`` and a bool mask of the
    live targets, all [sequences, targets]. It returns weights of the same shape, at least 0, which
    are taken as they are, but for a sequence of nothing but zeros: that trains with weight 1, as
    under every scheme (the metrics count them). ``selection.normalise`` and ``keep_largest`` are
    there for it to use. It must give the same whenever it gets the same: all tensor and context
    ranks of a sequence call it, and each uses its own answer.
    """

    function: str
    normalise: str | None = None
    """As longce's."""

    def __post_init__(self) -> None:
        import_function(self.function)  # a wrong path is an error now, not in the first step

    def scores(self, targets: Targets) -> Tensor:
        return call(self.function, targets.long_loss, targets.short_loss, targets.live)

    def weights(self, scores: Tensor, targets: Targets) -> Tensor:
        return _as_asked(scores, targets, self.normalise)


def _as_asked(scores: Tensor, targets: Targets, how: str | None) -> Tensor:
    """The scores themselves, or with mean 1 (`normalise: sequence`)."""
    return normalise(scores, targets.live) if how == "sequence" else scores


def _above(scores: Tensor, targets: Targets) -> Tensor:
    """max(0, score); 0 where not scored, which under a shift below 1 would be above it."""
    return scores.clamp(min=0).where(targets.scored, torch.zeros_like(scores))


def _equal_weights(
    scores: Tensor, targets: Targets, fraction: float, least: float = -math.inf
) -> Tensor:
    """The kept of the largest ``scores`` alike, with mean 1: those above ``least``."""
    kept = keep_largest(scores, targets.live, fraction, targets.scored) & (scores > least)
    return normalise(kept.to(scores.dtype), targets.live)
