"""A disk that fills up while a checkpoint is written: a clean end, and the older one serves."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.training.layouts import make_data, make_run
from tests.training.runs import checkpoints, logged, write_recipe
from tests.training.trainers import train

STEPS = 6


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A file system of so many KiB; called again, it is enlarged."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = False

    def size(kib: int) -> Path:
        nonlocal mounted
        options = f"size={kib}k" + (",remount" if mounted else "")
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        answer = subprocess.run(command, capture_output=True, text=True)
        if answer.returncode:
            pytest.skip(f"no small file system can be mounted here: {answer.stderr.strip()}")
        mounted = True
        return folder

    yield size
    if mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def recipe(data: str, folder: Path, asynchronous: bool = False) -> Path:
    training = {"steps": STEPS, "save_interval": 2, "keep_last": 1, "async_save": asynchronous}
    run = make_run(data, "unused", {}, "pack", "dense", "frozen", training=training)
    return write_recipe(folder / "recipe.yaml", run)


@pytest.fixture(scope="module")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that had all the room it needed, its data beside it."""
    folder = tmp_path_factory.mktemp("roomy")
    outcome = train(recipe(make_data(folder), folder), 2)
    assert outcome.status == 0, outcome.output
    return folder


@pytest.mark.parametrize(
    ("asynchronous", "room"),
    [
        pytest.param(True, 0.5, id="a rank's file, async"),
        pytest.param(False, 0.02, id="the first file"),
        pytest.param(False, 0.5, id="a rank's file", marks=pytest.mark.long),
        pytest.param(True, 0.02, id="the first file, async", marks=pytest.mark.long),
    ],
)
def test_a_full_disk_ends_all_ranks_with_one_line_and_the_older_checkpoint_serves(
    roomy: Path, small_disk: Callable[[int], Path], room: float, asynchronous: bool
) -> None:
    """room: for which part of the second checkpoint there is some."""
    newest = roomy / "main" / "checkpoints" / f"step_{STEPS:08d}"
    needed = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file()) // 1024
    disk = small_disk(int(needed * (1 + room)) + 200)  # and the log, the caches

    path = recipe(str(roomy / "tokens"), disk, asynchronous)
    outcome = train(path, 2)
    assert outcome.status == 2, outcome.output
    errors = [line for line in outcome.output.splitlines() if line.startswith("error: ")]
    assert errors and len(set(errors)) == 1, outcome.output
    assert "step_00000004: could not be written" in errors[0] and "MB free" in errors[0]
    assert "Traceback" not in outcome.output
    assert checkpoints(disk / "main") == [2]
    assert not list((disk / "main" / "checkpoints").glob(".*"))  # nothing half written takes room

    small_disk(16 * needed + 4096)
    outcome = train(path, 2)
    assert outcome.status == 0, outcome.output
    assert "steps 2..6" in outcome.output
    assert logged(disk / "main") == logged(roomy / "main")
    assert checkpoints(disk / "main") == [STEPS]
    assert os.path.ismount(disk)
