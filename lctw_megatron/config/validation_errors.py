"""What is wrong with a user's values, as one line that says what would be right."""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from lctw_megatron.errors import InputError, few

S = TypeVar("S", bound=BaseModel)


def check_values(section: type[BaseModel], values: Any, where: str, prefix: str = "") -> None:
    """Refuse unknown fields and wrong values in ``values``; fields may still be missing.

    ``where`` is the file or option they come from, ``prefix`` the dotted path of ``values`` in it.
    Raises InputError.
    """
    try:
        section.model_validate(values)
    except ValidationError as error:
        found = [e for e in error.errors() if e["type"] != "missing"]
        if found:
            raise _one_line(section, found, where, prefix) from None


def build(section: type[S], values: Any, where: str, prefix: str = "") -> S:
    """``section`` made of ``values``, complete. Raises InputError like ``check_values``."""
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise _one_line(section, error.errors(), where, prefix) from None


def nearest(name: str, known: Iterable[str]) -> str:
    """`did you mean X?`, or the list of what is known, for an unknown ``name``."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else f"there are: {few(sorted(known), most=12)}"


def _one_line(
    section: type[BaseModel], errors: Sequence[Any], where: str, prefix: str
) -> InputError:
    # A misspelled field also leaves the right one missing: the misspelling is the thing to say.
    errors = sorted(errors, key=lambda e: e["type"] != "extra_forbidden")
    first = errors[0]
    location = [str(part) for part in first["loc"]]
    field = ".".join(([prefix] if prefix else []) + location)
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    if first["type"] == "extra_forbidden":
        owner = _section_at(section, location[:-1]) or section
        fields = list(owner.model_fields)
        hint = nearest(location[-1], fields)
        if not hint.startswith("did you"):
            elsewhere = [name for name in _paths_of(section, location[-1]) if name != field]
            hint = f"did you mean {elsewhere[0]}?" if elsewhere else hint
        return InputError(f"{where}: {field}: no such field; {hint}{more}")
    if first["type"] == "missing":
        return InputError(f"{where}: {field} is missing{more}")
    message = first["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    if first["type"] == "model_type":
        message = "fields (`field: value` lines)"
    if first["type"] == "too_short":
        message = f"a list of {first['ctx']['min_length']} or more"
    message = message.split(", unable to parse")[0].replace("a valid ", "a ")
    return InputError(
        f"{where}: {field} is {few([repr(first['input'])])}, expected {message}{more}"
    )


def _section_at(section: type[BaseModel], path: Sequence[str]) -> type[BaseModel] | None:
    """The section class that the dotted ``path`` (with list indices, dict keys) leads to."""
    current, inside = section, False
    for part in path:
        if inside:  # a list or dict: this is an index or a key
            inside = False
            continue
        field = current.model_fields.get(part)
        found = _inner_section(field.annotation) if field else None
        if field is None or found is None:
            return None
        annotations = (field.annotation, *get_args(field.annotation))
        current, inside = found, any(get_origin(one) in (list, dict) for one in annotations)
    return current


def _inner_section(annotation: Any) -> type[BaseModel] | None:
    """The section class inside an annotation such as ``list[Corpus]`` or ``RopeScaling | None``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in get_args(annotation):
        found = _inner_section(argument)
        if found:
            return found
    return None


def _paths_of(section: type[BaseModel], name: str) -> list[str]:
    """Dotted paths of all fields called ``name`` in the sections directly below ``section``."""
    paths = []
    for outer, field in section.model_fields.items():
        inner = _inner_section(field.annotation)
        if inner and outer != "runs" and name in inner.model_fields:
            paths.append(f"{outer}.{name}")
    return paths
