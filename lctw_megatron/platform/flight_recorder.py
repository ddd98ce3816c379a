"""torch's flight recorder: the last collectives of every rank, to see which of them did not come.

The environment switches NCCL's on (configs/clusters/slurm_h100.yaml). Its files lie in
RUN_DIR/flight_recorder, one a rank; `torchfrtrace FOLDER`, which comes with torch, compares NCCL's.
Names of variables: torch 2.8 knows TORCH_NCCL_*; newer ones say TORCH_FR_* and read both.
"""

import os
from pathlib import Path

from lctw_megatron.atomic import atomic_file
from lctw_megatron.platform.run_environment import point

_BUFFER = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")
_FILES = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
"""Where torch writes: this and the rank's number."""


def record_into(run_dir: Path) -> None:
    """Let torch write what a collective that times out leaves into ``run_dir``, unless the
    environment names a place. On every rank, before the process groups are formed."""
    if _FILES[0] not in os.environ:
        point(_FILES[1], str(run_dir.absolute() / "flight_recorder" / "rank_"))


def make_place() -> None:
    """Make the folder of the files, as torch makes none, if the environment asks for them. Once
    nothing of the run can be refused any more."""
    if recorder_line():
        Path(_place()).parent.mkdir(parents=True, exist_ok=True)


def recorder_line() -> str | None:
    """For the log: where the files will lie; None if the environment does not ask for them."""
    if not any(os.environ.get(name, "0") != "0" for name in _BUFFER):
        return None
    return f"flight recorder: a collective that times out leaves {_place()}0 and so on"


def write_record(rank: int) -> str | None:
    """Write now what this rank has recorded; the line for the log, None if there is nothing."""
    from torch._C import _distributed_c10d as c10d

    nccl = getattr(c10d, "_dump_nccl_trace", None)
    dump = nccl or getattr(c10d, "_dump_fr_trace", None)  # gloo's, in newer versions
    if dump is None or not any(name in os.environ for name in _FILES):
        return None
    path = Path(f"{_place()}{rank}")
    with atomic_file(path) as file:
        file.write(dump())
    return f"flight recorder: {path}" + (f"; torchfrtrace {path.parent}" if nccl else "")


def _place() -> str:
    return next(os.environ[name] for name in _FILES if name in os.environ)
