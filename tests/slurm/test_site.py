"""A chain of jobs at a site with habits of its own, on the real SLURM: nothing is exported to jobs,
the environment's activation reads unset variables, sbatch and squeue greet their user, whose own
variables are set for other purposes, and the folders have spaces and SLURM's patterns in them."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.slurm.recipes import RECIPE, STAGES, Launched, call, cluster_file
from tests.slurm.small_slurm import SmallSlurm

pytestmark = pytest.mark.long

ACTIVATE = """\
export SAVED_PREFIX="$PREFIX_OF_THE_ENVIRONMENT_BEFORE"  # unset, as conda's are
[ -z "$SUBMITTERS_OWN" ] || echo "exported: $SUBMITTERS_OWN" >&2
export PATH={bin}:$PATH SLURM_CONF={conf} OMP_NUM_THREADS=1
"""

GREETED = """\
#!/bin/bash
echo "Welcome to the cluster, the 7th of its name"
exec {real} "$@"
"""

USERS_OWN = {
    "SBATCH_EXPORT": "NONE",  # a site's default
    "SBATCH_TIMELIMIT": "0:01",
    "SBATCH_PARTITION": "main",
    "SBATCH_OUTPUT": "/dev/null",
    "SBATCH_WAIT": "1",
    "SQUEUE_FORMAT": "%j",
    "SQUEUE_STATES": "COMPLETED",
    "SQUEUE_USERS": "nobody",
    "SUBMITTERS_OWN": "not for jobs",
}


@pytest.mark.timeout(1300)
def test_the_chain_finishes_at_a_site_with_habits(slurm: SmallSlurm, tmp_path: Path) -> None:
    folder = tmp_path / "my runs, 100%j of %A"
    folder.mkdir()
    activate, stubs = folder / "the activate", folder / "bin"
    conf = slurm.environment["SLURM_CONF"]
    activate.write_text(ACTIVATE.format(bin=Path(sys.executable).parent, conf=conf))
    stubs.mkdir()
    for name in ("sbatch", "squeue"):
        (stubs / name).write_text(GREETED.format(real=f"/usr/bin/{name}"))
        (stubs / name).chmod(0o755)
    path = f"{stubs}:{slurm.environment['PATH']}"
    site = SimpleNamespace(environment={**slurm.environment, **USERS_OWN, "PATH": path})
    recipe = folder / "the recipe.yaml"
    recipe.write_text(RECIPE.format(folder=folder).replace("steps: 100", "steps: 20"))
    cluster = cluster_file(folder, setup=[f"source '{activate}'"], environment={"HUSH": "$HOME/x"})
    said = call("launch.py", recipe, "--cluster", cluster, slurm=site)
    launched = Launched(folder, said, folder / "out")
    assert said.count(": submitted as job") == len(STAGES), said
    again = call("launch.py", "resume", launched.output, slurm=site)
    known = again.count(" is in the queue") + again.count(": done before")
    assert "submitted" not in again and known == len(STAGES), again
    slurm.wait_until_empty(900)
    assert launched.done() == STAGES - {"score-parts"}, launched.logs()
    assert not list(launched.output.glob("launch/*.failures"))
    assert ", 4 ranks, " in launched.log("train-dense")
    assert "exported:" not in launched.logs()
    assert {path.name for path in launched.output.glob("launch/*.log")} == {
        *(f"{name}.log" for name in STAGES - {"score-parts"}), "score-parts-0.log",
        "score-parts-1.log",
    }  # fmt: skip
