"""How a process learns that it is one of several."""

import pytest

from lctw_megatron.errors import InputError
from lctw_megatron.platform.world import started_together


def test_tasks_of_a_plain_srun_do_not_take_themselves_for_the_only_rank(monkeypatch):
    for name in ("RANK", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    assert not started_together()
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert not started_together()
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.raises(InputError, match="srun started 4 tasks without RANK"):
        started_together()
    monkeypatch.setenv("RANK", "2")
    assert started_together()
