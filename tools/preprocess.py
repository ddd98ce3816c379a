"""Runs `lctw_megatron/commands/preprocess.py`, which is installed as `lctw-preprocess`."""

from lctw_megatron.cli import run_command
from lctw_megatron.commands.preprocess import main

if __name__ == "__main__":
    run_command(main)
