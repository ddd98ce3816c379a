"""Runs `lctw_megatron/commands/report.py`, which is installed as `lctw-report`."""

from lctw_megatron.cli import run_command
from lctw_megatron.commands.report import main

if __name__ == "__main__":
    run_command(main)
