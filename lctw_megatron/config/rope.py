"""How a model's rotary positions are stretched: what fits together, and what it amounts to.

The types and the meaning of their fields are transformers' (modeling_rope_utils.py):

- linear: all frequencies divided by the factor (position interpolation, Chen et al. 2023).
- dynamic: theta grows with the length of a forward, beyond the original maximum.
- yarn: low frequencies divided, high ones kept, attention sharpened (Peng et al. 2023).
- llama3: low frequencies divided, high ones kept (Llama 3.1).
"""

import math

from lctw_megatron.config.model_sizes import head_width, rotary_width
from lctw_megatron.config.schema import ModelConfig, RopeScaling
from lctw_megatron.errors import InputError, few

FIELDS: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (
        "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow",
        "mscale", "mscale_all_dim", "truncate",
    ),
    "llama3": (
        "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
    ),
}  # fmt: skip
"""Type: what transformers reads of `rope_scaling`. The original maximum of `dynamic` is the
config's `max_position_embeddings` there; here it is a field like that of the others, and the
maximum follows from it (``exported_maximum``)."""


def is_read(kind: object, name: str) -> bool:
    """Whether ``name`` is a field of `rope_scaling` that type ``kind`` reads; of an unknown one
    all are, for whoever refuses it."""
    if not isinstance(kind, str) or kind not in FIELDS or name == "rope_type":
        return True
    return name in FIELDS[kind] or (kind, name) == ("dynamic", "original_max_position_embeddings")


def check_rope(model: ModelConfig, where: str = "model.") -> None:
    """Refuse a `rope_scaling` whose fields do not fit together. InputError; ``where`` is put before
    the field's name."""
    scaling, share = model.rope_scaling, model.partial_rotary_factor
    if share != 1 and not model.parallel_block:
        raise InputError(
            f"{where}partial_rotary_factor is {share:g}, but {model.architecture} turns whole "
            "heads; leave it out, or use architecture phi"
        )
    if (turned := rotary_width(model)) % 2 or not turned:
        raise InputError(
            f"{where}partial_rotary_factor is {share:g}: positions would turn {turned} of the "
            f"{head_width(model)} numbers of a head, expected an even number"
        )
    if scaling is None:
        return
    kind, original = scaling.rope_type, scaling.original_max_position_embeddings
    name = f"{where}rope_scaling"
    known = {n for n in RopeScaling.model_fields if is_read(kind, n)}
    if kind != "linear" and original is None:
        raise InputError(
            f"{name}.original_max_position_embeddings is missing; rope_type {kind} needs the "
            "tokens of the context before stretching"
        )
    fields = RopeScaling.model_fields
    foreign = [n for n in fields if n not in known and getattr(scaling, n) != fields[n].default]
    if foreign:
        raise InputError(
            f"{name}: rope_type {kind} has no {few(foreign)} (it has {', '.join(sorted(known))}); "
            "leave it out"
        )
    if kind == "llama3" and scaling.high_freq_factor <= scaling.low_freq_factor:
        raise InputError(
            f"{name}.high_freq_factor is {scaling.high_freq_factor:g}, expected more than "
            f"low_freq_factor {scaling.low_freq_factor:g}"
        )
    fast, slow = turns(scaling)
    if fast < slow:
        raise InputError(f"{name}.beta_fast is {fast:g}, expected at least beta_slow {slow:g}")
    if kind == "yarn" and model.rope_theta <= 1:
        raise InputError(
            f"{where}rope_theta is {model.rope_theta:g}, expected more than 1 for yarn"
        )
    if kind == "dynamic" and turned <= 2:
        raise InputError(f"{name}: rope_type dynamic needs heads wider than 2, found 2")
    if share != 1 and attention_factor(scaling) != 1:
        raise InputError(
            f"{name}: yarn's attention factor {attention_factor(scaling):.6g} is for heads that "
            f"are turned whole, not to {share:g}; set attention_factor 1, or another rope_type"
        )


