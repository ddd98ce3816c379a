"""Statistics of the scores and weights of a whole sidecar, from a stream of sequences.

Memory is bounded by the vocabulary and by what is asked for, whatever the size of the corpus.
"""

import heapq
from dataclasses import dataclass

import numpy as np
import torch

from lctw_megatron.evaluation.probes import class_of
from lctw_megatron.evaluation.sequence_weights import weight_by_class, weight_histogram
from lctw_megatron.inspection.scored_tokens import ScoredTargets
from lctw_megatron.weighting.occurrence import CLASSES
from lctw_megatron.weighting.statistics import WeightStatistics, weight_statistics

_MAGNITUDES = 2.0 ** np.arange(-6, 5)
DIFFERENCE_EDGES = np.concatenate([-_MAGNITUDES[::-1], _MAGNITUDES])
"""Bin b of the differences holds edge[b-1] <= d < edge[b]; the middle one is all but 0."""


@dataclass(frozen=True)
class TokenType:
    """One token id over all its targets."""

    id: int
    targets: int
    mean: float
    """Mean weight."""


class TokenStatistics:
    """Sums over all targets that were added."""

    def __init__(self, near: int, vocabulary: int) -> None:
        self.near = near
        self.targets = 0
        self.scored = 0
        self.difference_sum = 0.0
        self.magnitude_sum = 0.0
        self.differences = np.zeros(len(DIFFERENCE_EDGES) + 1, dtype=np.int64)
        self.weight_targets = np.zeros(0)
        self.weight_sums = np.zeros(0)
        self.class_targets = np.zeros(len(CLASSES), dtype=np.int64)
        self.class_weights = np.zeros(len(CLASSES))
        self.type_targets = np.zeros(vocabulary, dtype=np.int64)
        self.type_weights = np.zeros(vocabulary)
        self.weights: WeightStatistics | None = None

    def add(self, targets: ScoredTargets) -> None:
        """Count the targets of one sequence."""
        weight = targets.weight
        self.targets += len(targets)
        difference = targets.difference[~np.isnan(targets.difference)].astype(np.float64)
        self.scored += len(difference)
        self.difference_sum += float(difference.sum())
        self.magnitude_sum += float(np.abs(difference).sum())
        bins = np.searchsorted(DIFFERENCE_EDGES, difference, side="right")
        self.differences += np.bincount(bins, minlength=len(self.differences))
        histogram = weight_histogram(weight)
        if not len(self.weight_targets):
            self.weight_targets = np.zeros(len(histogram["starts"]))
            self.weight_sums = self.weight_targets.copy()
        self.weight_targets += histogram["targets"]
        self.weight_sums += histogram["weight"]
        classes = weight_by_class(weight, class_of(targets.distance, self.near))
        self.class_targets += classes["targets"]
        self.class_weights += classes["weight"]
        np.add.at(self.type_targets, targets.id, 1)
        np.add.at(self.type_weights, targets.id, weight)
        rows = [torch.from_numpy(values)[None] for values in (weight, targets.long_loss)]
        found = weight_statistics(rows[0], rows[1], torch.ones_like(rows[0]))
        self.weights = found if self.weights is None else self.weights + found

    def types(self, count: int, least: int) -> tuple[list[TokenType], list[TokenType]]:
        """The ``count`` heaviest and lightest token ids by mean weight, of those with at least
        ``least`` targets."""
        known = np.flatnonzero(self.type_targets >= max(least, 1))
        means = self.type_weights[known] / self.type_targets[known]
        order = np.argsort(-means, kind="stable")
        rows = [
            TokenType(int(known[at]), int(self.type_targets[known[at]]), float(means[at]))
            for at in order.tolist()
        ]
        return rows[:count], rows[::-1][:count]


@dataclass(frozen=True, order=True)
class TopTarget:
    """One target, ordered by the size of its value."""

    size: float
    document: int
    token: int
    value: float
    long_loss: float
    short_loss: float
    weight: float
    distance: int


class TopTargets:
    """The targets with the largest values (largest magnitudes, for differences) so far."""

    def __init__(self, count: int, by: str) -> None:
        self.count = count
        self.by = by
        self._heap: list[TopTarget] = []

    def add(self, targets: ScoredTargets) -> None:
        values = targets.values(self.by)
        sizes = np.abs(values) if self.by == "difference" else values
        sizes = np.where(np.isnan(values), -np.inf, sizes)
        if len(self._heap) == self.count:
            candidates = np.flatnonzero(sizes > self._heap[0].size)
        else:
            candidates = np.flatnonzero(np.isfinite(sizes))
        if len(candidates) > self.count:
            candidates = candidates[np.argsort(-sizes[candidates], kind="stable")[: self.count]]
        for at in candidates.tolist():
            target = TopTarget(
                float(sizes[at]),
                int(targets.document[at]),
                int(targets.token[at]),
                float(values[at]),
                float(targets.long_loss[at]),
                float(targets.short_loss[at]),
                float(targets.weight[at]),
                int(targets.distance[at]),
            )
            if len(self._heap) < self.count:
                heapq.heappush(self._heap, target)
            else:
                heapq.heappushpop(self._heap, target)

    def sorted(self) -> list[TopTarget]:
        """Largest first; equal ones in the order of the documents."""
        return sorted(self._heap, key=lambda t: (-t.size, t.document, t.token))
