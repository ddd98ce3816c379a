"""The batch scripts: as in golden/, and doing what they should under bash and a SLURM of stubs.

RENEW_GOLDEN=1 python -m pytest tests/launch/test_slurm.py writes golden/ anew; read the difference.
"""

import dataclasses
import os
import subprocess
from pathlib import Path

import pytest

from lctw_megatron.config.schema import ClusterConfig
from lctw_megatron.errors import InputError
from lctw_megatron.launch import slurm
from lctw_megatron.launch.run_status import last_error
from tests.launch.conftest import IN_JOB, RECIPE, finish_part, jobs

GOLDEN = Path(__file__).parent / "golden"

GPU_CLUSTER = ClusterConfig(
    partition="long",
    account="project-7",
    qos="high",
    constraint="h100",
    nodes=2,
    gpus_per_node=4,
    cpus_per_task=12,
    time_limit="12:00:00",
    signal_seconds=600,
    modules=["cuda/12.4"],
    environment={"NCCL_DEBUG": "WARN", "CACHE": "/scratch/my files"},
    setup=["source .venv/bin/activate"],
    container="apptainer exec --nv image.sif",
    srun=["--cpu-bind=cores"],
    sbatch=["--exclusive"],
)


def test_scripts_are_those_in_golden(plan, request):
    made = plan()
    folder = Path(request.path).parent / "golden"
    scripts = {f"cpu-{job.name}": job.script for job in jobs(made, made.recipe.cluster)}
    scripts |= {f"gpu-{job.name}": job.script for job in jobs(made, GPU_CLUSTER)}
    chosen = [
        "cpu-prepare", "cpu-score-parts", "cpu-score", "cpu-train-dense", "cpu-export-dense",
        "gpu-score-parts", "gpu-train-dense", "gpu-evaluate-dense",
    ]  # fmt: skip
    for name in chosen:
        path = folder / f"{name}.sbatch"
        if os.environ.get("RENEW_GOLDEN"):
            path.write_text(scripts[name])
        assert scripts[name] == path.read_text(), name
    assert {path.stem for path in folder.iterdir()} == set(chosen)


def test_every_script_is_good_bash_and_names_its_needs(plan):
    made = plan()
    for cluster in (made.recipe.cluster, GPU_CLUSTER):
        for job in jobs(made, cluster):
            check = subprocess.run(["bash", "-n"], input=job.script, text=True, capture_output=True)
            assert check.returncode == 0, check.stderr
    needs = {job.name: job.needs for job in jobs(made, GPU_CLUSTER)}
    assert needs["score-parts"] == ("prepare", "train-base")
    assert needs["score"] == ("score-parts",)
    assert needs["train-dense"] == ("prepare", "score", "train-base")


def test_stages_without_a_gpu_go_to_the_partition_for_them(plan):
    cluster = GPU_CLUSTER.model_copy(update={"cpu_partition": "cpus"})
    for job in jobs(plan(), cluster):
        with_gpu = "--gpus-per-node" in job.script
        assert ("--partition=long" in job.script) == with_gpu, job.name
        assert ("--partition=cpus" in job.script) != with_gpu, job.name
        assert ("--constraint=h100" in job.script) == with_gpu, job.name


def test_ranks_that_do_not_fit_the_cluster_are_refused(plan):
    with pytest.raises(InputError, match="train-uniform on 1 ranks"):
        jobs(plan(), ClusterConfig(nodes=1, gpus_per_node=1), "train-dense")
    made = plan(RECIPE.replace("shards: 4", "shards: 4, tensor: 2, pipeline: 2"))
    cluster = ClusterConfig(nodes=1, gpus_per_node=2)
    with pytest.raises(InputError, match="score needs 4 ranks, .* 1 nodes with 2 ranks"):
        jobs(made, cluster, "score")


IN_PART = IN_JOB | {"SLURM_ARRAY_JOB_ID": "40", "SLURM_ARRAY_TASK_ID": "2"}
TRAIN = "tools/train.py recipe.yaml --run dense"


def test_a_finished_training_leaves_its_mark(plan, run_script):
    made = plan()
    (job,) = jobs(made, made.recipe.cluster, "train-dense")
    assert run_script(job.script, **IN_JOB) == (
        0,
        [f"python {TRAIN} 0/2@n1", f"python {TRAIN} 1/2@n1"],
    )
    assert made.mark(job.stage).read_text().strip() == made.fingerprints["train-dense"]


