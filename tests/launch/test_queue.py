"""Submitting, asking and submitting again, with stubs in the place of sbatch and squeue."""

import json
import subprocess
from pathlib import Path

import pytest

from lctw_megatron.config.schema import ClusterConfig
from lctw_megatron.errors import InputError
from lctw_megatron.launch import local, queue
from lctw_megatron.launch import status as status_module
from lctw_megatron.launch.launch_request import LaunchRequest, read_request, run_request
from lctw_megatron.launch.status import status
from lctw_megatron.launch.submission import Submission
from lctw_megatron.ownership import owned
from tests.launch.conftest import RECIPE, finish_part

CPU = ClusterConfig(nodes=2, gpus_per_node=0, tasks_per_node=2)


def finish(plan, *names: str) -> None:
    for stage in plan.stages:
        if stage.name in names:
            Path(stage.output).mkdir(parents=True, exist_ok=True)
            plan.set_done(stage)


def test_the_chain_is_submitted_with_its_dependencies(plan, slurm):
    made = plan()
    queue.submit(made, made.stages, CPU)
    ids = json.loads((made.folder / "jobs.json").read_text())
    names = ["prepare", "train-base", "score-parts", "score", "train-uniform", "train-dense"]
    assert list(ids.values()) == [str(n) for n in range(1, 12)]
    assert list(ids)[:6] == names
    said = slurm.said()
    after = "--dependency=afterok:{} --kill-on-invalid-dep=yes"
    assert said["prepare"] == ""
    assert said["train-base"] == after.format("1")
    assert said["score-parts"] == after.format("1:2") + " --array=0,1,2,3"
    assert said["score"] == after.format("3")
    assert said["train-dense"] == after.format("1:4:2")
    assert (made.folder / "train-dense.sbatch").read_text().startswith("#!/bin/bash")


