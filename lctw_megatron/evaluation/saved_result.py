"""A result that is there already: reading it, and whether it is what is asked for now."""

from pathlib import Path
from typing import Any

from lctw_megatron.data.json_object import read_json
from lctw_megatron.errors import InputError, few


def read_result(path: str | Path, format_name: str, again: str) -> dict[str, Any] | None:
    """The contents of a file whose `format` is ``format_name``; None if there is none. InputError,
    which says how to make it ``again``, if it is no such."""
    try:
        value = read_json(path)
    except FileNotFoundError:
        return None
    except InputError as error:
        raise InputError(f"{error}; {again}") from None
    if not isinstance(value, dict) or value.get("format") != format_name:
        raise InputError(f"{path}: not a file of the format {format_name!r}; name another output")
    return value


def still_holds(
    output: str | Path, before: dict[str, Any] | None, settings: dict[str, Any]
) -> bool:
    """Whether the settings of the result in ``output`` are ``settings``; None: there is none. One
    that was measured in another way is going to be replaced, which is said."""
    changed = [name for name, value in settings.items() if (before or {}).get(name) != value]
    if before is not None and changed:
        print(f"{output}: was measured with another {few(changed)}, is replaced", flush=True)
    return before is not None and not changed
