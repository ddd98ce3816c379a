"""Running a tool as a user does, in this process or in one of its own."""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lctw_megatron.cli import run_command

TOOLS = Path(__file__).parents[2] / "tools"


@dataclass
class Answer:
    status: int
    out: str
    err: str

    def error_line(self) -> str:
        """The one line of a user's mistake, without ``error: ``."""
        assert self.status == 2, (self.status, self.out, self.err)
        assert self.out == ""
        *progress, line = self.err.splitlines()
        assert all(" elapsed" in each or " left" in each for each in progress), self.err
        assert line.startswith("error: "), self.err
        return line.removeprefix("error: ")


def call(main: Any, capsys: pytest.CaptureFixture[str], *arguments: object) -> Answer:
    """What the tool with this ``main`` answers, without the cost of a new process."""
    capsys.readouterr()
    before = sys.argv
    sys.argv = ["tool", *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as end:
            run_command(main)
    finally:
        sys.argv = before
    captured = capsys.readouterr()
    return Answer(int(end.value.code or 0), captured.out, captured.err)


def start(name: str, *arguments: object, **environment: str) -> "subprocess.Popen[str]":
    """The tool in a process of its own."""
    return subprocess.Popen(
        [sys.executable, str(TOOLS / name), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        # Else what a shell starts with & is deaf to Ctrl-C, and so is all that it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def run(name: str, *arguments: object, **environment: str) -> Answer:
    process = start(name, *arguments, **environment)
    out, err = process.communicate(timeout=300)
    return Answer(process.returncode, out, err)
