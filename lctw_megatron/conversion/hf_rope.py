"""`rope_theta`, `rope_scaling` and `rope_parameters` of a config.json to our fields and back."""

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lctw_megatron.config.rope import FIELDS
from lctw_megatron.config.schema import ModelConfig, RopeScaling
from lctw_megatron.errors import InputError, few

_ORIGINAL = "original_max_position_embeddings"
_READ = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
"""What is read whatever the type."""


def read_rope(
    values: dict[str, Any], positions: int, share: float | None, path: Path, default_theta: float
) -> tuple[float, RopeScaling | None, float, list[str]]:
    """(theta, scaling, the share of a head that is turned, notes for the user) of the config.json
    ``path``. InputError.

    positions: its max_position_embeddings, or the default. share: the architecture's default; None
    if it turns whole heads. default_theta: where it names none.
    """
    rope, name = _joined(values, path)
    theta = rope.get("rope_theta", values.get("rope_theta", default_theta))
    if "rope_theta" in values and values["rope_theta"] not in (None, theta):
        raise InputError(
            f"{path}: rope_theta is {values['rope_theta']}, but {theta} in rope_parameters; "
            "keep one"
        )
    if nested := [name for name, value in rope.items() if isinstance(value, dict)]:
        raise InputError(f"{path}: unsupported: rope_parameters of their own for {nested}")
    turned = _share(rope, values, share, path)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", *FIELDS):
        raise InputError(
            f"{path}: unsupported: {name}.rope_type {kind!r:.80} (supported: default, "
            f"{', '.join(FIELDS)}); to extend the context, train with one of these or with another "
            "rope_theta"
        )
    fields = FIELDS.get(kind, ())
    unread = [n for n, value in rope.items() if n not in {*_READ, *fields} and value is not None]
    notes = []
    if unread:
        notes.append(
            f"{path}: {name}: left out, as rope_type {kind} has no {few(sorted(unread))} (nor in "
            "transformers)"
        )
    if kind == "default":
        return theta, None, turned, notes
    given = {n: rope[n] for n in fields if rope.get(n) is not None}
    if _ORIGINAL in fields:
        # As transformers: from the top level, else from here, else the maximum.
        given[_ORIGINAL] = values.get(_ORIGINAL) or given.get(_ORIGINAL) or positions
    elif kind == "dynamic":
        given[_ORIGINAL] = positions
    if kind == "yarn" and "factor" in rope and "factor" not in given:  # null, as in transformers
        given["factor"] = positions / _whole(given[_ORIGINAL], path, name)
    if kind == "yarn" and rope.get("truncate", True) is None:  # as transformers reads a null
        given["truncate"] = False
    needed = ("factor", "low_freq_factor", "high_freq_factor") if kind == "llama3" else ("factor",)
    if missing := [n for n in needed if n not in given]:
        raise InputError(f"{path}: {name}: rope_type {kind} without {few(missing)}")
    try:
        scaling = RopeScaling(rope_type=kind, **given)  # type: ignore[arg-type]
    except ValidationError as error:
        wrong = error.errors()[0]
        raise InputError(
            f"{path}: {name}.{wrong['loc'][-1]} of rope_type {kind} is {wrong['input']!r:.80}: "
            f"{wrong['msg']}"
        ) from None
    return theta, scaling, turned, notes


def _share(rope: dict[str, Any], values: dict[str, Any], share: float | None, path: Path) -> float:
    name = "partial_rotary_factor"
    found = [fields[name] for fields in (rope, values) if fields.get(name) is not None]
    if any(value != found[0] for value in found):
        raise InputError(
            f"{path}: {name} is {found[1]!r:.80}, but {found[0]!r:.80} among the rope's; keep one"
        )
    if share is None and found and found[0] != 1:
        raise InputError(f"{path}: unsupported: {name} {found[0]!r:.80} (supported: 1)")
    return found[0] if found else share or 1.0


def rope_values(model: ModelConfig) -> dict[str, Any]:
    """The fields of a config.json, in the form of transformers 4."""
    scaling = model.rope_scaling
    written: dict[str, Any] | None = None
    if scaling is not None:
        values = scaling.model_dump()
        written = {n: values[n] for n in ("rope_type", *FIELDS[scaling.rope_type]) if n in values}
    fields = {"rope_theta": model.rope_theta, "rope_scaling": written}
    if model.parallel_block:
        fields["partial_rotary_factor"] = model.partial_rotary_factor
    return fields


def _joined(values: dict[str, Any], path: Path) -> tuple[dict[str, Any], str]:
    """`rope_scaling` and `rope_parameters` as one, and the name of the one that is there."""
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(values.get(name) or {}, dict):
            raise InputError(f"{path}: {name} is {values[name]!r}, expected an object or null")
    older, newer = values.get("rope_scaling") or {}, values.get("rope_parameters") or {}
    for name in older.keys() & newer.keys():
        if older[name] != newer[name]:
            raise InputError(
                f"{path}: rope_scaling.{name} is {older[name]!r}, but rope_parameters.{name} is "
                f"{newer[name]!r}; keep one"
            )
    return {**newer, **older}, "rope_scaling" if older else "rope_parameters"


def _whole(value: Any, path: Path, name: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(
            f"{path}: {name}.{_ORIGINAL} is {value!r:.80}, expected a positive whole number"
        )
    return value
