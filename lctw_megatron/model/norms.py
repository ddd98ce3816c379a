"""Norms that know sequence parallelism (torch's own are refused by megatron-core under SP)."""

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) * weight, computed in at least float32 (Zhang and Sennrich, 2019).

    Input and output [..., hidden_size]; the dtype of the output is the input's.
    """

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **_) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Under SP every TP rank sees other rows: megatron-core sums the gradients of the weights
        # that carry this mark over the TP ranks (finalize_model_grads).
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class LayerNorm(RMSNorm):
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias, otherwise as RMSNorm."""

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **_) -> None:  # type: ignore[no-untyped-def]
        super().__init__(config, hidden_size, eps)
        self.bias = nn.Parameter(torch.zeros_like(self.weight))
        self.bias.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.layer_norm(x, (x.shape[-1],), self.weight, self.bias, self.eps)
