"""A loss that jumps: a sign of bad data or of too large a step."""

import statistics
from collections import deque


class SpikeWatch:
    """Notices a loss far above those of the steps before.

    A spike is a loss above the median of the last ``memory`` steps by more than ``times`` their
    median absolute deviation (times 1.48, which estimates a standard deviation) and by more than
    ``least`` nats.
    """

    def __init__(self, memory: int = 64, times: float = 8.0, least: float = 0.3) -> None:
        self._losses: deque[float] = deque(maxlen=memory)
        self._times, self._least = times, least

    def is_spike(self, loss: float) -> bool:
        """Whether ``loss`` is one; it counts as seen from now on."""
        known = list(self._losses)
        self._losses.append(loss)
        if len(known) < 16:
            return False
        middle = statistics.median(known)
        spread = 1.48 * statistics.median(abs(value - middle) for value in known)
        return loss - middle > max(self._times * spread, self._least)
