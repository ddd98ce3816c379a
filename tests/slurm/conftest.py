"""One small SLURM for all tests of this folder, and one recipe that has finished on it."""

import signal
from collections.abc import Iterator

import pytest

from tests.slurm.recipes import STAGES, Launched, call, launch
from tests.slurm.small_slurm import SmallSlurm, why_not


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallSlurm]:
    """Two nodes on this machine, or a skip that says why there are none."""
    if reason := why_not():
        pytest.skip(f"no SLURM on this machine: {reason}")
    # What ends a test run that takes too long must not leave jobs behind.
    previous = signal.signal(signal.SIGTERM, lambda *_: pytest.exit("SIGTERM", 143))
    with SmallSlurm(tmp_path_factory.mktemp("slurm")) as running:
        yield running
    signal.signal(signal.SIGTERM, previous)


@pytest.fixture(autouse=True)
def nothing_queued_for_the_next(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that fails leaves its jobs; the next one is not to meet them."""
    yield
    slurm: SmallSlurm | None = request.node.funcargs.get("slurm")
    if slurm is not None and (jobs := slurm.jobs()):
        slurm.run("scancel", *jobs)
        slurm.wait_until_empty(60)


@pytest.fixture(scope="session")
def chain(slurm: SmallSlurm, tmp_path_factory: pytest.TempPathFactory) -> Launched:
    """The recipe, finished on SLURM."""
    # Nothing begins before all was looked at, however slow this machine is.
    slurm.run("scontrol", "update", "PartitionName=main", "State=DOWN")
    launched = launch(tmp_path_factory.mktemp("chain"), slurm=slurm)
    waiting = slurm.jobs()
    assert len(waiting) == len(STAGES) + 1, launched.out  # score-parts is an array of two
    assert sorted(waiting) == sorted(["1", "2", "3_0", "3_1", "4", "5", "6", "7", "8"])
    said = call("launch.py", "status", launched.output, slurm=slurm)
    assert "pending, job 3, 0 of 2 parts done" in said, said
    slurm.run("scontrol", "update", "PartitionName=main", "State=UP")
    slurm.wait_until_empty(550)  # minutes, where others use the cores too
    assert launched.done() == STAGES - {"score-parts"}, launched.logs()
    return launched
