"""Rotary frequencies that are not those of theta alone."""

import torch
from torch import Tensor

from lctw_megatron.config.schema import RopeScaling


def llama3_inv_freq(inv_freq: Tensor, scaling: RopeScaling) -> Tensor:
    """Frequencies of `rope_type: llama3`: long wavelengths divided by `factor`, short ones kept.

    Between original/high and original/low wavelengths the two are interpolated (Llama 3.1 release,
    2024; Hugging Face's `rope_type: llama3`).
    """
    original = scaling.original_max_position_embeddings
    turns = original * inv_freq / (2 * torch.pi)  # rotations within the original context
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0, 1)
    return keep * inv_freq + (1 - keep) * inv_freq / scaling.factor
