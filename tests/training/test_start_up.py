"""SIGTERM and SIGUSR1 before the first step: the status that requeues, and soon."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from lctw_megatron.training.exit_status import REQUEUE_STATUS
from tests.ports import free_port
from tests.scoring.scene import WINDOWS, Scene, checkpoint, copy, scene
from tests.training.layouts import make_data, make_run
from tests.training.runs import write_recipe

__all__ = ["checkpoint", "copy", "scene"]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

PROGRAM = """
import sys
from lctw_megatron.training import exit_status
exit_status._PATIENCE_SECONDS = 1.0
from lctw_megatron.cli import run_command
from lctw_megatron.commands.{command} import main
run_command(main)
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_data(tmp_path_factory.mktemp("start_up"))


@pytest.fixture
def recipe(data: str, tmp_path: Path) -> Path:
    run = make_run(data, "unused", {}, "pack", "dense", "frozen", training={"steps": 1000})
    return write_recipe(tmp_path / "recipe.yaml", run)


def signalled(
    number: int, log: Path, command: str, *arguments: object,
    when: Callable[[int], bool], **environment: str,
) -> int:  # fmt: skip
    """The status of a process that gets a signal as soon as ``when(pid)`` is true."""
    with open(log, "w") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM.format(command=command), *map(str, arguments)],
            stdout=output, stderr=output,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not when(process.pid):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.002)
        process.send_signal(number)
        process.send_signal(signal.SIGTERM)  # a second one changes nothing
        return process.wait(60)
    finally:
        process.kill()
        process.wait()


def listens(pid: int) -> bool:
    """Whether SIGTERM has a handler."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = int(status.split("SigCgt:")[1].split()[0], 16)
    return bool(caught >> (signal.SIGTERM - 1) & 1)


def imports_torch(pid: int) -> bool:
    return listens(pid) and "libtorch" in Path(f"/proc/{pid}/maps").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("moment", [listens, imports_torch])
def test_while_libraries_are_imported(
    number: int, moment: Callable[[int], bool], recipe: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    assert signalled(number, log, "train", recipe, when=moment) == REQUEUE_STATUS, log.read_text()
    assert "start again to go on" in log.read_text() and "Traceback" not in log.read_text()
    assert not (tmp_path / "main").exists()


def test_while_data_and_model_are_made(recipe: Path, tmp_path: Path) -> None:
    log, lock = tmp_path / "log", tmp_path / "main" / ".lock"
    status = signalled(signal.SIGTERM, log, "train", recipe, when=lambda pid: lock.exists())
    assert status == REQUEUE_STATUS, log.read_text()


def test_while_torch_waits_for_the_other_ranks(recipe: Path, tmp_path: Path) -> None:
    port = str(free_port())

    def waits(pid: int) -> bool:
        return any(
            each.status == psutil.CONN_LISTEN and each.laddr.port == int(port)
            for each in psutil.Process(pid).net_connections()
        )

    log = tmp_path / "log"
    status = signalled(
        signal.SIGTERM, log, "train", recipe, when=waits, RANK="0", LOCAL_RANK="0",
        WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
    )  # fmt: skip
    assert status == REQUEUE_STATUS, log.read_text()


def test_scoring_leaves_so_at_any_time(copy: Scene, tmp_path: Path) -> None:
    folder = Path(f"{copy.prefix}.short_loss.shards")
    arguments = ["--data", copy.prefix, "--checkpoint", copy.checkpoint, *WINDOWS]
    log = tmp_path / "log"
    for moment in (imports_torch, lambda pid: (folder / "lock").exists()):
        status = signalled(signal.SIGUSR1, log, "score", *arguments, when=moment)
        assert status == REQUEUE_STATUS, log.read_text()
