"""Which rank is slow, told from work that every rank does alone.

A step takes equally long on all ranks, since they wait for each other in collectives, and in which
ones depends on the layout. Compared is therefore only what has no collective in it under any
layout: the seconds in which a rank gets its micro batches (a slow disk or host), and those of one
fixed product of matrices on its device right after the step (a hot or shared GPU, a taken core).
A slow network is not seen.
"""

import socket
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_DATA_SHARE = 0.05
"""Of a step: notable is a rank that gets its data by more than this later than the median rank."""
_COMPUTE_RATIO = 1.2
"""Notable is a rank whose product takes this much longer than the median rank's."""
_REPEATS = 3


class StragglerWatch:
    """Compares the ranks, on logged steps. All ranks make and call it; nothing for a single one."""

    def __init__(self, device: torch.device) -> None:
        self.note = ""
        """For the log line: the rank that was notable at both of the last two looks, or nothing."""
        self._device = device
        self._suspect: int | None = None
        hosts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(hosts, socket.gethostname())
        self._hosts: list[str] = hosts
        on_gpu = device.type == "cuda"
        size, dtype = (2048, torch.bfloat16) if on_gpu else (128, torch.float32)
        self._products = 8 if on_gpu else 2  # a quarter, half a millisecond where all is well
        self._matrix = torch.full((size, size), 1 / size, dtype=dtype, device=device)

    def look(self, data_seconds: float, step_seconds: float) -> dict[str, float]:
        """The metrics: seconds and rank of the last data, the rank of the slowest product and how
        many times the median rank's it took. A collective of a few bytes and, on a GPU, about a
        millisecond of products."""
        if len(self._hosts) == 1:
            return {}
        mine = torch.tensor(
            [data_seconds, self._product_seconds()], dtype=torch.float64, device=self._device
        )
        everyones = [torch.empty_like(mine) for _ in self._hosts]
        dist.all_gather(everyones, mine)
        metrics, rank, what = compare(torch.stack(everyones).cpu(), step_seconds)
        self.note = ""
        if rank is not None and rank == self._suspect:
            self.note = f"rank {rank} on {self._hosts[rank]} {what}"
        self._suspect = rank
        return metrics

    def _product_seconds(self) -> float:
        """The least of a few, so that what interrupts one is not counted."""
        times = []
        for _ in range(_REPEATS):
            self._wait()
            started = time.perf_counter()
            for _ in range(self._products):
                torch.mm(self._matrix, self._matrix)
            self._wait()
            times.append(time.perf_counter() - started)
        return min(times)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def compare(times: Tensor, step_seconds: float) -> tuple[dict[str, float], int | None, str]:
    """times [ranks, 2]: seconds for the data and for the product. -> metrics, and the notable rank
    with what is notable of it, None if there is none."""
    middle = times.median(0).values  # of two ranks the faster
    most = times.max(0)
    late, ratio = float(most.values[0]), float(most.values[1] / middle[1].clamp(min=1e-9))
    fetcher, computer = most.indices.tolist()
    metrics = {
        "speed/slowest_data_seconds": late,
        "speed/slowest_data_rank": fetcher,
        "speed/slowest_compute_ratio": ratio,
        "speed/slowest_compute_rank": computer,
    }
    if late - float(middle[0]) > _DATA_SHARE * step_seconds:
        return metrics, fetcher, f"waits {late:.2g} s for its data"
    if ratio > _COMPUTE_RATIO:
        return metrics, computer, f"computes {ratio:.2g} x as long as the median rank"
    return metrics, None, ""
