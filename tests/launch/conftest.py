"""A recipe with everything in it, in an empty folder; a SLURM of stubs."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from lctw_megatron.launch.slurm import stage_jobs
from lctw_megatron.launch.stage_graph import StageGraph, build_stage_graph
from lctw_megatron.scoring.sidecar_shard import shard_path
from tests.tokenizer_files import sentencepiece_model

__all__ = ["sentencepiece_model"]

RECIPE = """\
name: demo
output_dir: out
prepare:
  inputs: [corpus/*.jsonl.gz, more texts]
  output_prefix: data/books
  train_sentencepiece: 4096
  validation_documents: 8
  workers: 4
model: tiny_llama
layout: {tensor: 2, sequence: true}
data: {train: data/books, validation: data/books-validation, sequence_length: 256}
training: {steps: 100}
scoring: {scorer: base, window: 256, stride: 192, shards: 4}
evaluation:
  data: data/books-validation
  sequence_length: 1024
  window: 256
  key_checkpoint: uniform
  note: A run this small proves the road, not the method.
runs:
  base: {layout: single}
  uniform: {start: base, data: {sequence_length: 1024}}
  dense: {start: base, data: {sequence_length: 1024}, weighting: dense}
cluster: slurm_cpu_test
"""


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., StageGraph]:
    """Plans RECIPE, or another text, with overrides."""
    monkeypatch.chdir(tmp_path)

    def make(text: str = RECIPE, *overrides: str) -> StageGraph:
        Path("recipe.yaml").write_text(text)
        return build_stage_graph("recipe.yaml", overrides)

    return make


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """sbatch that numbers jobs from 1 and writes its arguments down; squeue that shows a file."""
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    (stubs / "sbatch").write_text(
        '#!/bin/bash\necho "$@" >> said\n'
        '[ -n "$REFUSE" ] && { echo "no such partition" >&2; exit 1; }\n'
        "wc -l < said\n"
    )
    (stubs / "squeue").write_text("#!/bin/bash\n[ -e waiting ] && cat waiting; exit 0\n")
    for path in stubs.iterdir():
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{stubs}:{os.environ['PATH']}")

    class Slurm:
        @staticmethod
        def said() -> dict[str, str]:
            """Script name -> the options it was last submitted with."""
            lines = [line.split() for line in Path("said").read_text().splitlines()]
            return {Path(line[-1]).stem: " ".join(line[1:-1]) for line in lines}

        @staticmethod
        def waiting(text: str) -> None:
            Path("waiting").write_text(text)

    return Slurm()


# Two tasks, one after the other; like the real one it returns the largest exit status.
SRUN = """
while [ "${1#--}" != "$1" ]; do shift; done
export SLURM_PROCID SLURM_LOCALID SLURM_NTASKS=2
most=0
for SLURM_PROCID in 0 1; do
    SLURM_LOCALID=$SLURM_PROCID
    "$@" || { status=$?; [ $status -gt $most ] && most=$status; }
done
exit $most
"""


@pytest.fixture
def run_script(tmp_path, monkeypatch):
    """Runs a script with stubs on the path; returns its status and what the stubs were told."""
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    said = tmp_path / "said"

    def stub(name: str, body: str) -> None:
        path = stubs / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)

    stub("srun", SRUN)
    stub("scontrol", f'if [ "$1" = show ]; then printf "n1\\nn2\\n"; else echo "$@" >> {said}; fi')
    for name in ("python", "torchrun"):
        stub(
            name,
            f'echo {name} "$@" "${{RANK:-}}/${{WORLD_SIZE:-}}@${{MASTER_ADDR:-}}" >> {said}\n'
            'own="STATUS_${RANK:-}"; exit ${!own:-${STATUS:-0}}',
        )

    def run(script: str, **environment: str) -> tuple[int, list[str]]:
        said.unlink(missing_ok=True)
        path = f"{stubs}:{os.environ['PATH']}"
        clean = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
        result = subprocess.run(
            ["bash"], input=script.replace("source .venv/bin/activate\n", ""), text=True,
            env=clean | {"PATH": path} | environment, capture_output=True, timeout=60,
        )  # fmt: skip
        return result.returncode, said.read_text().splitlines() if said.exists() else []

    return run


IN_JOB = {"SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "n[1-2]"}


def jobs(plan, cluster, *names):
    """The jobs of these names; of none, all."""
    found = [job for stage in plan.stages for job in stage_jobs(plan, stage, cluster)]
    return [job for job in found if job.name in names] if names else found


def finish_part(plan, part: int) -> Path:
    """What a part of RECIPE's scoring leaves: its mark and its shard, which is returned."""
    (stage,) = plan.select(["score"])
    shard = shard_path(Path("data/books.short_loss.shards"), part, stage.shards)
    shard.parent.mkdir(parents=True, exist_ok=True)
    shard.touch()
    plan.mark(stage, part).write_text(plan.fingerprints["score"])
    return shard
