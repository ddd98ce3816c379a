"""The numbers of a benchmark: a line a part on the screen, all of them in a JSON file."""

from pathlib import Path
from typing import Any

from lctw_megatron.atomic import write_json


def print_results(results: dict[str, Any]) -> None:
    """Every part on a line of its own."""
    for name, row in results.items():
        text = _text(row) if isinstance(row, dict) else row
        print(f"{name}: {text}", flush=True)


def write_results(results: dict[str, Any], output: Path) -> None:
    """All numbers, atomically."""
    write_json(output, results)


def _text(row: dict[str, Any]) -> str:
    parts = []
    for key, value in row.items():
        if isinstance(value, list):  # lines of their own
            parts += ["".join(f"\n    {line}" for line in value)]
        else:
            parts.append(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}")
    return "  ".join(parts)
