"""Weights of whole sequences in numpy, and how they are spread. No model, no files.

Legend of shapes: n targets, S tokens of a sequence.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lctw_megatron.data.batch import IGNORE, Sample, stack_boundaries
from lctw_megatron.weighting.compute import compute_weights, known_targets
from lctw_megatron.weighting.occurrence import CLASSES
from lctw_megatron.weighting.parse import Weighting

HISTOGRAM_STARTS = np.concatenate([[0.0], 2.0 ** (np.arange(-24, 21) / 2)])
"""Weight 0, then half-octaves from 2^-12 (anything smaller counts there) to 2^10."""


def sequence_weights(
    weighting: Weighting, samples: Sequence[Sample], long_loss: np.ndarray, short_loss: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Weights float32 and live targets bool, [sequences, S], of whole sequences."""
    live = live_targets(samples)
    weights = compute_weights(
        weighting,
        torch.from_numpy(long_loss),
        torch.from_numpy(short_loss),
        mask=torch.from_numpy(live),
        boundaries=torch.from_numpy(stack_boundaries(samples)),
    )
    return weights.numpy(), live


def scores(
    weighting: Weighting, samples: Sequence[Sample], long_loss: np.ndarray, short_loss: np.ndarray
) -> np.ndarray:
    """What the scheme thinks of every target before it makes weights of it: float32 [sequences, S];
    NaN where there is no target, or no short loss for a scheme that needs one."""
    targets = known_targets(
        weighting,
        torch.from_numpy(long_loss),
        torch.from_numpy(short_loss),
        torch.from_numpy(live_targets(samples)),
        torch.from_numpy(stack_boundaries(samples)),
    )
    found = weighting.scheme.scores(targets)
    return found.where(targets.scored, torch.nan).numpy()


def live_targets(samples: Sequence[Sample]) -> np.ndarray:
    """bool [sequences, S]: where there is a target."""
    return np.stack([sample.labels != IGNORE for sample in samples])


def weight_histogram(weights: np.ndarray) -> dict[str, list[float]]:
    """`starts`, `targets` and `weight` of the buckets of ``weights`` [n]; see HISTOGRAM_STARTS."""
    bucket = np.searchsorted(HISTOGRAM_STARTS, weights, side="right") - 1
    bucket = np.where((bucket == 0) & (weights > 0), 1, bucket)
    size = len(HISTOGRAM_STARTS)
    return {
        "starts": HISTOGRAM_STARTS.tolist(),
        "targets": np.bincount(bucket, minlength=size).tolist(),
        "weight": np.bincount(bucket, weights=weights, minlength=size).tolist(),
    }


def weight_by_class(weights: np.ndarray, classes: np.ndarray) -> dict[str, list[Any]]:
    """Targets and Σw of near, far and first-seen targets: weights and classes [n]."""
    return {
        "bins": list(CLASSES),
        "targets": np.bincount(classes, minlength=len(CLASSES)).tolist(),
        "weight": np.bincount(classes, weights=weights, minlength=len(CLASSES)).tolist(),
    }
