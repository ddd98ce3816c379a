"""The JSON object in a file of somebody else's."""

import json
from pathlib import Path
from typing import Any

from lctw_megatron.errors import InputError


def read_json_object(path: Path) -> dict[str, Any]:
    """InputError if ``path`` holds anything else; FileNotFoundError if there is no such file."""
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:  # broken UTF-8 too
        raise InputError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: a JSON object was expected, found {type(value).__name__}")
    return value