def test_without_slurm_the_script_runs_on_this_node(plan, run_script):
    made = plan()
    (job,) = jobs(made, made.recipe.cluster, "train-dense")
    status, said = run_script(job.script)
    assert (status, said) == (0, [f"torchrun --standalone --nproc-per-node=2 -- {TRAIN} /@"])
    made.mark(job.stage).unlink()
    assert run_script(job.script, STATUS="75")[0] == 75
    assert not made.mark(job.stage).exists()


def test_without_a_checkout_the_scripts_start_modules(plan, run_script, monkeypatch):
    monkeypatch.setattr(slurm, "PROJECT", None)
    made = plan()
    train, prepare = jobs(made, made.recipe.cluster, "train-dense", "prepare")[::-1]
    line = "lctw_megatron.commands.train recipe.yaml --run dense"
    ranks = [f"python -m {line} {rank}/2@n1" for rank in range(2)]
    assert run_script(train.script, **IN_JOB) == (0, ranks)
    torchrun = f"torchrun --standalone --nproc-per-node=2 -m -- {line} /@"
    assert run_script(train.script) == (0, [torchrun])
    status, (said,) = run_script(prepare.script, **IN_JOB)
    assert status == 0 and said.startswith("python -m lctw_megatron.commands.preprocess --input ")
    assert "tools/" not in said


def test_each_node_has_as_many_ranks_of_a_model(plan):
    """3 on nodes of 2: one on each of 3 nodes, as 2 nodes would have 4."""
    made = plan(RECIPE.replace("shards: 4", "shards: 4, pipeline: 3"))
    parts, _ = jobs(made, ClusterConfig(nodes=4, gpus_per_node=2), "score-parts", "score")
    assert "#SBATCH --nodes=3\n" in parts.script
    assert "#SBATCH --ntasks-per-node=1\n" in parts.script
    with pytest.raises(InputError, match="score needs 3 ranks, as many on each node"):
        jobs(made, ClusterConfig(nodes=2, gpus_per_node=2), "score")


def test_the_sites_lines_may_read_unset_variables_and_the_environment_names_others(
    plan, run_script
):
    made = plan()
    cluster = ClusterConfig(
        nodes=2,
        gpus_per_node=0,
        environment={
            "HF_HOME": '${SCRATCH}/my "hf" `x` $(x)',
            "PLAIN": "a $ b",
            "HOMES": "~/a b:/c~/d:~",
        },
        setup=["export MY_BACKUP=$NOT_SET_ANYWHERE", 'echo "$HF_HOME|$PLAIN|$HOMES" > seen'],
    )
    (job,) = jobs(made, cluster, "train-base")
    assert run_script(job.script, SCRATCH="/fast disk", HOME="/my home", **IN_JOB)[0] == 0
    homes = "/my home/a b:/c~/d:/my home"
    assert Path("seen").read_text() == f'/fast disk/my "hf" `x` $(x)|a $ b|{homes}\n'
    assert "srun --kill-on-bad-exit=1 --export=ALL " in job.script


def test_a_line_of_the_sites_that_fails_is_named(plan, run_script):
    """As the end of a .bashrc that only asks whether something is there."""
    Path("site.sh").write_text("echo loaded\n[ -f /nowhere ]\n")
    setup = ["exec 2> log", "[ -d / ]", "source site.sh"]
    made = plan()
    (job,) = jobs(made, ClusterConfig(nodes=2, gpus_per_node=0, setup=setup), "prepare")
    assert run_script(job.script, **IN_JOB) == (1, [])
    line = "error: the lines before the command ended with status 1 at: [ -f /nowhere ]"
    assert Path("log").read_text() == f"{line}\n"
    assert last_error([Path("log")]) == line


def test_the_options_of_the_shell_that_submitted_are_not_the_scripts(plan, run_script):
    made = plan()
    cluster = ClusterConfig(nodes=2, gpus_per_node=0, setup=["A=$NOT_SET", "false | [ -d p* ]"])
    (job,) = jobs(made, cluster, "prepare")
    made.folder.mkdir(parents=True)
    made.mark(job.stage).write_text("of another recipe")
    Path("present").mkdir()
    options = "nounset:noclobber:noglob:pipefail:posix"
    assert run_script(job.script, SHELLOPTS=options, **IN_JOB)[0] == 0
    assert made.mark(job.stage).read_text().strip() == made.fingerprints["prepare"]


