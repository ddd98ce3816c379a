"""kill -9 of a run of two ranks, again and again: it ends as if nothing had happened."""

import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from lctw_megatron.model.checkpoint import checkpoint_digest, find_checkpoint
from tests.scoring.processes import Ranks
from tests.training.layouts import make_data, make_run
from tests.training.runs import checkpoints, logged, write_recipe
from tests.training.trainers import TIMEOUT, run_train, train

DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_data(tmp_path_factory.mktemp("killed"))


def recipe(data: str, folder: Path, dropout: bool = True, **training: Any) -> Path:
    settings = {"save_interval": 2, "schedule": "cosine", "warmup_steps": 2, "clip_grad": 1.0}
    run = make_run(
        data, "unused", {}, "pack", "dense", "frozen", training=settings | training,
        model=DROPOUT if dropout else {},
    )  # fmt: skip
    folder.mkdir()
    return write_recipe(folder / "recipe.yaml", run)


@pytest.mark.parametrize(
    "kills", [pytest.param(3, id="3"), pytest.param(25, id="25", marks=pytest.mark.long)]
)
def test_killed_at_random_moments_it_ends_with_the_same_weights(
    data: str, tmp_path: Path, kills: int
) -> None:
    steps = 3 * kills + 3
    untouched = recipe(data, tmp_path / "untouched", steps=steps)
    assert train(untouched, 2).status == 0
    killed = recipe(data, tmp_path / "killed", steps=steps)
    chance = random.Random(kills)
    while_saving = sum(kill_once(killed, 3 * number, number, chance) for number in range(kills))
    assert while_saving >= kills // 3
    loading = Ranks(killed.with_suffix(".log"), 2, killed_while_loading, killed)
    assert loading.join().status != 0
    assert loading.processes[1].exitcode == -signal.SIGKILL
    outcome = train(killed, 2)
    assert outcome.status == 0, outcome.output
    run_dirs = [path.parent / "main" for path in (untouched, killed)]
    assert logged(run_dirs[1]) == logged(run_dirs[0])
    assert checkpoints(run_dirs[1]) == checkpoints(run_dirs[0])
    assert not processes_of(killed)
    digests = {checkpoint_digest(find_checkpoint(run_dir)) for run_dir in run_dirs}
    assert len(digests) == 1
    assert not list((run_dirs[1] / "checkpoints").glob(".*"))  # no leftovers


def kill_once(recipe: Path, after: int, number: int, chance: random.Random) -> bool:
    """Start, and kill -9 at a random moment after so many steps in all; every other time as soon
    as a checkpoint is being written. Returns whether one was half written."""
    run_dir = recipe.parent / "main"
    half_written = run_dir / "checkpoints"
    known = set(half_written.glob(".*.tmp"))
    asynchronous = f"training.async_save={chance.random() < 0.5}".lower()
    arguments = ("--set", asynchronous)
    ranks = Ranks(recipe.with_suffix(".log"), 2, run_train, recipe, arguments)
    deadline = time.monotonic() + TIMEOUT
    metrics = run_dir / "metrics.jsonl"
    while (metrics.read_bytes().count(b"\n") if metrics.exists() else 0) <= after or (
        number % 2 == 0 and not set(half_written.glob(".*.tmp")) - known
    ):
        output = recipe.with_suffix(".log")
        text = output.read_text() if output.exists() else ""
        assert all(process.is_alive() for process in ranks.processes), text
        assert time.monotonic() < deadline, text
        time.sleep(0.001)
    if number % 2:
        time.sleep(chance.random() * 0.05)
    ranks.kill(chance.randrange(2))
    return bool(set(half_written.glob(".*.tmp")) - known)


def killed_while_loading(recipe: Path) -> None:
    """Train, but the last rank is killed when it has read its part and not got the others'."""
    from torch.distributed.checkpoint import FileSystemReader

    real = FileSystemReader.read_data

    def read_data(*arguments: Any) -> Any:
        answer = real(*arguments)
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return answer

    FileSystemReader.read_data = read_data  # type: ignore[method-assign]
    run_train(recipe)


def processes_of(recipe: Path) -> list[str]:
    """Command lines of the processes that write to the recipe's log: its ranks and theirs."""
    log = str(recipe.with_suffix(".log"))
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if os.readlink(process / "fd" / "1") == log:
                found.append((process / "cmdline").read_text().replace("\0", " "))
    return found


@pytest.mark.long
def test_a_rank_that_hangs_ends_the_run_when_a_collective_has_waited_long_enough(
    data: str, tmp_path: Path
) -> None:
    path = recipe(data, tmp_path / "hanging", steps=1000, distributed_timeout_minutes=1)
    ranks = Ranks(path.with_suffix(".log"), 2, run_train, path)
    metrics = path.parent / "main" / "metrics.jsonl"
    deadline = time.monotonic() + TIMEOUT
    while not metrics.exists() or not metrics.read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    hanging = ranks.processes[1].pid
    assert hanging is not None
    os.kill(hanging, signal.SIGSTOP)
    started = time.monotonic()
    assert ranks.join(TIMEOUT).status == 1
    assert 50 < time.monotonic() - started < 120


def test_from_two_ranks_to_one_and_back_samples_and_losses_go_on(data: str, tmp_path: Path) -> None:
    expected = recipe(data, tmp_path / "alone", dropout=False, steps=9)
    assert train(expected, 1).status == 0
    changing = recipe(data, tmp_path / "changing", dropout=False, steps=9)
    assert train(changing, 2, stop_after=3).status == 75
    assert train(changing, 1, stop_after=6).status == 75
    outcome = train(changing, 2)
    assert outcome.status == 0, outcome.output
    lines = logged(changing.parent / "main")
    assert [line["step"] for line in lines] == list(range(9))
    for found, right in zip(lines, logged(expected.parent / "main"), strict=True):
        for name in ("targets/all", "targets/unscored", "targets/near", "targets/first_seen"):
            assert found[name] == right[name]  # exact: they count tokens of these samples
        for name in ("loss/plain", "loss/weighted", "grad_norm"):
            assert found[name] == pytest.approx(right[name], rel=1e-5), (name, found["step"])
