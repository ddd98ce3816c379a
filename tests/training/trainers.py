"""tools/train.py on ranks that may be killed, forked from a server that has done the imports."""

import os
import sys
from pathlib import Path
from typing import Any

from lctw_megatron.cli import run_command
from tests.scoring.processes import Outcome, Ranks
from tests.training.runs import sigterm_after

TIMEOUT = 300.0


def train(recipe: Path, world_size: int, *arguments: str, stop_after: int = -1) -> Outcome:
    """Train on so many ranks, with a signal to the last one after ``stop_after`` steps."""
    ranks = Ranks(recipe.with_suffix(".log"), world_size, run_train, recipe, arguments, stop_after)
    return ranks.join(TIMEOUT)


def run_train(recipe: Path, arguments: tuple[str, ...] = (), stop_after: int = -1) -> Any:
    """tools/train.py, in this process."""
    from tools import train as tool

    sys.argv = ["train.py", str(recipe), *arguments]
    last = int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1
    with sigterm_after(stop_after if last else -1):
        run_command(tool.main)
