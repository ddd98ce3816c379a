"""What SLURM's commands and a site's wrappers of them may answer, and what is made of it."""

import json
from pathlib import Path

import pytest

from lctw_megatron.config.schema import ClusterConfig
from lctw_megatron.errors import InputError
from lctw_megatron.launch import queue
from lctw_megatron.launch.launch_request import LaunchRequest, run_request
from lctw_megatron.launch.queue import NoAnswer, NoQueue
from lctw_megatron.launch.status import status
from tests.launch.conftest import RECIPE

CPU = ClusterConfig(nodes=2, gpus_per_node=0, tasks_per_node=2)


def answers(command: str, *lines: str) -> None:
    """The stub of ``command`` prints ``lines`` (of printf) and writes down its options."""
    text = "".join(f"printf '{line}\\n'\n" for line in lines)
    Path(f"stubs/{command}").write_text(f'#!/bin/bash\necho "$@" >> asked\n{text}')


@pytest.fixture
def submitted(plan, slurm):
    """A recipe whose first stage is job 7, and what `status` says of that."""
    made = plan()
    answers("sbatch", "7")
    queue.submit(made, made.select(["prepare"]), CPU)

    def state(cluster: ClusterConfig = CPU) -> str:
        jobs = queue.plan_jobs(made, made.select(["prepare"]), cluster)
        return queue.stage_states(made, jobs)[0].text

    return state


def test_colours_are_no_part_of_an_id_or_a_state(plan, slurm):
    made = plan()
    answers("sbatch", r"\e[1;32mgood luck\e[0m", r"\e[1m7\e[0m")
    queue.submit(made, made.select(["prepare"]), CPU)
    assert json.loads((made.folder / "jobs.json").read_text()) == {"prepare": "7"}
    answers("squeue", r"\e[32m7 RUNNING None\e[0m")
    jobs = queue.plan_jobs(made, made.select(["prepare"]), CPU)
    assert queue.stage_states(made, jobs)[0].text == "running, job 7"


@pytest.mark.parametrize(
    ("line", "state"),
    [
        ("7 PENDING launch failed requeued held", "pending, job 7 (launch failed requeued held)"),
        ("7 PENDING None", "pending, job 7"),
        ("7 RUNNING None", "running, job 7"),
        ("7 COMPLETING NodeDown", "completing, job 7"),
        ("7 REQUEUE_HOLD JobHeldUser", "requeue_hold, job 7"),
        # What a wrapper lists that says --states=all.
        ("7 OUT_OF_MEMORY OutOfMemory", "failed or cancelled, job 7"),
        ("7 CANCELLED by 0", "failed or cancelled, job 7"),
        ("7 NODE_FAIL", "failed or cancelled, job 7"),
    ],
)
def test_a_state_comes_with_what_a_job_waits_for_and_the_end_is_no_state(submitted, line, state):
    answers("squeue", line)
    assert submitted() == state


def test_bytes_that_are_no_text_are_passed_over(plan, slurm):
    made = plan()
    answers("sbatch", r"Gr\xfc\xdfe", "7")
    queue.submit(made, made.select(["prepare"]), CPU)
    answers("squeue", r"Gr\xfc\xdfe", "7 RUNNING None")
    jobs = queue.plan_jobs(made, made.select(["prepare"]), CPU)
    assert queue.stage_states(made, jobs)[0].text == "running, job 7"


@pytest.mark.parametrize(
    "said",
    [
        "slurm_load_jobs error: Unable to contact slurm controller (connect failure)",
        "squeue: error: Socket timed out on send/recv operation",
    ],
)
def test_an_error_whose_status_was_lost_is_no_empty_queue(submitted, said):
    """Else everything that runs would be submitted once more."""
    Path("stubs/squeue").write_text(f"#!/bin/bash\necho '{said}' >&2\n")
    with pytest.raises(NoAnswer, match=said.split(":")[-1].strip().replace("(", r"\(")[:20]):
        submitted()


