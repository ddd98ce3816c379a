"""Copies from the host to a GPU that do not make the host wait."""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``. From pageable memory a copy is staged before the call returns; from
    pinned memory, which torch keeps for the next such copy, it takes its turn among the kernels."""
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
