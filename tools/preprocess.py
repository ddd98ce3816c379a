"""Runs `lctw_megatron/commands/preprocess.py`, which is installed as `lctw-preprocess`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # this checkout, not an installed copy

from lctw_megatron.cli import run_command
from lctw_megatron.commands.preprocess import main

if __name__ == "__main__":
    run_command(main)
