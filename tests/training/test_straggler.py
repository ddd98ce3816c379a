"""Only a rank that is slow again and again is named, and for the right reason.

test_hang_watch.py sees one in a run."""

import socket
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lctw_megatron.training import straggler
from lctw_megatron.training.straggler import StragglerWatch, compare


@pytest.mark.parametrize(
    ("data", "product", "expected"),
    [
        ([0.01, 0.01, 0.02, 0.01], [1.0, 1.1, 1.0, 1.0], (None, "")),
        ([0.01, 0.01, 0.61, 0.01], [1.0, 1.1, 1.0, 1.0], (2, "waits 0.61 s for its data")),
        # All wait alike: the disk is slow, no rank is.
        ([2.0, 2.1, 2.0, 2.1], [1.0, 1.0, 1.0, 1.0], (None, "")),
        (
            [0.01, 0.01, 0.02, 0.01],
            [1.0, 1.0, 1.1, 1.5],
            (3, "computes 1.5 x as long as the median rank"),
        ),
        ([0.01, 0.01], [2.0, 1.0], (0, "computes 2 x as long as the median rank")),
    ],
)
def test_a_rank_is_notable_beside_the_median_one(
    data: list[float], product: list[float], expected: tuple[int | None, str]
) -> None:
    times = torch.tensor([data, product], dtype=torch.float64).T
    metrics, rank, what = compare(times, step_seconds=3.0)
    assert (rank, what) == expected
    assert metrics["speed/slowest_data_seconds"] == max(data)
    assert metrics["speed/slowest_compute_rank"] == product.index(max(product))


def test_the_log_names_it_when_it_is_so_twice_in_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter([1, 1, None, 1, 0, 0])

    def gather(into: list[Any], value: Any) -> None:
        if isinstance(value, str):
            into[:] = [value] * len(into)

    def compared(times: torch.Tensor, step_seconds: float) -> Any:
        assert times.shape == (2, 2) and step_seconds == 3.0
        return {}, next(looks), "is slow"

    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    monkeypatch.setattr(dist, "all_gather", gather)
    monkeypatch.setattr(straggler, "compare", compared)
    watch = StragglerWatch(torch.device("cpu"))
    notes = []
    for _ in range(6):
        watch.look(0.1, 3.0)
        notes.append(watch.note)
    host = socket.gethostname()
    expected = ["", f"rank 1 on {host} is slow", "", "", "", f"rank 0 on {host} is slow"]
    assert notes == expected
