"""The dtypes that weights are converted between, and how each place spells them."""

import torch

from lctw_megatron.errors import InputError

TORCH = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Our name, in manifests and on command lines."""
CONFIG = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""In a Hugging Face config.json."""
SAFETENSORS = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
"""In the header of a safetensors file."""
KEEP = "keep"
"""On command lines: the dtype of what is converted."""

BY_SAFETENSORS = {spelled: TORCH[name] for name, spelled in SAFETENSORS.items()}


def name_of(dtype: torch.dtype) -> str:
    """Our name of ``dtype``. Raises InputError for a dtype that weights cannot have."""
    for name, known in TORCH.items():
        if known == dtype:
            return name
    raise InputError(f"weights in {dtype} cannot be converted; supported: {', '.join(TORCH)}")


def narrower(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    """The one of two dtypes that holds less, so that the other can be rounded to it."""
    return a if torch.finfo(a).eps > torch.finfo(b).eps else b
