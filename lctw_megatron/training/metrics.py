"""What a step measured: sums that are exact for any layout, and where they are written.

Every rank adds up its part in one vector of float64 sums; one all-reduce over all ranks makes them
those of the global batch. Only last pipeline stages and first tensor ranks contribute, so nothing
is counted twice, and context-parallel parts add up like data-parallel ones.
"""

import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lctw_megatron.atomic import atomic_file
from lctw_megatron.data.metrics_file import read_metrics
from lctw_megatron.platform.peak_memory import peak_memory_bytes
from lctw_megatron.training.trackers import Sender
from lctw_megatron.weighting.occurrence import CLASSES
from lctw_megatron.weighting.statistics import WeightStatistics


class StepSums:
    """Sums of one step (or one evaluation) on one rank."""

    def __init__(self, device: torch.device) -> None:
        self.weighted_loss = torch.zeros((), dtype=torch.float64, device=device)
        self.plain_loss = torch.zeros((), dtype=torch.float64, device=device)
        self.counts = torch.zeros(3, dtype=torch.float64, device=device)
        """targets, unscored targets, sequences that fell back to uniform weights"""
        self.by_distance = torch.zeros((len(CLASSES), 2), dtype=torch.float64, device=device)
        """Σ loss and targets of near, far and first-seen targets"""
        self.row_losses: dict[int, Tensor] = {}
        """micro batch: Σ loss of each of its sequences on this rank, to find what is not finite"""
        self.routing = torch.zeros((0, 1), dtype=torch.float64, device=device)
        """of model.router.take_counts"""
        self.statistics = WeightStatistics(
            torch.zeros(6, dtype=torch.float64, device=device),
            torch.zeros((), dtype=torch.float64, device=device),
        )

    def all_reduce(self) -> None:
        """Make these the sums of all ranks, on the host: in one copy, for which it waits once."""
        names = ["weighted_loss", "plain_loss", "counts", "by_distance", "routing"]
        parts = [*(getattr(self, name) for name in names), self.statistics.sums]
        flat = torch.cat([part.flatten() for part in parts])
        dist.all_reduce(flat)
        dist.all_reduce(self.statistics.largest, dist.ReduceOp.MAX)
        whole = torch.cat([flat, self.statistics.largest.view(1)]).cpu()
        *sums, largest = whole.split([*(part.numel() for part in parts), 1])
        shaped = [new.view(part.shape) for part, new in zip(parts, sums, strict=True)]
        for name, new in zip(names, shaped, strict=False):
            setattr(self, name, new)
        self.statistics = WeightStatistics(shaped[-1], largest[0])

    def summary(self) -> dict[str, float]:
        """Losses in nats a target; what is not defined (no such targets) is left out."""
        targets, unscored, fallback = self.counts.tolist()
        divisor = max(targets, 1)
        result = {
            "loss/weighted": float(self.weighted_loss) / divisor,
            "loss/plain": float(self.plain_loss) / divisor,
            "targets/all": targets,
            "targets/unscored": unscored,
            "targets/fallback_sequences": fallback,
        }
        for name, (total, count) in zip(CLASSES, self.by_distance.tolist(), strict=True):
            if count:
                result[f"loss/{name}"] = total / count
            result[f"targets/{name}"] = count
        result |= {f"weights/{name}": v for name, v in self.statistics.summary().items()}
        return result | routing_summary(self.routing, targets)


def routing_summary(counts: Tensor, targets: float) -> dict[str, float]:
    """How evenly tokens went to experts (of model.router.take_counts, summed over all ranks): the
    balance loss, 1 where they did; the largest expert's tokens over the mean of its layer, averaged
    over the layers and in the worst; experts of all layers that no token chose. Nothing for a dense
    model, or where nothing was trained."""
    choices, imbalance = counts[:, :-1], counts[:, -1]
    if not float(choices.sum()):
        return {}
    largest = choices.amax(1) / choices.mean(1)
    return {
        "router/balance_loss": float(imbalance.mean()) / max(targets, 1),
        "router/largest_load": float(largest.mean()),
        "router/largest_load_of_any_layer": float(largest.max()),
        "router/idle_experts": float((choices == 0).sum()),
    }


def peak_memory_gib(device: torch.device) -> float:
    """Most memory this process held so far: of the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return peak_memory_bytes() / 2**30


class MetricsLog:
    """RUN_DIR/metrics.jsonl, one line a step, and the same for TensorBoard and the trackers. First
    rank only.

    After a resume the lines of steps that were not kept in the checkpoint are cut off, so the file
    holds every step once. The first line after every start says, in that file only, on what
    ``machine`` (text) and what ``note`` was told.
    """

    def __init__(
        self,
        run_dir: Path,
        first_step: int,
        tensorboard: bool,
        machine: str | None = None,
        trackers: Sequence[Sender] = (),
    ) -> None:
        self.path = run_dir / "metrics.jsonl"
        self._started: dict[str, Any] = {} if machine is None else {"speed/machine": machine}
        run_dir.mkdir(parents=True, exist_ok=True)
        self._truncate(first_step)
        # Open as long as the run, and unbuffered: a buffer loses what a full disk does not take.
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115
        self._waiting = b""
        self._trackers = trackers
        self._board: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter

                self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step)
            except ImportError:
                print(
                    "tensorboard is not installed, so there are no files for it; pip install "
                    "tensorboard, or set training.tensorboard: false"
                )

    def _truncate(self, first_step: int) -> None:
        if not self.path.exists():
            return
        lines = read_metrics(self.path)
        with atomic_file(self.path) as file:
            for line in lines:
                if line["step"] < first_step:
                    file.write(json.dumps(line).encode() + b"\n")

    def note(self, values: dict[str, float]) -> None:
        """What the next line says besides."""
        self._started |= values

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append the values of ``step``. Floats are written so that they read back bit-equal."""
        self._waiting += json.dumps({"step": step, **values, **self._started}).encode() + b"\n"
        self._started = {}
        # A full disk stops the run at its next checkpoint, on all ranks and with one line. Until
        # then the lines wait.
        with suppress(OSError):
            self._write_waiting()
        self._on_board(lambda board: [board.add_scalar(k, v, step) for k, v in values.items()])
        for tracker in self._trackers:
            tracker.log(step, values)

    def sync(self) -> None:
        """Raises OSError unless all lines are on the disk."""
        self._write_waiting()
        os.fsync(self._file.fileno())

    def _write_waiting(self) -> None:
        while self._waiting:
            self._waiting = self._waiting[self._file.write(self._waiting) :]

    def close(self) -> None:
        with suppress(OSError), self._file:
            self._write_waiting()
        self._on_board(lambda board: board.close())
        for tracker in self._trackers:
            tracker.end()
        for tracker in self._trackers:
            tracker.close()

    def _on_board(self, action: Callable[[Any], object]) -> None:
        """TensorBoard goes without what a full disk does not take, and without the rest too."""
        if self._board is not None:
            try:
                action(self._board)
            except OSError:
                self._board = None
