"""The gradient norm without waiting for the GPU, where apex and TransformerEngine are missing.

megatron-core's stand-in for their kernel brings the norm of every parameter to the host one by one
(0.16.1 and 0.19.2): on a GPU the host waits as often as the model has parameters.
"""

from typing import Any

import torch
from torch import Tensor


def use_norm_at_once() -> None:
    """Let torch compute it; apex's and TransformerEngine's kernels are left alone."""
    from megatron.core.optimizer import clip_grads
    from megatron.core.utils import local_multi_tensor_l2_norm

    if clip_grads.l2_norm_impl is local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = l2_norm_at_once


def l2_norm_at_once(
    chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], *args: Any
) -> tuple[Tensor, None]:
    """The norm of all gradients of ``tensor_lists[0]`` together: float32 [1] on their device."""
    return torch.nn.utils.get_total_norm(tensor_lists[0]).float().view(1), None
