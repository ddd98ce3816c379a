"""Runs `lctw_megatron/commands/convert.py`, which is installed as `lctw-convert`."""

from lctw_megatron.cli import run_command
from lctw_megatron.commands.convert import main

if __name__ == "__main__":
    run_command(main)
