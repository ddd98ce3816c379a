"""Would 16 bits for a loss do? The largest change of any weight, for three encodings.

Megatron's .idx has a code for uint16 but none for float16, so a sidecar of half the size would hold
codes. What a code loses shows in the weights of ``dense``: a score |long - short| is off by up to
half a step, and is divided by the mean score, which is small, as most tokens need no long context.
``sparse`` turns such an error into the whole weight n/k of a target that falls on the other side of
the threshold.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lctw_megatron.weighting import compute_weights, parse_weighting

LARGEST_LOSS = 32.0
"""Nats. exp(-32) is less than any vocabulary's share of float32's resolution."""

SCHEMES: dict[str, dict[str, Any]] = {
    "dense": {"scheme": "dense"},
    "dense, interpolation 0.75": {"scheme": "dense", "interpolation": 0.75},
    "sparse 0.2": {"scheme": "sparse", "keep_fraction": 0.2},
    "longce": {"scheme": "longce", "max_weight": 5.0},
}


def linear(losses: Tensor) -> Tensor:
    """uint16 codes at equal steps of 0.0005 nats, decoded again."""
    step = LARGEST_LOSS / 65534
    return (losses.clamp(max=LARGEST_LOSS) / step).round() * step


def logarithmic(losses: Tensor, knee: float = 0.05) -> Tensor:
    """uint16 codes at equal steps of log(1 + loss / knee): fine below the knee, coarse above."""
    step = torch.tensor(LARGEST_LOSS / knee).log1p() / 65534
    codes = ((losses.clamp(max=LARGEST_LOSS) / knee).log1p() / step).round()
    return (codes * step).expm1() * knee


def half(losses: Tensor) -> Tensor:
    """The 16 bits of an IEEE float16 as the code."""
    return losses.half().float()


ENCODINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": linear,
    "logarithmic": logarithmic,
    "float16": half,
}


def weight_changes(long_loss: Tensor, short_loss: Tensor) -> dict[str, dict[str, dict[str, float]]]:
    """long_loss, short_loss float32 [sequences, targets] -> encoding, scheme: the largest and the
    mean change of a weight, and the share of weights that change by more than 0.001. The stored
    short loss is encoded; the long loss is the model's of that moment."""
    result: dict[str, dict[str, dict[str, float]]] = {}
    for name, encode in ENCODINGS.items():
        result[name] = {}
        encoded = encode(short_loss)
        for scheme, fields in SCHEMES.items():
            weighting = parse_weighting(fields)
            before = compute_weights(weighting, long_loss, short_loss)
            change = (compute_weights(weighting, long_loss, encoded) - before).abs()
            result[name][scheme] = {
                "largest": float(change.max()),
                "mean": float(change.mean()),
                "share beyond 0.001": float((change > 1e-3).float().mean()),
            }
    return result
