"""Rotary frequencies, stretched as transformers stretches them.

megatron-core has classes of its own for llama3 and yarn, which know neither all of their fields (an
explicit attention factor; llama3's original maximum) nor `dynamic`.
"""

import math

import torch
from torch import Tensor

from lctw_megatron.config.model_sizes import rotary_width
from lctw_megatron.config.rope import effective_theta, turns
from lctw_megatron.config.schema import ModelConfig, RopeScaling


def frequencies(
    model: ModelConfig,
    length: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> Tensor:
    """Radians a position, [rotary width / 2], in a forward over ``length`` positions."""
    scaling, theta, width = model.rope_scaling, effective_theta(model, length), rotary_width(model)
    exponents = torch.arange(0, width, 2, dtype=dtype, device=device) / width
    plain = 1.0 / theta**exponents
    if scaling is None or scaling.rope_type == "dynamic":
        return plain
    if scaling.rope_type == "linear":
        return plain / scaling.factor
    if scaling.rope_type == "yarn":
        kept = _kept_by_yarn(plain, theta, scaling)
    else:
        kept = _kept_by_llama3(plain, scaling)
    return kept * plain + (1 - kept) * plain / scaling.factor


def _kept_by_llama3(plain: Tensor, scaling: RopeScaling) -> Tensor:
    """1 for frequencies of many turns within the original context, 0 for those of few, and between
    the two what lies between."""
    assert scaling.original_max_position_embeddings is not None
    turned = scaling.original_max_position_embeddings * plain / (2 * torch.pi)
    band = scaling.high_freq_factor - scaling.low_freq_factor
    return ((turned - scaling.low_freq_factor) / band).clamp(0, 1)


def _kept_by_yarn(plain: Tensor, theta: float, scaling: RopeScaling) -> Tensor:
    """As llama3's, but straight in the number of the frequency and not in its turns."""
    original, width = scaling.original_max_position_embeddings, 2 * len(plain)
    assert original is not None
    low, high = (
        width * math.log(original / (number * 2 * math.pi)) / (2 * math.log(theta))
        for number in turns(scaling)
    )
    if scaling.truncate is not False:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    if low == high:
        high += 0.001
    numbers = torch.arange(len(plain), dtype=plain.dtype, device=plain.device)
    return 1 - ((numbers - low) / (high - low)).clamp(0, 1)
