"""RUN_DIR/heartbeat.json: what a run is at and when it last said so, for who looks on from outside.

It holds only what nothing else in the run folder does: speeds and losses are in metrics.jsonl, what
is saved in `checkpoints`, and who runs in .lock. Without torch: tools/launch.py reads it.
"""

import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from lctw_megatron.atomic import write_json
from lctw_megatron.data.json_object import read_json_object
from lctw_megatron.errors import InputError

INTERVAL_SECONDS = 10.0
"""Between two beats of one stage."""


@dataclass(frozen=True)
class Beat:
    stage: str
    """What the run is at: starting, training, evaluating or saving."""
    step: int
    """Steps done."""
    time: float
    """Seconds since 1970."""
    seconds_per_step: float | None = None
    """Of this start of the run, with its evaluations and saves; None before its second step."""


class Heartbeat:
    """Writes the file: when the stage changes, else every INTERVAL_SECONDS. First rank only."""

    def __init__(self, run_dir: Path) -> None:
        self._path = path_in(run_dir)
        with suppress(OSError):
            self._path.unlink(missing_ok=True)  # of the start before
        self._stage = ""
        self._next = 0.0
        """When the next beat of this stage is due. As all that is measured here by a clock that
        nobody sets: one that jumps would keep beats back, or give steps a negative time."""
        self._first: tuple[int, float] | None = None
        """The first step of this start, and when it began."""

    def beat(self, stage: str, step: int) -> None:
        now = time.monotonic()
        if stage == self._stage and now < self._next:
            return
        self._stage, self._next = stage, now + INTERVAL_SECONDS
        if self._first is None and stage == "training":
            self._first = step, now
        each = None
        if self._first and step > self._first[0]:
            each = (now - self._first[1]) / (step - self._first[0])
        with suppress(OSError):  # a full disk ends the run at its next save, on all ranks
            write_json(self._path, asdict(Beat(stage, step, time.time(), each)))


def path_in(run_dir: Path) -> Path:
    return run_dir / "heartbeat.json"


def read_beat(run_dir: Path) -> Beat | None:
    """The last one; None if there is none that can be read."""
    try:
        values = read_json_object(path_in(run_dir))
        each = values.get("seconds_per_step")
        beat = Beat(
            str(values["stage"]),
            int(values["step"]),
            float(values["time"]),
            None if each is None else float(each),
        )
    except (OSError, InputError, KeyError, TypeError, ValueError, OverflowError):
        return None
    numbers = (beat.step, beat.time, beat.seconds_per_step or 0)
    return beat if all(0 <= number < 1e12 for number in numbers) else None