def turns(scaling: RopeScaling) -> tuple[float, float]:
    """yarn: frequencies with more turns than the first within the original context are kept, with
    fewer than the second divided."""
    return scaling.beta_fast or 32, scaling.beta_slow or 1


def attention_factor(scaling: RopeScaling | None) -> float:
    """yarn: what queries and keys are multiplied with."""
    if scaling is None or scaling.rope_type != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(scaling.factor) + 1.0

    if scaling.mscale and scaling.mscale_all_dim:
        return scale(scaling.mscale) / scale(scaling.mscale_all_dim)
    return scale(1.0)


def effective_theta(model: ModelConfig, length: int) -> float:
    """theta of a forward over ``length`` positions: the model's, but for dynamic beyond its
    original maximum. What transformers' model does that has seen nothing longer before."""
    scaling = model.rope_scaling
    if scaling is None or scaling.rope_type != "dynamic":
        return model.rope_theta
    original = scaling.original_max_position_embeddings
    assert original is not None
    stretch = scaling.factor * max(length, original) / original - (scaling.factor - 1)
    width = rotary_width(model)
    return model.rope_theta * stretch ** (width / (width - 2))


def narrowest_forward(model: ModelConfig, window: int) -> int:
    """The fewest positions that a window may be run as, where it has fewer tokens: all ``window``
    if the angles depend on how many there are, or scores would depend on what runs beside it."""
    scaling = model.rope_scaling
    if scaling is None or scaling.rope_type != "dynamic":
        return 1
    return window if window > (scaling.original_max_position_embeddings or 0) else 1


def longest_context(model: ModelConfig) -> int | None:
    """Tokens that the model is made for."""
    scaling = model.rope_scaling
    if scaling is not None and scaling.rope_type == "dynamic":
        return int(scaling.factor * (scaling.original_max_position_embeddings or 0))
    maximum = model.max_position_embeddings
    if scaling is not None and scaling.rope_type == "yarn" and maximum:
        return exported_maximum(model, maximum)
    return maximum


def exported_maximum(model: ModelConfig, longest: int) -> int:
    """`max_position_embeddings` of ``model``, where the recipe gives none, after training on
    ``longest`` tokens: never less than yarn's factor stretches to, as transformers 4.51 to 4.55
    reads the factor from it; the original maximum under dynamic, whose angles depend on it."""
    scaling = model.rope_scaling
    original = scaling.original_max_position_embeddings if scaling else None
    if scaling is None or original is None:
        return longest
    if scaling.rope_type == "dynamic":
        return original
    return (
        max(longest, round(scaling.factor * original)) if scaling.rope_type == "yarn" else longest
    )


def rope_line(model: ModelConfig) -> str:
    """Type, factor, original and new maximum, effective theta; for the start and end of a run."""
    scaling, maximum = model.rope_scaling, longest_context(model)
    if scaling is not None and scaling.rope_type == "yarn":
        maximum = model.max_position_embeddings  # of which transformers makes something else
    longest = f"maximum {maximum:,}" if maximum else "maximum not set"
    if model.partial_rotary_factor != 1:
        longest += f", {rotary_width(model)} of the {head_width(model)} numbers of a head"
    if scaling is None:
        return f"default, {longest}, theta {model.rope_theta:,.9g}"
    original = scaling.original_max_position_embeddings
    parts = [scaling.rope_type, f"factor {scaling.factor:g}"]
    if original:
        parts.append(f"original maximum {original:,}")
    parts.append(longest)
    if scaling.rope_type == "dynamic" and maximum:
        parts.append(
            f"theta {model.rope_theta:,.9g} to the original maximum, "
            f"{effective_theta(model, maximum):,.0f} at {maximum:,}"
        )
    else:
        parts.append(f"theta {model.rope_theta:,.9g}")
    if scaling.rope_type == "yarn":
        parts.append(f"attention factor {attention_factor(scaling):.6g}")
        if original and maximum and not math.isclose(maximum / original, scaling.factor):
            parts.append(
                f"which transformers 4.51 to 4.55 reads as factor {maximum / original:g}, the "
                "ratio of the maxima"
            )
    return ", ".join(parts)
