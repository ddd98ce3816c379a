"""Weights are finite numbers, where they come from and in the dtype they are written in.

One NaN or infinity makes a model's outputs so. Training that diverged leaves them, and rounding
makes infinities of values beyond the largest of a dtype: of fp16 that is 65504.
"""

from pathlib import Path

import torch
from torch import Tensor

from lctw_megatron.conversion import dtypes
from lctw_megatron.errors import InputError


def check_finite(value: Tensor, target: torch.dtype, tensor: str, file: Path) -> None:
    """InputError that names ``tensor`` of ``file`` if ``value``, rows of it, holds what is not
    finite, or not in ``target``. One pass, no copy: rounding keeps the order, so the smallest and
    the largest value decide, and a NaN is both."""
    if not value.numel():
        return
    ends = torch.stack(torch.aminmax(value))
    if ends.to(target).isfinite().all():
        return
    if not ends.isfinite().all():
        raise InputError(
            f"{file}: {tensor} holds NaN or infinity, so the model computes nothing; fetch it "
            "again, or take a checkpoint from before its training diverged"
        )
    wider = " or ".join(
        name
        for name, dtype in dtypes.TORCH.items()
        if torch.finfo(dtype).max > torch.finfo(target).max
    )
    raise InputError(
        f"{file}: {tensor} has an absolute value of {float(ends.abs().max()):g}, "
        f"{dtypes.name_of(target)} ends at {torch.finfo(target).max:g}; use --dtype {wider}"
    )
