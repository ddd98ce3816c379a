"""From the `weighting` section of a recipe to a scheme with its parameters."""

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

from lctw_megatron.config.schema import WeightingConfig
from lctw_megatron.config.schemes import SCHEME_NEEDS
from lctw_megatron.config.validation_errors import build, nearest
from lctw_megatron.errors import InputError
from lctw_megatron.weighting.schemes import SCHEMES, Scheme, Uniform


@dataclass(frozen=True)
class Weighting:
    """A scheme with its parameters, and the settings that all schemes share."""

    scheme: Scheme
    config: WeightingConfig
    """`interpolation`, `unscored`, and where the short losses come from: `mode`, `window`, …"""

    @property
    def gives_zeros(self) -> bool:
        """Whether a live target may get weight 0: never if a part of every weight is 1."""
        return self.config.interpolation == 0 and not isinstance(self.scheme, Uniform)


def parse_weighting(values: Mapping[str, Any] | WeightingConfig) -> Weighting:
    """Check ``values``, a dict with the fields of ``WeightingConfig`` or one itself.

    Raises InputError naming the field and what is right: an unknown field or scheme (with the
    nearest name), a value out of range, a parameter that the scheme lacks or does not take.
    """
    config = values
    if not isinstance(config, WeightingConfig):
        if not isinstance(config, Mapping):  # a fragment's name, as recipes may say
            raise InputError(
                f"weighting is {config!r}, expected its fields, as {{'scheme': 'dense'}}"
            )
        config = build(WeightingConfig, dict(config), "weighting")
    name = config.scheme
    if name not in SCHEMES:
        raise InputError(f"weighting.scheme {name!r}: no such scheme; {nearest(name, SCHEMES)}")
    scheme = SCHEMES[name]
    takes = {field.name: field.default is MISSING for field in fields(scheme)}  # type: ignore[arg-type]
    takers_of: dict[str, list[str]] = {}
    for other, needs in SCHEME_NEEDS.items():
        for parameter in (*needs.parameters, *needs.optional):
            takers_of.setdefault(parameter, []).append(other)
    for parameter, takers in takers_of.items():
        if parameter not in takes and getattr(config, parameter) is not None:
            raise InputError(
                f"weighting.{parameter}: scheme {name} does not take it (only "
                f"{', '.join(takers)}); remove it"
            )
    for parameter, required in takes.items():
        value = getattr(config, parameter)
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"weighting.{parameter} is {value}, expected a finite number")
        if required and value is None:
            description = WeightingConfig.model_fields[parameter].description
            raise InputError(
                f"weighting.{parameter} is missing; scheme {name} needs it: {description}"
            )
    return Weighting(
        scheme(**{parameter: getattr(config, parameter) for parameter in takes}), config
    )
