"""How a process learns that it is one of several."""

import errno
import os

import pytest
import torch

from lctw_megatron.errors import InputError
from lctw_megatron.platform.world import World, first_rank_decides, started_together
from lctw_megatron.progress import Progress
from tests.distributed import run_distributed


def test_tasks_of_a_plain_srun_do_not_take_themselves_for_the_only_rank(monkeypatch):
    for name in ("RANK", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    assert not started_together()
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert not started_together()
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.raises(InputError, match="srun started 4 tasks without RANK"):
        started_together()
    monkeypatch.setenv("RANK", "2")
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    with pytest.raises(InputError, match="RANK is set, but WORLD_SIZE, MASTER_ADDR not"):
        started_together()
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    assert started_together()


def test_only_the_first_rank_says_how_far_it_is(capsys):
    for rank in range(3):
        world = World(rank, 3, torch.device("cpu"), 0, 0, 0, rank, 3)
        with Progress("train", 2, "steps", stream=world.progress_stream) as progress:
            progress.update(2)
    assert capsys.readouterr().err.count("train: 2/2 steps (100 %)") == 1


def leave(number: int) -> object:
    def fail() -> None:
        raise OSError(number, os.strerror(number))

    try:
        first_rank_decides(fail)
    except OSError as error:
        return error.errno
    except SystemExit as leaving:
        return f"status {leaving.code}"
    return "goes on"


def leave_twice() -> list[object]:
    return [leave(number) for number in (errno.EIO, errno.ENOSPC)]


def test_the_others_leave_with_the_status_of_the_first_rank():
    # What may be the machine's is tried again, a full disk is not.
    first, other = run_distributed(leave_twice, 2)
    assert first == [errno.EIO, errno.ENOSPC] and other == ["status 1", "status 2"]
