"""Runs `lctw_megatron/commands/score.py`, which is installed as `lctw-score`."""

from lctw_megatron.cli import run_command
from lctw_megatron.commands.score import main

if __name__ == "__main__":
    run_command(main)