@pytest.mark.parametrize("squeue", ["exit 1", None])
def test_what_the_folder_knows_is_said_without_a_queue(plan, slurm, monkeypatch, capsys, squeue):
    plan()
    Path("tools").mkdir()
    Path("tools/launch.py").touch()
    run_request(LaunchRequest("recipe.yaml", stages=("prepare", "train-base"), cluster="slurm"))
    capsys.readouterr()
    if squeue:
        Path("stubs/squeue").write_text(f"#!/bin/bash\n{squeue}\n")
    else:
        monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(NoQueue, match="squeue: "):
        status("out")
    said = capsys.readouterr().out.splitlines()
    assert said[1].split()[:4] == ["train-base", "submitted,", "job", "2"]
    assert said[2] == "  step 0/100 (0 %), no checkpoint, not started"


def test_jobs_of_other_clusters_are_asked_for_there(plan, slurm, submitted):
    answers("squeue", "CLUSTER: other", "7 RUNNING None", "67108871 RUNNING None")
    for line in ("--clusters=other", "-M other"):
        away = CPU.model_copy(update={"sbatch": ["--exclusive", line]})
        assert submitted(away) == "running, job 7"
        assert Path("asked").read_text().splitlines()[-1].endswith(" --clusters=other")
    assert submitted() == "running, job 7"
    assert Path("asked").read_text().splitlines()[-1].endswith("%r")
    made = plan()
    answers("sbatch", "67108871;home")  # a federation's
    listed = Path("stubs/squeue").read_text()
    answers("squeue")
    queue.submit(made, made.select(["prepare"]), CPU)
    Path("stubs/squeue").write_text(listed)
    assert submitted() == "running, job 67108871"
    assert Path("asked").read_text().splitlines()[-1].endswith(" --federation")


def test_a_job_that_submits_hands_nothing_of_its_own_on(plan, slurm, monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_MEM_PER_CPU", "SLURM_CPU_BIND", "SLURM_GPUS_PER_TASK"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("SLURM_CONF", "theirs")
    Path("stubs/sbatch").write_text("#!/bin/bash\nenv | grep ^SLURM_ > asked\necho 7\n")
    made = plan()
    queue.submit(made, made.select(["prepare"]), CPU)
    assert Path("asked").read_text() == "SLURM_CONF=theirs\n"


def test_a_job_in_the_queue_keeps_its_script_and_a_changed_recipe_is_said(plan, slurm, capsys):
    made = plan()
    stages = made.select(["prepare", "train-base"])
    queue.submit(made, stages, CPU)
    script = made.folder / "train-base.sbatch"
    before = script.read_text()
    Path(stages[0].output).mkdir(parents=True)
    made.set_done(stages[0])
    slurm.waiting("2 PENDING\n")
    capsys.readouterr()
    queue.submit(made, stages, CPU)
    assert "train-base: job 2 is in the queue\n" in capsys.readouterr().out
    for _ in range(2):  # not only the first time
        changed = plan(RECIPE, "training.steps=50")
        queue.submit(changed, changed.select(["prepare", "train-base"]), CPU)
        said = capsys.readouterr().out
        assert "train-base: job 2 is in the queue, submitted as " in said
        assert "have changed since: cancel it (scancel) and launch again" in said
        assert script.read_text() == before


@pytest.mark.parametrize(
    ("waiting", "said"),
    [
        ("2 RUNNING None\n5 PENDING Dependency\n", "train-base: job 2 is .* but prepare, which it"),
        ("2 COMPLETING None\n5 PENDING Dependency\n", "train-base: job 2 is just ending"),
        (
            "5 PENDING Dependency\n",
            "train-uniform: job 5 .* but prepare, train-base, which it .*scancel 5",
        ),
    ],
)
def test_a_job_in_the_queue_whose_needs_run_again_is_refused(plan, slurm, waiting, said):
    """It would train on the old data, and be taken for one that has trained on the new."""
    made = plan()
    queue.submit(made, made.stages, CPU)
    made.set_done(made.stages[0])  # and its output was removed
    slurm.waiting(waiting)
    Path("said").unlink()
    with pytest.raises(InputError, match=said):
        queue.submit(made, made.stages, CPU)
    assert not Path("said").exists() and made.mark(made.stages[0]).exists()
