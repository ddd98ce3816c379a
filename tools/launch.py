"""Runs `lctw_megatron/commands/launch.py`, which is installed as `lctw-launch`."""

from lctw_megatron.cli import run_command
from lctw_megatron.commands.launch import main

if __name__ == "__main__":
    run_command(main)
