"""The helper that the distributed tests stand on."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from lctw_megatron.errors import InputError
from tests.distributed import run_distributed


def sum_of_ranks(offset: torch.Tensor) -> tuple[torch.Tensor, str]:
    total = offset + dist.get_rank()
    dist.all_reduce(total)
    return total, os.environ["RANK"] + os.environ["OMP_NUM_THREADS"]


def environment_of(name: str) -> str | None:
    return os.environ.get(name)


def speak() -> None:
    os.write(2, f"rank {dist.get_rank()}\n".encode())


def fail_on_rank_one() -> None:
    if dist.get_rank() == 1:
        raise InputError("the mistake of rank 1")
    dist.barrier()


def hang_on_rank_one() -> None:
    if dist.get_rank() == 1:
        time.sleep(1000)


def die_on_rank_one() -> None:
    if dist.get_rank() == 1:
        os._exit(7)
    dist.barrier()


def test_returns_the_result_of_every_rank_in_order() -> None:
    results = run_distributed(sum_of_ranks, 3, torch.tensor([10]))
    assert [int(total) for total, _ in results] == [33, 33, 33]
    assert [environment for _, environment in results] == ["01", "11", "21"]


def test_ranks_have_the_environment_of_the_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_distributed(environment_of, 2, "LCTW_OF_THE_MOMENT") == [None] * 2
    monkeypatch.setenv("LCTW_OF_THE_MOMENT", "set")
    assert run_distributed(environment_of, 2, "LCTW_OF_THE_MOMENT") == ["set"] * 2
    monkeypatch.delenv("LCTW_OF_THE_MOMENT")
    assert run_distributed(environment_of, 2, "LCTW_OF_THE_MOMENT") == [None] * 2


def test_ranks_write_where_the_test_looks(capfd: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        run_distributed(speak, 2)
        assert sorted(capfd.readouterr().err.splitlines()) == ["rank 0", "rank 1"]


def test_raises_the_exception_that_came_first_with_its_traceback() -> None:
    with pytest.raises(InputError, match="the mistake of rank 1") as caught:
        run_distributed(fail_on_rank_one, 2)
    note = "".join(caught.value.__notes__)
    assert "on rank 1 of 2" in note and "fail_on_rank_one" in note


def test_a_hanging_rank_is_a_timeout() -> None:
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"ranks \[.*1\] of 2"):
        run_distributed(hang_on_rank_one, 2, timeout=6)
    assert time.monotonic() - start < 30


def test_a_rank_that_dies_is_named() -> None:
    with pytest.raises(RuntimeError, match="rank 1 died with exit code 7"):
        run_distributed(die_on_rank_one, 2)