def test_submit_sh_by_hand_submits_what_dry_run_shows_and_launch_submitted(plan, slurm, capsys):
    made = plan(RECIPE.replace("output_dir: out", "output_dir: 'out $1 \"of\" mine'"))
    folder = Path('out $1 "of" mine/launch')
    assert run_request(LaunchRequest("recipe.yaml", cluster="slurm"), dry_run=True) == 0
    _, shown = capsys.readouterr().out.split(f"##### {folder}/submit.sh\n\n")
    queue.submit(made, made.stages, made.recipe.cluster)
    assert (folder / "submit.sh").read_text() == shown.removesuffix("\n")
    launched = Path("said").read_text()
    said = capsys.readouterr().out
    assert f"{folder}/train-dense.sbatch" in launched
    Path("said").unlink()
    elsewhere = Path("elsewhere")
    elsewhere.mkdir()
    answer = subprocess.run(
        ["bash", str(folder.absolute() / "submit.sh")], capture_output=True, text=True,
        cwd=elsewhere,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    assert Path("said").read_text() == launched
    assert [line.split()[0] + ":" for line in answer.stdout.splitlines()] == [
        line.split()[0] for line in said.splitlines()
    ]


def test_names_of_datasets_need_no_manners(tmp_path, monkeypatch, slurm):
    monkeypatch.chdir(tmp_path)
    names = ["score-my books", "score-it's", "score-a]b", 'score-$HOME "x"', "score-`id`"]
    made = Submission("recipe.yaml", tmp_path / "submit.sh", [])
    made.queued("score-old [1]", "99")
    for number, name in enumerate(names):
        after = ["score-old [1]", *names[:number]]
        made.submit(name, Path(f"{name}.sbatch"), after, [0, 2] if number else [])
    assert list(queue._run(_written(made))) == [(n, str(i)) for i, n in enumerate(names, 1)]
    last = Path("said").read_text().splitlines()[-1]
    assert last == (
        "--parsable --dependency=afterok:99:1:2:3:4 --kill-on-invalid-dep=yes --array=0,2 "
        "score-`id`.sbatch"
    )


def _written(made: Submission) -> Path:
    made.path.write_text(made.text)
    return made.path


def test_submitting_again_leaves_out_what_is_done_or_queued(plan, slurm, capsys):
    made = plan()
    queue.submit(made, made.stages, CPU)
    finish(made, "prepare", "train-base")
    for part in (0, 2):
        finish_part(made, part)
    slurm.waiting("5 RUNNING\n99 PENDING\n")
    Path("said").write_text("\n" * 20)
    capsys.readouterr()
    queue.submit(made, made.stages, CPU)
    output = capsys.readouterr().out
    assert "prepare: done before" in output
    assert "train-uniform: job 5 is in the queue" in output
    lines = Path("said").read_text().splitlines()[20:]
    submitted = [Path(line.split()[-1]).stem for line in lines]
    assert submitted == [
        "score-parts", "score", "train-dense", "export-uniform", "export-dense",
        "evaluate-uniform", "evaluate-dense", "report",
    ]  # fmt: skip
    assert "--array=1,3" in lines[0] and "--dependency" not in lines[0]
    assert "--dependency=afterok:22 " in lines[2]  # score; base is done
    assert "--dependency=afterok:5 " in lines[3]  # the one in the queue


def test_parts_whose_shards_were_removed_are_scored_again(plan, slurm):
    """As what refuses shards of other settings says to do."""
    made = plan()
    made.folder.mkdir(parents=True)
    finish(made, "prepare", "train-base")
    shards = [finish_part(made, part) for part in range(4)]
    queue.submit(made, made.select(["score"]), CPU)
    assert set(slurm.said()) == {"score"}
    for shard in shards[1:]:
        shard.unlink()
    queue.submit(made, made.select(["score"]), CPU)
    assert slurm.said()["score-parts"] == "--array=1,2,3"


def test_what_comes_after_a_stage_that_is_submitted_again_is_submitted_too(plan, slurm, capsys):
    made = plan()
    finish(made, *(s.name for s in made.stages))
    for part in range(4):
        finish_part(made, part)
    Path("out/base/checkpoints").rmdir()
    shown = queue.submission(made, queue.plan_jobs(made, made.stages, CPU)).text
    queue.submit(made, made.stages, CPU)
    assert shown == (made.folder / "submit.sh").read_text()
    assert "--array=0,1,2,3" in slurm.said()["score-parts"]
    assert len(slurm.said()) == 10 and "prepare: done before" in capsys.readouterr().out
    assert [s.name for s in made.stages if made.is_done(s)] == ["prepare"]


def test_launching_again_counts_the_failures_anew(plan, slurm):
    made = plan()
    queue.submit(made, made.stages, CPU)
    kept = made.folder / "train-uniform.failures"  # of a job that goes on
    gone = [made.folder / f"{name}.failures" for name in ("train-dense", "score.1-of-4")]
    for file in (kept, *gone):
        file.write_text("ended with status 137\n")
    finish(made, "prepare", "train-base")
    slurm.waiting("5 RUNNING\n")
    queue.submit(made, made.stages, CPU)
    assert kept.exists() and not any(file.exists() for file in gone)


def test_status_says_where_every_job_stands(plan, slurm):
    made = plan()
    jobs = queue.plan_jobs(made, made.stages, CPU)
    assert {state.text for state in queue.stage_states(made, jobs)} == {
        "not submitted", "not submitted, 0 of 4 parts done"
    }  # fmt: skip
    queue.submit(made, made.stages, CPU)
    finish(made, "prepare")
    finish_part(made, 1)
    slurm.waiting("3 PENDING\n3 RUNNING\n3 PENDING\n6 PENDING\n")
    states = {state.name: state for state in queue.stage_states(made, jobs)}
    assert states["prepare"].text == "done" and not states["prepare"].under_way
    assert states["train-base"].text == "failed or cancelled, job 2"
    assert not states["train-base"].under_way
    assert states["train-base"].logs == (Path("out/launch/train-base.log"),)
    assert states["score-parts"].text == "pending and running, job 3, 1 of 4 parts done"
    assert len(states["score-parts"].logs) == 4 and states["score-parts"].under_way
    assert states["train-dense"].text == "pending, job 6" and states["train-dense"].under_way


def test_an_order_is_kept_for_status_and_resume(plan, slurm, capsys):
    plan()
    Path("tools").mkdir()
    Path("tools/launch.py").touch()
    request = LaunchRequest(
        "recipe.yaml", ("training.steps=50",), ("prepare", "train-base"), "slurm"
    )
    assert run_request(request, dry_run=True) == 0
    assert "##### out/launch/train-base.sbatch" in capsys.readouterr().out
    assert not Path("out").exists()
    assert run_request(request) == 0
    assert read_request("out") == request
    assert status("out") == 0
    assert "failed or cancelled, job 2" in capsys.readouterr().out
    assert run_request(read_request("out")) == 0
    assert "--set training.steps=50" not in slurm.said()["train-base"]  # it is in the script
    assert "training.steps=50" in Path("out/launch/train-base.sbatch").read_text()
    with pytest.raises(InputError, match="nothing was launched into elsewhere"):
        read_request("elsewhere")
    Path("tools/launch.py").unlink()
    with pytest.raises(InputError, match="start tools/launch.py in the project's folder"):
        run_request(request)


def test_ranks_of_here_are_refused_on_a_cluster(plan):
    plan()
    request = LaunchRequest("recipe.yaml", cluster="slurm", ranks=4)
    with pytest.raises(InputError, match="--ranks 4: .*--cluster slurm has its ranks from"):
        run_request(request, dry_run=True)


def test_a_banner_is_no_job_id_and_odd_lines_are_no_jobs(plan, slurm):
    made = plan()
    stub = Path("stubs/sbatch")
    stub.write_text("#!/bin/bash\necho Welcome to the cluster, since 1999\necho '7;main'\n")
    queue.submit(made, made.select(["prepare"]), CPU)
    assert json.loads((made.folder / "jobs.json").read_text()) == {"prepare": "7"}
    slurm.waiting("\nCLUSTER: main\nodd\n7   RUNNING\n")
    jobs = queue.plan_jobs(made, made.select(["prepare"]), CPU)
    assert queue.stage_states(made, jobs)[0].text == "running, job 7"
    # What a site's wrapper makes of it that takes no --parsable.
    for said in ("Submitted batch job 7", "  7", "Submitted batch job 7 on cluster main"):
        (made.folder / "jobs.json").unlink()
        stub.write_text(f"#!/bin/bash\necho '{said}'\necho 3 jobs before it\n")
        queue.submit(made, made.select(["prepare"]), CPU)
        assert json.loads((made.folder / "jobs.json").read_text()) == {"prepare": "7"}
    stub.write_text("#!/bin/bash\necho Welcome to the cluster\n")
    with pytest.raises(InputError, match="no line with a job's id"):
        queue.submit(made, made.select(["train-base"]), CPU)


def test_the_users_own_variables_rule_neither_squeue_nor_what_a_script_says(
    plan, slurm, monkeypatch
):
    for name in ("SQUEUE_FORMAT", "SQUEUE_STATES", "SBATCH_TIMELIMIT", "SBATCH_WAIT"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("SBATCH_NO_REQUEUE", "1")
    monkeypatch.setenv("SBATCH_QOS", "theirs")
    monkeypatch.setenv("SBATCH_PARTITION", "theirs")
    monkeypatch.setenv("SBATCH_ACCOUNT", "theirs")
    Path("stubs/sbatch").write_text("#!/bin/bash\nenv | grep ^SBATCH_ > said\necho 7\n")
    Path("stubs/squeue").write_text("#!/bin/bash\nenv | grep ^SQUEUE_ || echo 7 RUNNING\n")
    made = plan()
    cluster = CPU.model_copy(update={"partition": "ours", "sbatch": ["-A ours", "--mem=0"]})
    queue.submit(made, made.select(["prepare"]), cluster)
    assert Path("said").read_text() == "SBATCH_QOS=theirs\n"  # of it the script says nothing
    jobs = queue.plan_jobs(made, made.select(["prepare"]), cluster)
    assert queue.stage_states(made, jobs)[0].text == "running, job 7"


def test_what_slurm_refuses_is_passed_on(plan, slurm, monkeypatch):
    made = plan()
    monkeypatch.setenv("REFUSE", "1")
    with pytest.raises(InputError, match="sbatch .*: no such partition"):
        queue.submit(made, made.stages, CPU)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(InputError, match="sbatch: not found; submit on a machine of the cluster"):
        queue.submit(made, made.stages, CPU)


def test_stages_that_need_others_not_on_their_way_are_refused(plan, slurm):
    made = plan()
    with pytest.raises(InputError, match="train-base needs prepare, which is not done"):
        queue.submit(made, made.select(["train-base"]), CPU)
    queue.submit(made, made.select(["prepare"]), CPU)
    slurm.waiting("1 RUNNING\n")
    queue.submit(made, made.select(["train-base"]), CPU)
    assert slurm.said()["train-base"].startswith("--dependency=afterok:1 ")


@pytest.mark.parametrize(
    "change",
    [
        {"ranks": "x"},
        {"stages": [7]},
        {"stages": 5},
        {"overrides": None},
        {"recipe": 3},
        {"recipe": None},
        {"of_another_version": 1},
    ],
)
def test_a_damaged_order_is_one_line(tmp_path, change):
    order = {"recipe": "r.yaml", "overrides": [], "stages": [], "cluster": None, "ranks": None}
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "order.json").write_text(json.dumps(order | change))
    with pytest.raises(InputError, match=r"order.json: damaged \(.*\); launch") as error:
        read_request(tmp_path)
    assert "\n" not in str(error.value)


def test_launchers_side_by_side_keep_each_others_stages(plan, monkeypatch, capsys):
    plan()
    monkeypatch.setattr(local, "run_stages", lambda *arguments: 0)
    for stages in (("train-base",), ("prepare", "train-base"), ("score",)):
        run_request(LaunchRequest("recipe.yaml", stages=stages))
    assert read_request("out").stages == ("train-base", "prepare", "score")
    assert capsys.readouterr().out == ""
    run_request(LaunchRequest("recipe.yaml"))  # all of them
    run_request(LaunchRequest("recipe.yaml", stages=("report",)))
    assert read_request("out").stages == ()
    run_request(LaunchRequest("recipe.yaml", ("training.steps=50",), ("report",)))
    assert "order.json: was of another overrides; status and resume" in capsys.readouterr().out
    assert read_request("out").stages == ("report",)


def test_two_submissions_do_not_lose_each_others_ids(plan, slurm):
    made = plan()
    made.folder.mkdir(parents=True)
    with (
        owned(made.folder / ".jobs.json.lock", "jobs.json"),
        pytest.raises(InputError, match="jobs.json: is being written by process"),
    ):
        queue.submit(made, made.stages, CPU)
    assert not Path("said").exists()


@pytest.mark.parametrize("answer", ["sleep 9", "echo slurm_load_jobs error >&2; exit 1"])
def test_watch_asks_a_silent_queue_again(plan, slurm, monkeypatch, capsys, answer):
    made = plan()
    Path("tools").mkdir()
    Path("tools/launch.py").touch()
    run_request(LaunchRequest("recipe.yaml", stages=("prepare",), cluster="slurm"))
    squeue, mended = Path("stubs/squeue"), Path("stubs/squeue").read_text()
    squeue.write_text(f"#!/bin/bash\n{answer}\n")

    def ask(*options):
        return subprocess.run(["squeue"], capture_output=True, text=True, timeout=0.5)

    monkeypatch.setattr(queue, "ask_squeue", ask)

    def sleep(seconds):
        squeue.write_text(mended)
        finish(made, "prepare")

    monkeypatch.setattr(status_module.time, "sleep", sleep)
    assert status_module.watch("out") == 0
    said = capsys.readouterr().out
    assert "squeue: " in said and "prepare                  done" in said
