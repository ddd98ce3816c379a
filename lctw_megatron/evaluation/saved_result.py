"""A result that is there already: reading it, and whether it is what is asked for now."""

import hashlib
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lctw_megatron.data.json_object import read_json
from lctw_megatron.errors import InputError, few
from lctw_megatron.model.checkpoint_folder import MANIFEST

Count = Annotated[int, Field(ge=0, le=2**40)]
"""Of targets or tokens: more would not add up in 64 bits, and no text has them."""


class Shape(BaseModel):
    """Base of what a result file must have; what else it has is not looked at. No number is NaN or
    infinite: no file of ours says so, and one would spoil every mean."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    def check_lengths(self, expected: int, *names: str) -> None:
        """ValueError unless each of these lists has so many entries."""
        for name in names:
            if len(found := getattr(self, name)) != expected:
                raise ValueError(f"{name} has {len(found)} entries, expected {expected}")


def read_result(
    path: str | Path, format_name: str, again: str, shape: type[Shape]
) -> dict[str, Any] | None:
    """The contents of a file whose `format` is ``format_name``, and whose other keys are as
    ``shape`` has them; None if there is none. InputError, which says how to make it ``again``, if
    it is no such: one that stays there would be refused each time."""
    advice = f"remove it and {again}, or name another --output"
    try:
        value = read_json(path)
    except FileNotFoundError:
        return None
    except InputError as error:
        raise InputError(f"{error}; {advice}") from None
    if not isinstance(value, dict) or value.get("format") != format_name:
        raise InputError(f"{path}: not a file of the format {format_name!r}; {advice}")
    try:
        shape.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        # Of a union pydantic names the class too.
        where = ".".join(str(part) for part in first["loc"] if str(part)[:1] != "_") or "it"
        why = first["msg"].removeprefix("Value error, ")
        raise InputError(f"{path}: damaged ({where}: {why}); {advice}") from None
    return value


_PLACES = {"checkpoint", "key_checkpoint", "data", "haystack", "folder"}
"""Settings that say where something lies. What it is, whatever its path is called, its identity
says, which stands beside each of them."""


def still_holds(
    output: str | Path, before: dict[str, Any] | None, settings: dict[str, Any]
) -> bool:
    """Whether the settings of the result in ``output`` are ``settings``, wherever lies what they
    name; None: there is none. One that was measured in another way is going to be replaced, which
    is said."""
    compared = [name for name in settings if name not in _PLACES]
    changed = [name for name in compared if (before or {}).get(name) != settings[name]]
    if before is not None and changed:
        print(f"{output}: was measured with another {few(changed)}, is replaced", flush=True)
    return before is not None and not changed


def weights_identity(checkpoint: Path) -> str:
    """Changes whenever the checkpoint is written anew; reads its manifest and file dates only."""
    digest = hashlib.blake2b((checkpoint / MANIFEST).read_bytes(), digest_size=16)
    for path in sorted(checkpoint.glob("*.distcp")):
        status = path.stat()
        digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()
