"""Runs `lctw_megatron/commands/train.py`, which is installed as `lctw-train`."""

from lctw_megatron.cli import run_command
from lctw_megatron.commands.train import main

if __name__ == "__main__":
    run_command(main)
