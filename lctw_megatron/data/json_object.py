"""The one reader of JSON files, ours and others'.

A file may be damaged or hostile: nested until the interpreter's stack is full, gigabytes long, with
numbers of thousands of digits or halves of surrogate pairs that no file name or terminal takes.
All of that is one line here, so that what uses the values meets plain ones.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lctw_megatron.data.git_lfs import refuse_pointers
from lctw_megatron.errors import InputError

_MOST_BYTES = 1 << 29
_MOST_LEVELS = 50

Pairs = Callable[[list[tuple[str, Any]]], Any]


def parse_json(text: bytes | str, pairs: Pairs | None = None) -> Any:
    """The value in ``text``; ``pairs``, if given, makes an object of its names and values.

    Raises InputError (a ValueError) whose message says why but not where, for whoever calls to
    complete. NaN and infinity are read, as transformers and older tools of ours write them.
    """
    if len(text) > _MOST_BYTES:
        raise InputError(f"not valid JSON (larger than {_MOST_BYTES >> 20} MiB)")
    try:
        value = json.loads(text, object_pairs_hook=pairs)
        surrogates = b"\\ud" if isinstance(text, bytes) else "\\ud"
        if surrogates in text.lower():  # type: ignore[operator]
            json.dumps(value, ensure_ascii=False).encode()
        _check_depth(value)
    except RecursionError:
        raise InputError(f"not valid JSON (nested more than {_MOST_LEVELS} levels deep)") from None
    except InputError:
        raise
    except ValueError as error:  # broken UTF-8 and integers of 5,000 digits too
        raise InputError(f"not valid JSON ({error})") from None
    return value


def read_json(path: str | Path) -> Any:
    """The value in the file ``path``. InputError names it; FileNotFoundError if it is not there."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            return parse_json(file.read(_MOST_BYTES + 1))
    except InputError as error:
        refuse_pointers([path])
        raise InputError(f"{path}: {error}") from None


def read_json_object(path: str | Path) -> dict[str, Any]:
    """InputError if ``path`` holds anything else; FileNotFoundError if there is no such file."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise InputError(f"{path}: a JSON object was expected, found {type(value).__name__}")
    return value


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(_MOST_LEVELS):
        inner: list[Any] = []
        for each in level:
            if isinstance(each, dict):
                inner += each.values()
            elif isinstance(each, list):
                inner += each
        level = [each for each in inner if isinstance(each, dict | list)]
        if not level:
            return
    raise RecursionError
