"""SIGTERM and SIGUSR1 ask the run to save and leave; all ranks agree on the step where they do."""

import signal
from types import FrameType

import torch
import torch.distributed as dist

from lctw_megatron.training.exit_status import SIGNALS, ignore_signals, listen_no_longer


class StopRequest:
    """Set by a signal on any rank; read by all at once, between steps."""

    def __init__(self, device: torch.device) -> None:
        self._asked, self._device = False, device
        listen_no_longer()
        self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        self._leaving = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # Nothing of torch here: the processes that write a checkpoint are forked, SLURM signals
        # them as well, and CUDA does not work in them.
        self._asked = True

    def agreed(self) -> bool:
        """Whether any rank was asked. A collective call of all ranks."""
        asked = torch.tensor(float(self._asked), device=self._device)
        dist.all_reduce(asked, dist.ReduceOp.MAX)
        self._leaving = bool(asked.item())
        return self._leaving

    def close(self) -> None:
        """Listen no more. A rank that leaves ignores further signals until it has ended: the first
        rank that has makes srun --kill-on-bad-exit send SIGTERM to the others, and their status
        would become that of a failure.
        """
        if self._leaving:
            ignore_signals()
            return
        for number, handler in self._previous.items():
            signal.signal(number, handler)