def test_modules_load_where_the_shell_that_submitted_exports_no_function(plan, run_script):
    """A csh, zsh or dash: what a bash would have exported is in the site's own files."""
    init = Path("modules/init/bash")
    init.parent.mkdir(parents=True)
    init.write_text("module() { echo $2 >> loaded; }\n[ -f /nowhere ]\n")
    cluster = ClusterConfig(nodes=2, gpus_per_node=0, modules=["cuda/12.4"])
    (job,) = jobs(plan(), cluster, "prepare")
    assert run_script(job.script, MODULESHOME=str(init.parents[1]), **IN_JOB)[0] == 0
    assert Path("loaded").read_text() == "cuda/12.4\n"
    function = {"BASH_FUNC_module%%": "() { echo its own >> loaded; }"}
    assert run_script(job.script, MODULESHOME="modules", **function, **IN_JOB)[0] == 0
    assert Path("loaded").read_text().splitlines()[1:] == ["its own"]


def test_ranks_meet_where_the_script_runs_whatever_scontrol_says_first(plan, run_script):
    Path("stubs/scontrol").write_text("#!/bin/bash\necho Welcome; echo n1\n")
    made = plan()
    (job,) = jobs(made, made.recipe.cluster, "train-dense")
    assert run_script(job.script, SLURMD_NODENAME="n1", **IN_JOB) == (
        0,
        [f"python {TRAIN} 0/2@n1", f"python {TRAIN} 1/2@n1"],
    )


def test_parts_are_array_tasks_or_one_after_the_other(plan, run_script):
    made = plan()
    parts, merge = jobs(made, made.recipe.cluster, "score-parts", "score")
    assert "--signal" not in parts.script and "--gpus" not in merge.script
    status, said = run_script(parts.script, STATUS="137", **IN_PART)
    assert status == 0 and said[-1] == "requeue 40_2"  # alone, not the whole array
    status, said = run_script(parts.script, **IN_PART)
    assert status == 0 and all("--shard 2/4" in line for line in said)
    assert [made.mark(parts.stage, part).exists() for part in range(4)] == [
        False,
        False,
        True,
        False,
    ]
    status, said = run_script(parts.script)
    assert [line.split("--shard ")[1].split()[0] for line in said] == ["0/4", "1/4", "2/4", "3/4"]
    assert run_script(parts.script, STATUS="1")[0] == 1
    status, said = run_script(merge.script, **IN_JOB)
    assert status == 0 and len(said) == 1 and said[0].endswith("--merge /@")
    # Once merged the parts' marks are gone: without its output the stage is to be done as a whole.
    assert made.mark(merge.stage).exists() and not made.is_done(merge.stage)
    assert not any(made.mark(parts.stage, part).exists() for part in range(4))


def test_other_numbers_of_parts_are_other_parts(plan):
    made = plan()
    (stage,) = made.select(["score"])
    made.folder.mkdir(parents=True)
    finish_part(made, 0)
    assert made.is_done(stage, 0)
    assert not made.is_done(dataclasses.replace(stage, shards=8), 0)


def test_spaces_in_a_folders_name_reach_sbatch_quoted(plan):
    made = plan(RECIPE.replace("output_dir: out", "output_dir: my runs"))
    (job,) = jobs(made, made.recipe.cluster, "prepare")
    assert "\n#SBATCH --output='my runs/launch/prepare.log'\n" in job.script


def test_slurms_patterns_in_a_folders_name_are_no_patterns(plan):
    made = plan(RECIPE.replace("output_dir: out", "output_dir: 100%j"))
    (parts,) = jobs(made, made.recipe.cluster, "score-parts")
    assert "\n#SBATCH --output=100%%j/launch/score-parts-%a.log\n" in parts.script
    assert "\nmkdir -p 100%j/launch\n" in parts.script
    with pytest.raises(InputError, match=r"a\\b/launch/prepare has a backslash"):
        jobs(plan(RECIPE.replace("output_dir: out", "output_dir: a\\b")), GPU_CLUSTER)


def test_a_plain_stage_that_fails_leaves_no_mark(plan, run_script):
    made = plan()
    (job,) = jobs(made, made.recipe.cluster, "prepare")
    assert run_script(job.script, STATUS="3", **IN_JOB)[0] == 3
    assert not made.mark(job.stage).exists()
    assert run_script(job.script, **IN_JOB)[0] == 0
    assert made.mark(job.stage).exists()
