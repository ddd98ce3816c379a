"""Where a training run stands, as its folder and its log tell whoever may read them.

Nothing is asked of the run itself and nothing of it is locked: heartbeat.json says what it is at,
metrics.jsonl how fast it is, `checkpoints` what is saved and .lock who runs it.
"""

import os
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from lctw_megatron.config.schema import RunConfig
from lctw_megatron.data.metrics_file import last_metrics
from lctw_megatron.model.checkpoint_folder import complete_checkpoints, step_of
from lctw_megatron.ownership import holder
from lctw_megatron.progress import clock, human
from lctw_megatron.training.heartbeat import INTERVAL_SECONDS, Beat, read_beat

_SPEED_LINES = 20
"""Last logged steps that speak for the speed."""
_SILENT_STEPS = 10
"""Steps without a beat after which a run that trains counts as stale."""
_SILENT_MINUTES = 30.0
"""The same while it starts, evaluates or saves, if it has no training.hang_minutes."""
_CLOCKS_APART = 60.0
"""Seconds by which the clocks of two machines may differ without a word."""
_LOG_BYTES = 1 << 18


@dataclass(frozen=True)
class RunStatus:
    text: str
    alive: bool
    """Whether its process was not seen to have ended; it may be stale."""
    finished: bool


def run_status(run: RunConfig) -> RunStatus:
    folder, steps = Path(run.run_dir), run.training.steps
    beat, owner = read_beat(folder), holder(folder / ".lock")
    lines = last_metrics(folder / "metrics.jsonl")
    saved = _newest_checkpoint(folder / "checkpoints")
    done, logged = saved or 0, lines[-1]["step"] + 1 if lines else 0
    if beat and beat.stage != "starting":
        done = max(beat.step, logged)
    elif not beat and not owner:  # a copy that was kept of a run
        done = max(done, logged)
    alive = owner is not None and not owner[1]
    finished = not alive and saved is not None and saved >= steps
    parts = [f"step {done}/{steps} ({100 * done / steps:.0f} %)"]
    seconds = [line["speed/seconds"] for line in lines if 0 < line.get("speed/seconds", 0) < 1e9]
    seconds = seconds[-_SPEED_LINES:]
    if seconds and alive:
        tokens = run.training.global_batch_size * run.data.sequence_length
        parts.append(f"{human(tokens / max(mean(seconds), 1e-9))} tokens/s")
        each = (beat and beat.seconds_per_step) or mean(seconds)
        parts.append(f"{clock(max(steps - done, 0) * each)} left")
    parts.append("no checkpoint" if saved is None else f"checkpoint of step {saved}")
    if alive and owner:
        allowed = 60 * (run.training.hang_minutes or _SILENT_MINUTES)
        if beat and beat.stage == "training" and seconds:
            allowed = max(6 * INTERVAL_SECONDS, _SILENT_STEPS * mean(seconds))
        parts.append(_sign_of_life(beat, owner[0], allowed))
    elif owner:
        parts.append(f"died without a word: {owner[0]}; start again to go on")
    else:
        parts.append("finished" if finished else "not running" if done or beat else "not started")
    return RunStatus(", ".join(parts), alive, finished)


def _sign_of_life(beat: Beat | None, owner: str, allowed: float) -> str:
    if beat is None:
        return f"starting ({owner})"
    age = time.time() - beat.time
    if age > allowed:
        return f"stale: no sign of life for {clock(age)} while {beat.stage} ({owner})"
    if age < -_CLOCKS_APART:
        return f"{beat.stage}, alive, by a clock {clock(-age)} ahead of this machine's ({owner})"
    return f"{beat.stage}, alive {max(age, 0.0):.0f} s ago ({owner})"


def _newest_checkpoint(folder: Path) -> int | None:
    found = complete_checkpoints(folder)
    return step_of(found[-1]) if found else None


_START = re.compile(r"lctw-megatron \S+, megatron-core ")
"""What every start of a training prints (platform.capabilities)."""
_CAUSE = re.compile(
    r"(\[rank\d+\]: ?)?(error: |[A-Za-z_][\w.]*(Error|Exception|Interrupt)\b(: |$))"
)
_CONSEQUENCE = re.compile(r"(srun|slurmstepd|sbatch): error: |.* ended with status \d+$")


def last_error(logs: Iterable[Path]) -> str | None:
    """The last line of the newest of ``logs`` that names an error: a cause if there is one, else
    what SLURM or the batch script say of it. With a word if the job was started again since."""
    there = [path for path in logs if path.is_file()]
    if not there:
        return None
    with open(max(there, key=lambda path: path.stat().st_mtime), "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _LOG_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
    start = max((n for n, line in enumerate(lines) if _START.match(line)), default=-1)
    for since, said in ((start + 1, ""), (0, " (before the last start)")):
        for kind in (_CAUSE, _CONSEQUENCE):
            found = [line.strip() for line in lines[since:] if kind.match(line)]
            if found:
                return f"{found[-1][:300]}{said}"
    return None
