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
    values: dict[str, Any], positions: int, path: Path, default_theta: float
) -> tuple[float, RopeScaling | None, list[str]]:
    """(theta, scaling, notes for the user) of the config.json ``path``. InputError.

    positions: its max_position_embeddings, or the default. default_theta: where it names none.
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
    if rope.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise InputError(
            f"{path}: unsupported: partial_rotary_factor {rope['partial_rotary_factor']} "
            "(supported: 1)"
        )
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
        return theta, None, notes
    given = {n: rope[n] for n in fields if rope.get(n) is not None}
    if _ORIGINAL in fields:
        # As transformers: from the top level, else from here, else the maximum.
        given[_ORIGINAL] = values.get(_ORIGINAL) or given.get(_ORIGINAL) or positions
    elif kind == "dynamic":
        given[_ORIGINAL] = positions
    if kind == "yarn" and "factor" in rope and "factor" not in given:  # null, as in transformers
        given["factor"] = positions / _whole(given[_ORIGINAL], path, name)
    needed = ("factor", "low_freq_factor", "high_freq_factor") if kind == "llama3" else ("factor",)
    if missing := [n for n in needed if n not in given]:
        raise InputError(f"{path}: {name}: rope_type {kind} without {few(missing)}")
    try:
        return theta, RopeScaling(rope_type=kind, **given), notes  # type: ignore[arg-type]
    except ValidationError as error:
        wrong = error.errors()[0]
        raise InputError(
            f"{path}: {name}.{wrong['loc'][-1]} of rope_type {kind} is {wrong['input']!r:.80}: "
            f"{wrong['msg']}"
        ) from None


def rope_values(model: ModelConfig) -> dict[str, Any]:
    """The fields of a config.json, in the form of transformers 4."""
    scaling = model.rope_scaling
    written: dict[str, Any] | None = None
    if scaling is not None:
        values = scaling.model_dump(exclude_none=True)
        written = {n: values[n] for n in ("rope_type", *FIELDS[scaling.rope_type]) if n in values}
    return {"rope_theta": model.rope_theta, "rope_scaling": written}


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
