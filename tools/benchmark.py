"""Runs `lctw_megatron/commands/benchmark.py`, which is installed as `lctw-benchmark`."""

from lctw_megatron.cli import run_command
from lctw_megatron.commands.benchmark import main

if __name__ == "__main__":
    run_command(main)
