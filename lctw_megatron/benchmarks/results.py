"""The numbers of a benchmark: a line a part on the screen, all of them in a JSON file."""

from pathlib import Path
from typing import Any

from lctw_megatron.atomic import write_json


class Results(dict[str, Any]):
    """Name -> numbers. Each is printed, and all are written, when it is set: what is killed leaves
    what it had."""

    def __init__(self, output: Path, first_rank: bool = True) -> None:
        """first_rank: only that one prints and writes."""
        super().__init__()
        self._output, self._first_rank = output, first_rank

    def __setitem__(self, name: str, row: Any) -> None:
        super().__setitem__(name, row)
        if self._first_rank:
            print(f"{name}: {_text(row) if isinstance(row, dict) else row}", flush=True)
            write_json(self._output, self)


def _text(row: dict[str, Any]) -> str:
    parts = []
    for key, value in row.items():
        if isinstance(value, list):  # lines of their own
            parts += ["".join(f"\n    {line}" for line in value)]
        else:
            parts.append(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}")
    return "  ".join(parts)
