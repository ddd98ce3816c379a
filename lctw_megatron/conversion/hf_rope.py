"""`rope_theta`, `rope_scaling` and `rope_parameters` of a config.json to our fields and back."""

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lctw_megatron.config.rope import FIELDS
from lctw_megatron.config.schema import ModelConfig, RopeScaling
from lctw_megatron.errors import InputError, few

_ORIGINAL = "original_max_position_embeddings"
_READ = {"rope_type", "rope_theta", "partial_rotary_factor"}
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
            f"{path}: rope_theta is {values['rope_theta']}, but {theta} in {name}; keep one"
        )
    if nested := [name for name, value in rope.items() if isinstance(value, dict)]:
        raise InputError(f"{path}: unsupported: rope_parameters of their own for {nested}")
    turned = _share(rope, values, share, path)
    kind = rope.get("rope_type") or "default"
    if kind not in ("default", *FIELDS):
        raise InputError(
            f"{path}: unsupported: {name}.rope_type {kind!r:.80} (supported: default, "
            f"{', '.join(FIELDS)}); to extend the context, train with one of these or with another "
            "rope_theta"
        )
    stretched = [n for n in rope if any(n in fields for fields in FIELDS.values())]
    if "rope_type" not in rope and stretched:
        raise InputError(
            f"{path}: {name} has {few(stretched)}, but no rope_type, without which transformers 4 "
            f"loads nothing and 5 stretches nothing; name one (default, {', '.join(FIELDS)})"
        )
    fields = FIELDS.get(kind, ())
    unread = [n for n, value in rope.items() if n not in {*_READ, *fields} and value is not None]
    notes = []
    if unread:
        notes.append(
            f"{path}: {name}: left out, as rope_type {kind} has no {few(sorted(unread))} (nor in "
            "transformers)"
        )
    if values.get(_ORIGINAL) is not None and _ORIGINAL not in fields:
        notes.append(f"{path}: {_ORIGINAL}: left out, as rope_type {kind} does not read it")
    if kind == "default":
        return theta, None, turned, notes
    given = {n: rope[n] for n in fields if rope.get(n) is not None}
    if _ORIGINAL in fields:
        given[_ORIGINAL] = _original(given, values, positions, path, name)
    elif kind == "dynamic":
        given[_ORIGINAL] = positions
    if kind == "yarn" and "factor" in rope and "factor" not in given:  # null, as in transformers
        given["factor"] = positions / given[_ORIGINAL]
    if kind == "yarn" and rope.get("truncate", True) is None:  # as transformers reads a null
        given["truncate"] = False
    needed = ("factor", "low_freq_factor", "high_freq_factor") if kind == "llama3" else ("factor",)
    if missing := [n for n in needed if n not in given]:
        raise InputError(f"{path}: {name}: rope_type {kind} without {few(missing)}")
    try:
        scaling = RopeScaling.model_validate({"rope_type": kind, **given}, strict=True)
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
    for value in found:
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= 1:
            raise InputError(
                f"{path}: {name} is {value!r:.80}, expected a number above 0 and up to 1"
            )
    if any(value != found[0] for value in found):
        raise InputError(
            f"{path}: {name} is {found[1]!r}, but {found[0]!r} among the rope's; keep one"
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
    """`rope_scaling`, which is all that transformers reads if it is there, or `rope_parameters`;
    and the name of it. InputError if both are there and one says what the other does not."""
    older, newer = (_spelled(values, name, path) for name in ("rope_scaling", "rope_parameters"))
    if older and newer:
        beside = {name: values.get(name) for name in ("rope_theta", "partial_rotary_factor")}
        one, other = ({**beside, **rope} for rope in (older, newer))
        for name in sorted(one.keys() | other.keys()):
            if one.get(name) != other.get(name):
                raise InputError(
                    f"{path}: {name} is {one.get(name)!r:.80} with rope_scaling, but "
                    f"{other.get(name)!r:.80} with rope_parameters; keep one of the two objects"
                )
    return (older, "rope_scaling") if older else (newer, "rope_parameters")


def _spelled(values: dict[str, Any], name: str, path: Path) -> dict[str, Any]:
    """The object ``name``, empty if there is none, with its type as `rope_type`."""
    rope = values.get(name) or {}
    if not isinstance(rope, dict):
        raise InputError(f"{path}: {name} is {rope!r:.80}, expected an object or null")
    older, newer = rope.get("type"), rope.get("rope_type")
    if older and newer and older != newer:
        raise InputError(
            f"{path}: {name}.type is {older!r:.80}, but {name}.rope_type is {newer!r:.80}; keep one"
        )
    found = {field: value for field, value in rope.items() if field != "type"}
    return found | {"rope_type": newer or older} if older or newer else found


def _original(
    given: dict[str, Any], values: dict[str, Any], positions: int, path: Path, name: str
) -> int:
    """The original maximum of the object ``name``, where alone transformers looks for it, or the
    maximum."""
    value, beside = given.get(_ORIGINAL, positions), values.get(_ORIGINAL)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(
            f"{path}: {name}.{_ORIGINAL} is {value!r:.80}, expected a positive whole number"
        )
    if beside not in (None, value):
        raise InputError(
            f"{path}: {_ORIGINAL} is {beside!r:.80}, but {value} in {name}"
            + ("" if _ORIGINAL in given else " (where none is given, max_position_embeddings)")
            + ", where transformers looks for it; make them equal"
        )
    return value
