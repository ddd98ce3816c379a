"""Tensors in weight files that are no weights: what a model computes anew from its config.json.

Older versions of transformers, Meta's own format and others' training code save buffers too, under
many names. transformers reads them over. So do we, where a tensor's content says what it is; one
with such a name and another content says that the model was trained with another config.json.
"""

import math

import torch
from torch import Tensor

from lctw_megatron.config.model_sizes import rotary_width
from lctw_megatron.config.rope import attention_factor
from lctw_megatron.config.schema import ModelConfig
from lctw_megatron.conversion.hf_safetensors import SafetensorsFolder
from lctw_megatron.model.rotary import frequencies

FREQUENCY_NAMES = ("inv_freq", "rope.freqs")
"""How the names end that nothing but rotary frequencies has."""
_MOST_ELEMENTS = 1 << 28
_DTYPES = {"F64", "F32", "F16", "BF16", "BOOL", "U8", "I8", "I16", "I32", "I64"}
_MASKED = -1e4
"""What is added to masked scores is this or less."""


def is_weightless(source: SafetensorsFolder, name: str, model: ModelConfig) -> bool:
    """Whether the tensor is the rotary frequencies of ``model``, their cosines or sines, a causal
    mask, the value that is masked with, or the numbers of the positions."""
    entry = source.entries[name]
    shape = entry.shape
    while shape[:1] == (1,) and len(shape) > 1:
        shape = shape[1:]
    width = rotary_width(model)
    likely = shape in ((), (1,)) or len(shape) == 1 or shape[0] == shape[1] or shape[1] == width
    if not likely or len(shape) > 2 or not 0 < math.prod(shape) <= _MOST_ELEMENTS:
        return False
    if entry.dtype not in _DTYPES:
        return False
    value = source.read(name).reshape(shape)
    if value.numel() == 1:
        return bool(value <= _MASKED)
    if value.dim() == 1:
        numbers = torch.arange(len(value)).equal(value.to(torch.int64))
        whole = not value.is_floating_point()
        return (whole and numbers) or _are_frequencies(value, model, width)
    return _is_causal_mask(value) or _are_angles(value, model, width)


def _frequencies(model: ModelConfig) -> list[Tensor]:
    """float64 [width / 2]: 1 / theta^(2i/width); and scaled, if the model's are."""
    plain = model.model_copy(update={"rope_scaling": None})
    variants = [model] if model.rope_scaling is None else [model, plain]
    return [frequencies(variant, 1, torch.float64) for variant in variants]


def _are_frequencies(value: Tensor, model: ModelConfig, width: int) -> bool:
    """To the precision of their dtype."""
    if not value.is_floating_point() or len(value) != width // 2:
        return False
    precision = 4 * max(torch.finfo(value.dtype).eps, torch.finfo(torch.float32).eps)
    return any(
        torch.allclose(value.double(), exact, rtol=precision, atol=1e-7)
        for exact in _frequencies(model)
    )


def _are_angles(value: Tensor, model: ModelConfig, width: int) -> bool:
    """Cosines or sines [positions, width], both halves alike; an angle's error grows with the
    position."""
    if not value.is_floating_point() or value.shape[1] != width:
        return False
    positions = torch.arange(len(value), dtype=torch.float64)
    angles = torch.outer(positions, _frequencies(model)[0]).repeat(1, 2)
    precision = 4 * torch.finfo(value.dtype).eps + 1e-6 * len(value)
    return any(
        torch.allclose(value.double(), factor * function(angles), rtol=0, atol=precision)
        for function in (torch.cos, torch.sin)
        for factor in {1.0, attention_factor(model.rope_scaling)}
    )


def _is_causal_mask(value: Tensor) -> bool:
    """[n, n]: true, or 0, where a row may look; false, or much below 0, above the diagonal."""
    if value.shape[0] != value.shape[1]:
        return False
    above = torch.ones(value.shape, dtype=torch.bool).triu(1)
    if value.is_floating_point() and bool((value[above] <= _MASKED).all()):
        return not value[~above].any()
    return bool((value[~above] == 1).all()) and not value[above].any()
