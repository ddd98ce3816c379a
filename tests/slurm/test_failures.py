"""Nodes and ranks that die in mid-training: the job goes on, and to the same bits."""

import os
import re
import signal
import time
from pathlib import Path

import pytest

from tests.slurm.recipes import PROJECT, Launched, call, cluster_file, launch, without_prepare
from tests.slurm.small_slurm import NODES, SmallSlurm

pytestmark = pytest.mark.long
BOUND = 120.0
"""Seconds until a job with a dead rank or node waits in the queue again; a collective that hangs
would take training.distributed_timeout_minutes, which are 30."""


def start(slurm: SmallSlurm, chain: Launched, folder: Path) -> tuple[Launched, str]:
    """The chain's base run once more, in mid-training, after a checkpoint."""
    recipe = without_prepare(chain)
    again = launch(folder, "--stages", "train-base", recipe=recipe, slurm=slurm)
    (job,) = slurm.jobs()
    again.wait_for_steps("base", 12)
    return again, job


def wait_until_requeued(slurm: SmallSlurm, job: str) -> None:
    deadline = time.monotonic() + BOUND
    while slurm.jobs().get(job) != "PENDING":
        assert time.monotonic() < deadline, slurm.run("squeue", "--long")
        time.sleep(0.2)


def assert_as_undisturbed(again: Launched, chain: Launched) -> None:
    log = again.log("train-base")
    assert again.done() == {"train-base"}, log
    starts = [int(step) for step in re.findall(r"base: steps (\d+)\.\.100, 4 ranks", log)]
    assert starts[0] == 0 and starts[-1] >= 10, log
    assert again.losses("base") == chain.losses("base")


@pytest.mark.parametrize("rank", [0, 3])
def test_a_killed_rank_ends_the_job_which_goes_on(
    slurm: SmallSlurm,
    chain: Launched,
    tmp_path: Path,
    rank: int,
) -> None:
    again, job = start(slurm, chain, tmp_path)
    os.kill(slurm.ranks()[rank], signal.SIGKILL)
    wait_until_requeued(slurm, job)
    slurm.wait_until_empty(200)
    assert_as_undisturbed(again, chain)


@pytest.mark.parametrize("node", NODES)
def test_a_node_without_power_ends_the_job_which_goes_on(
    slurm: SmallSlurm,
    chain: Launched,
    tmp_path: Path,
    node: str,
) -> None:
    again, job = start(slurm, chain, tmp_path)
    slurm.kill_node(node)
    wait_until_requeued(slurm, job)
    slurm.start_node(node)
    slurm.wait_until_empty(300)
    assert_as_undisturbed(again, chain)


def test_a_killed_slurmd_whose_ranks_live_on_ends_the_job_which_goes_on(
    slurm: SmallSlurm,
    chain: Launched,
    tmp_path: Path,
) -> None:
    again, job = start(slurm, chain, tmp_path)
    # Held, so that they do not finish before SLURM has missed the node.
    slurm.hold(job)
    slurm.kill_node(NODES[1], daemon_only=True)
    wait_until_requeued(slurm, job)
    slurm.start_node(NODES[1])
    slurm.wait_until_empty(300)
    assert_as_undisturbed(again, chain)


@pytest.mark.timeout(1300)
def test_the_quickstart_with_fewer_steps(slurm: SmallSlurm, tmp_path: Path) -> None:
    cluster = cluster_file(tmp_path)
    output = tmp_path / "quickstart"
    settings = {
        "output_dir": output,
        "prepare.output_prefix": output / "data/stdlib",
        "prepare.max_bytes": 600_000,
        "data.train": output / "data/stdlib",
        "data.validation": output / "data/stdlib-validation",
        "evaluation.data": output / "data/stdlib-validation",
        "evaluation.max_sequences": 4,
        "scoring.shards": 2,
        "runs.base.training.steps": 30,
        "training.steps": 4,
    }
    overrides = [part for k, v in settings.items() for part in ("--set", f"{k}={v}")]
    recipe = PROJECT / "recipes/quickstart/recipe.yaml"
    call("launch.py", recipe, "--cluster", cluster, *overrides, slurm=slurm)
    slurm.wait_until_empty(900)
    launched = Launched(tmp_path, "", output)
    said = call("launch.py", "status", output, slurm=slurm).splitlines()
    assert said and all(" done" in line for line in said), launched.logs()
    assert (output / "report").is_dir()
