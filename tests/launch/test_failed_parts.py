"""An array of which a part has failed while others run: what waits for it will never start."""

from pathlib import Path

import pytest

from lctw_megatron.config.schema import ClusterConfig
from lctw_megatron.errors import InputError
from lctw_megatron.launch import queue
from tests.launch.conftest import finish_part

CPU = ClusterConfig(nodes=2, gpus_per_node=0, tasks_per_node=2)
WAITING = "4 PENDING Dependency\n6 PENDING Dependency\n"


@pytest.fixture
def submitted(plan, slurm):
    """The chain of which prepare and base are done, part 0 too."""
    made = plan()
    queue.submit(made, made.stages, CPU)
    for stage in made.select(["prepare", "train-base"]):
        Path(stage.output).mkdir(parents=True, exist_ok=True)
        made.set_done(stage)
    finish_part(made, 0)
    return made


def test_launching_again_says_that_a_part_has_failed(submitted, slurm):
    slurm.waiting("3 RUNNING None\n3 RUNNING None\n" + WAITING)
    with pytest.raises(
        InputError, match=r"score-parts: 1 part of job 3 failed \(out/.*\) .* SLURM .* scancel 3 "
    ):
        queue.submit(submitted, submitted.stages, CPU)


def test_status_says_what_slurm_will_remove(submitted, slurm):
    slurm.waiting("3 RUNNING None\n" + WAITING)
    jobs = queue.plan_jobs(submitted, submitted.stages, CPU)
    texts = {state.name: state.text for state in queue.stage_states(submitted, jobs)}
    assert texts["score-parts"] == "running, job 3, 1 of 4 parts done, 2 failed"
    behind = "(SLURM will remove it, as parts of score-parts failed)"
    assert texts["score"] == f"pending, job 4 {behind}"
    assert texts["train-dense"] == f"pending, job 6 {behind}"
    assert texts["train-uniform"] == "failed or cancelled, job 5"  # which waits for no scores


def test_a_part_that_ends_well_has_not_failed(submitted, slurm):
    """Its mark is there before it leaves the queue."""
    slurm.waiting("3 COMPLETING None\n" + 3 * "3 RUNNING None\n" + WAITING)
    queue.submit(submitted, submitted.select(["prepare", "train-base", "score"]), CPU)
    jobs = queue.plan_jobs(submitted, submitted.select(["score"]), CPU)
    texts = [state.text for state in queue.stage_states(submitted, jobs)]
    assert texts == [
        "completing and running, job 3, 1 of 4 parts done",
        "pending, job 4 (Dependency)",
    ]
