"""A rank that is slow is named, one that hangs ends the job, and the log says where all stood."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch._C import _distributed_c10d

from lctw_megatron.config.schema import RunConfig
from lctw_megatron.training.exit_status import REQUEUE_STATUS
from lctw_megatron.training.hang_watch import STATUS
from tests.distributed import run_distributed
from tests.training.layouts import make_data, make_run


def stand_still() -> None:
    time.sleep(300)


def train(run: RunConfig) -> int:
    """Rank 1 waits long for its data, and hangs in its third step."""
    from lctw_megatron.data.loader import TokenLoader
    from lctw_megatron.training import hang_watch, loop
    from lctw_megatron.training.step import Stepper

    hang_watch._GRACE_SECONDS = 15.0
    real = Stepper.gradients

    def gradients(self: Stepper, step: int, batches: Any) -> Any:
        if step == 2 and dist.get_rank() == 1:
            stand_still()
        return real(self, step, batches)

    read = TokenLoader.step

    def slow(self: TokenLoader, step: int) -> Any:
        time.sleep(0.5 * dist.get_rank())
        return read(self, step)

    Stepper.gradients = gradients  # type: ignore[method-assign]
    TokenLoader.step = slow  # type: ignore[method-assign]
    return loop.train(run)


# Both ranks share each sequence: they wait for each other in every layer.
def test_a_rank_that_hangs_in_a_step_is_named_and_ends_the_job_with_all_stacks(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    # More than a step takes where other tests run beside this one.
    settings = {"steps": 4, "hang_minutes": 30 / 60}
    run = make_run(
        make_data(tmp_path), str(run_dir), {"context": 2}, "chunk", "dense", "frozen",
        training=settings,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match=f"died with exit code {STATUS}"):
        run_distributed(train, 2, run)
    log = capfd.readouterr().err
    for rank, place in enumerate(("_schedule", "stand_still")):
        mine = [line for line in log.splitlines() if line.startswith(f"[rank {rank}] ")]
        assert mine[0].endswith(" no progress for 30 s since the begin of training, 2 steps done:")
        assert any(f" in {place}" in line for line in mine), log
        assert any(re.search(r"loop\.py.* in run_to_end", line) for line in mine), log
        # What torch recorded of the collectives lies in the run folder, and the log says so.
        record = run_dir / "flight_recorder" / f"rank_{rank}"
        if hasattr(_distributed_c10d, "_dump_fr_trace"):  # older torch records NCCL's only
            assert any(str(record) in line for line in mine) and record.stat().st_size

    # And the metrics of the steps before have named it.
    steps = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["speed/slowest_data_rank"] for line in steps] == [1, 1]
    assert all(line["speed/slowest_data_seconds"] > 0.5 for line in steps)


# A mistake of the user's (2) would not be tried again, and a run that left (75) has saved.
def test_its_status_is_one_that_batch_scripts_try_again() -> None:
    assert STATUS not in (0, 2, 126, 127, REQUEUE_STATUS)


PROGRAM = """
import ctypes, time
from lctw_megatron.training import hang_watch
hang_watch._LAST_RESORT_SECONDS = hang_watch._GRACE_SECONDS = 0.3
watch = hang_watch.HangWatch({minutes}, 5, dump=lambda: 1 / 0)
watch.progress("step 1")
{then}
"""


@pytest.mark.parametrize(
    ("minutes", "then", "status", "said"),
    [
        (0.01, "time.sleep(60)", STATUS, "[rank 5] hangs: no progress for 0.6 s since the begin"),
        # C code that keeps the interpreter's lock: our thread never runs.
        (0.01, "ctypes.PyDLL(None).sleep(60)", STATUS, "most recent call first"),
        (0.01, "for _ in range(30): time.sleep(0.05); watch.progress('step')", 0, ""),
        (0.01, "watch.close(); time.sleep(1.5)", 0, ""),
        (0.0, "time.sleep(1.5)", 0, ""),
        (None, "time.sleep(1.5)", 0, ""),
    ],
)
def test_only_what_does_not_move_is_ended(
    minutes: float | None, then: str, status: int, said: str
) -> None:
    program = PROGRAM.format(minutes=minutes, then=then)
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == status, result.stderr
    assert said in result.stderr if said else result.stderr == ""
