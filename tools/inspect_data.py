"""Runs `lctw_megatron/commands/inspect_data.py`, which is installed as `lctw-inspect-data`."""

from lctw_megatron.cli import run_command
from lctw_megatron.commands.inspect_data import main

if __name__ == "__main__":
    run_command(main)
