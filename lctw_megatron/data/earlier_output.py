"""A file that a command writes replaces an earlier one of its kind, and nothing else."""

import os
from collections.abc import Iterable
from pathlib import Path

from lctw_megatron.data.json_object import parse_json
from lctw_megatron.errors import InputError

_LINE, _HEAD = 1 << 26, 1 << 12
"""Bytes at most of a first line, and of a head that has a mark."""


def check_earlier_lines(option: str, output: str | Path, kind: str, keys: Iterable[str]) -> None:
    """InputError if ``output``, which the user names by ``option``, is a file of anything but JSON
    lines that have ``keys``."""
    first = _beginning(output, _LINE).partition(b"\n")[0]
    try:
        ours = not first or set(keys) <= set(parse_json(first))
    except (InputError, TypeError):
        ours = False
    _refuse_unless(ours, option, output, kind)


def check_earlier_mark(option: str, output: str | Path, kind: str, mark: str) -> None:
    """Likewise, if it is a file without ``mark`` in its head."""
    found = _beginning(output, _HEAD)
    _refuse_unless(not found or mark.encode() in found, option, output, kind)


def _beginning(output: str | Path, most: int) -> bytes:
    """Empty for a file that is not there or has nothing to lose."""
    if not os.path.isfile(output):
        return b""
    with open(output, "rb") as file:
        return file.read(most)


def _refuse_unless(ours: bool, option: str, output: str | Path, kind: str) -> None:
    if not ours:
        raise InputError(
            f"{option} {output}: is there and no earlier {kind}, and would be replaced; name "
            "another file, or remove it"
        )
