"""What a batch script does with the statuses of its ranks: requeue, for how long, or end."""

from pathlib import Path

import pytest

from tests.launch.conftest import IN_JOB, jobs


def test_a_training_that_was_asked_to_leave_is_requeued_for_ever(plan, run_script):
    made = plan()
    (job,) = jobs(made, made.recipe.cluster, "train-dense")
    for _ in range(8):
        status, said = run_script(job.script, STATUS="75", **IN_JOB)
        assert (status, said[-1]) == (0, "requeue 41")
    assert not made.mark(job.stage).exists()


def test_a_training_that_fails_is_requeued_five_times(plan, run_script):
    made = plan()
    (job,) = jobs(made, made.recipe.cluster, "train-dense")
    for _ in range(5):
        assert run_script(job.script, STATUS="137", **IN_JOB)[1][-1] == "requeue 41"
    status, said = run_script(job.script, STATUS="137", **IN_JOB)
    assert status == 137 and "requeue 41" not in said
    assert len((made.folder / "train-dense.failures").read_text().splitlines()) == 6
    run_script(job.script, STATUS="75", **IN_JOB)  # it got on: the count begins anew
    assert run_script(job.script, STATUS="137", **IN_JOB)[1][-1] == "requeue 41"


def test_what_broke_one_rank_counts_although_the_others_left_when_asked(plan, run_script):
    """srun asks them to, and returns the largest status of all."""
    made = plan()
    (job,) = jobs(made, made.recipe.cluster, "train-dense")
    failures = made.folder / "train-dense.failures"
    for broken in ({"STATUS_0": "75", "STATUS_1": "1"}, {"STATUS_0": "1", "STATUS_1": "75"}):
        for _ in range(5):
            assert run_script(job.script, **broken, **IN_JOB)[1][-1] == "requeue 41"
        assert run_script(job.script, **broken, **IN_JOB)[0] == 1
        assert "ended with status 1\n" in failures.read_text()
        failures.unlink()
    status, said = run_script(job.script, STATUS_0="75", STATUS_1="2", **IN_JOB)
    assert status == 2 and "requeue 41" not in said
    assert not failures.exists()  # a mistake takes no retry from those that follow


def test_a_rank_that_is_asked_to_leave_is_waited_for(plan, run_script):
    """The shell around it gets the signal too."""
    made = plan()
    (job,) = jobs(made, made.recipe.cluster, "train-dense")
    Path("stubs/python").write_text(
        "#!/bin/bash\nkill -TERM $PPID; sleep 0.3; echo saved >> saved; exit 75\n"
    )
    assert run_script(job.script, **IN_JOB) == (0, ["requeue 41"])
    assert Path("saved").read_text() == "saved\n" * 2


def test_a_controller_that_is_away_for_a_moment_ends_no_chain(plan, run_script):
    made = plan()
    (job,) = jobs(made, made.recipe.cluster, "train-dense")
    stub, asked = Path("stubs/scontrol"), Path("asked")
    Path("stubs/sleep").write_text("#!/bin/bash\n")
    Path("stubs/sleep").chmod(0o755)
    for failures, status in ((3, 0), (99, 1)):
        asked.unlink(missing_ok=True)
        stub.write_text(
            "#!/bin/bash\n[ $1 = show ] && { echo n1; exit; }\necho $* >> asked\n"
            f"[ $(wc -l < asked) -gt {failures} ]\n"
        )
        assert run_script(job.script, STATUS="75", **IN_JOB)[0] == status
        assert set(asked.read_text().splitlines()) == {"requeue 41"}
    assert len(asked.read_text().splitlines()) == 6


@pytest.mark.parametrize(
    ("state", "goes_on"),
    [
        ("JobState=RUNNING Reason=None", True),
        ("JobState=COMPLETING Reason=None PreemptTime=None", False),  # scancel
        ("JobState=COMPLETING Reason=TimeLimit", True),
        ("JobState=COMPLETING Reason=None PreemptTime=2026-11-28T00:17:21", True),
    ],
)
@pytest.mark.parametrize("name", ["train-dense", "score-parts"])
def test_a_job_that_was_cancelled_is_not_brought_back(plan, run_script, name, state, goes_on):
    made = plan()
    (job,) = jobs(made, made.recipe.cluster, name)
    Path("stubs/scontrol").write_text(
        f'#!/bin/bash\n[ $1 = show ] && {{ echo "{state}"; exit; }}\necho $* >> requeued\n'
    )
    array = {"SLURM_ARRAY_JOB_ID": "40", "SLURM_ARRAY_TASK_ID": "1"} if job.parts else {}
    status, _ = run_script(job.script, STATUS="75", SLURMD_NODENAME="n1", **IN_JOB, **array)
    assert (status, Path("requeued").exists()) == ((0, True) if goes_on else (1, False))


@pytest.mark.parametrize("mistake", [2, 126, 127])
def test_what_no_retry_can_mend_is_not_tried_again(plan, run_script, mistake):
    made = plan()
    (job,) = jobs(made, made.recipe.cluster, "train-dense")
    status, said = run_script(job.script, STATUS=str(mistake), **IN_JOB)
    assert status == mistake and "requeue 41" not in said
