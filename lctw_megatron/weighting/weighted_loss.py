"""The objective: Σ w·loss over the global batch ÷ live targets of the global batch."""

import torch
from torch import Tensor


def weighted_sum(long_loss: Tensor, weights: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """This rank's part of the objective's numerator and denominator.

    Args:
        long_loss: [sequences, targets], nats, with gradient. May be anything where not live.
        weights: likewise, from ``compute_weights``; no gradient.
        mask: likewise, non-zero on live targets. Weights never go into the mask.

    Returns the sum of weight · loss over live targets, a scalar in float32 (float64 for float64
    losses) that carries the gradient, and the number of live targets, an int32 scalar: what
    Megatron's ``calculate_per_token_loss`` takes, which sums both over micro batches, DP and CP and
    divides once. A rank without live targets gives 0 and 0, with a gradient of zeros.
    """
    live = mask != 0
    losses = long_loss.to(torch.promote_types(long_loss.dtype, torch.float32))
    # Chosen, not multiplied by 0: a masked loss may be infinite.
    losses = losses.where(live, torch.zeros_like(losses))
    return (losses * weights.detach()).sum(), live.sum(dtype=torch.int32)
