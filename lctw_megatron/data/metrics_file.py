"""Reading a run's metrics.jsonl, which a kill, a full disk or a copy may have damaged."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from lctw_megatron.data.json_object import parse_json
from lctw_megatron.errors import InputError, few


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, each step once (the last one counts), in order.

    Lines torn by a kill, not UTF-8, or without a step and numbers, and all but the last of a step,
    are left out and counted in a printed line, which is no reason to stop anything.
    """
    steps: dict[int, tuple[int, dict[str, Any]]] = {}
    left_out = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        with suppress(InputError):
            value = parse_json(line)
            if isinstance(value, dict) and _is_step(value):
                if value["step"] in steps:
                    left_out.append(steps[value["step"]][0])
                steps[value["step"]] = number, value
                continue
        if line.strip():
            left_out.append(number)
    if left_out:
        numbers = few(sorted(left_out))
        print(f"{path}: {len(left_out)} lines left out, broken or written twice: {numbers}")
    return [steps[step][1] for step in sorted(steps)]


def last_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines in the last 64 KiB of a metrics.jsonl that may be being written; nothing is
    said of the others."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - (1 << 16)))
            text = file.read()
    except FileNotFoundError:
        return []
    lines = []
    for line in text.split(b"\n"):
        with suppress(InputError):
            value = parse_json(line)
            if isinstance(value, dict) and _is_step(value):
                lines.append(value)
    return lines


def _is_step(line: dict[str, Any]) -> bool:
    numbers = [value for name, value in line.items() if name != "speed/machine"]
    return type(line.get("step")) is int and all(
        type(number) is float or (type(number) is int and abs(number) < 2**62) for number in numbers
    )
