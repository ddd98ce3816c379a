"""A loss that jumps: a sign of bad data or of too large a step."""

import statistics
from collections import deque
from contextlib import suppress
from pathlib import Path

from lctw_megatron.atomic import write_json
from lctw_megatron.data.loader import TokenLoader
from lctw_megatron.errors import few
from lctw_megatron.training.nonfinite import describe_samples

_MEMORY, _FEWEST = 64, 16
"""Steps that a loss is compared with: the last, and at least."""
_DEVIATIONS, _NATS = 8.0, 0.3


class SpikeWatch:
    """Notices a loss far above those of the steps before.

    A spike is a loss above their median by more than _DEVIATIONS times their median absolute
    deviation (times 1.48, which estimates a standard deviation) and by more than _NATS.
    """

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=_MEMORY)

    def is_spike(self, loss: float) -> bool:
        """Whether ``loss`` is one; it counts as seen from now on."""
        known = list(self._losses)
        self._losses.append(loss)
        if len(known) < _FEWEST:
            return False
        middle = statistics.median(known)
        spread = 1.48 * statistics.median(abs(value - middle) for value in known)
        return loss - middle > max(_DEVIATIONS * spread, _NATS)

    def seen(
        self, step: int, metrics: dict[str, float], loader: TokenLoader, run_dir: Path
    ) -> str | None:
        """The line for the log if the loss of ``step`` is a spike; the documents of its batch are
        written to RUN_DIR/spike_step_N.json. First rank only."""
        loss = metrics.get("loss/plain")
        if loss is None or not self.is_spike(loss):
            return None
        samples = describe_samples(loader, step)
        documents = sorted({p["document"] for s in samples for p in s["pieces"]})
        with suppress(OSError):  # a full disk ends the run at its next save, on all ranks
            write_json(
                run_dir / f"spike_step_{step:08d}.json",
                {"step": step, "loss": loss, "sequences": samples},
            )
        return f"step {step}: loss spike to {loss:.3f}, documents [{few(documents)}]"
