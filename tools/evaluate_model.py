"""Runs `lctw_megatron/commands/evaluate_model.py`, which is installed as `lctw-evaluate-model`."""

from lctw_megatron.cli import run_command
from lctw_megatron.commands.evaluate_model import main

if __name__ == "__main__":
    run_command(main)
