"""The real command lines in processes of their own, alone or on several GPUs under torchrun."""

import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
TIMEOUT = 240.0

WITHOUT_ENGINE = """
import runpy, sys
sys.modules["transformer_engine"] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@dataclass
class Ended:
    status: int
    output: str


class Tool:
    """A running tool. ``ranks`` > 1: under torchrun. engine False: TransformerEngine is hidden."""

    def __init__(self, name: str, *arguments: object, ranks: int = 1, engine: bool = True) -> None:
        command = [str(ROOT / "tools" / f"{name}.py"), *map(str, arguments)]
        if ranks > 1:
            assert engine
            torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
            command = [*torchrun, *command]
        elif not engine:
            command = ["-c", WITHOUT_ENGINE, *command]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )

    def end(self, timeout: float = TIMEOUT) -> Ended:
        try:
            output, _ = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            for child in psutil.Process(self.process.pid).children(recursive=True):
                child.kill()
            self.process.kill()
            output, _ = self.process.communicate()
            raise TimeoutError(f"after {timeout:g} s:\n{output[-4000:]}") from None
        return Ended(self.process.returncode, output)

    def ranks(self) -> list[psutil.Process]:
        """The processes of the ranks, in their order."""
        found = {}
        for child in psutil.Process(self.process.pid).children():
            with suppress(psutil.Error):  # it has just ended
                if "tools/" in " ".join(child.cmdline()):
                    found[int(child.environ()["RANK"])] = child
        return [child for _, child in sorted(found.items())]


def run(name: str, *arguments: object, ranks: int = 1, engine: bool = True) -> str:
    """The output of a tool that must succeed."""
    ended = Tool(name, *arguments, ranks=ranks, engine=engine).end()
    assert ended.status == 0, ended.output[-6000:]
    return ended.output
