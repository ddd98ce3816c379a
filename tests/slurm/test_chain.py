"""A recipe's stages as a chain of jobs on a real SLURM of two nodes with two ranks each."""

from pathlib import Path

import pytest

from tests.slurm.recipes import STAGES, Launched, call, launch, without_prepare
from tests.slurm.small_slurm import SmallSlurm


def test_the_chain_finishes_on_two_nodes_with_two_ranks_each(
    slurm: SmallSlurm, chain: Launched
) -> None:
    lines = chain.out.splitlines()
    assert "train-base: submitted as job 2 after 1" in lines
    assert "score: submitted as job 4 after 3" in lines
    for run in ("base", "dense"):
        assert ", 4 ranks, " in chain.log(f"train-{run}")
    script = (chain.output / "launch" / "train-dense.sbatch").read_text()
    assert "#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=2\n" in script
    assert (chain.output / "report").is_dir() and (chain.output / "dense/hf").is_dir()
    # Nothing is left to do, and `status` and `resume` say so.
    said = call("launch.py", "status", chain.output, slurm=slurm).splitlines()
    assert len(said) == len(STAGES) and all(" done" in line for line in said), said
    said = call("launch.py", "resume", chain.output, slurm=slurm).splitlines()
    assert len(said) == len(STAGES) and all(line.endswith("done before") for line in said), said
    assert not slurm.jobs()


def test_its_losses_are_those_of_one_process_here(chain: Launched, tmp_path: Path) -> None:
    here = launch(tmp_path, "--stages", "prepare", "train", "score", "--ranks", "1")
    for run, steps in {"base": 100, "dense": 6}.items():
        ours, theirs = chain.losses(run), here.losses(run)
        assert [line["step"] for line in ours] == list(range(steps))
        for found, expected in zip(ours, theirs, strict=True):
            for name in ("loss/plain", "loss/weighted"):
                assert found[name] == pytest.approx(expected[name], rel=1e-5), (run, name, found)


def test_a_job_at_its_time_limit_saves_and_goes_on(
    slurm: SmallSlurm, chain: Launched, tmp_path: Path
) -> None:
    recipe = without_prepare(chain)
    again = launch(tmp_path, "--stages", "train-base", recipe=recipe, slurm=slurm)
    (job,) = slurm.jobs()
    again.wait_for_steps("base", 12)  # after the first checkpoint, whose writers are still there
    slurm.end_time_limit(job)
    slurm.wait_until_empty(200)
    log = again.log("train-base")
    assert again.done() == {"train-base"}, log
    assert "asked to stop: saved after step" in log and "to be continued" in log, log
    assert log.count(" 4 ranks, ") == 2, log
    assert "half-written" not in log and not list(again.output.glob("launch/*.failures"))
    # Bit for bit: floats are logged so that they read back the same.
    assert again.losses("base") == chain.losses("base")
