"""A recipe that takes seconds, its stages submitted to the small SLURM, and the losses it left."""

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import yaml

from tests.slurm.small_slurm import SmallSlurm
from tests.training.runs import logged

PROJECT = Path(__file__).parents[2]

RECIPE = """\
name: small
output_dir: {folder}/out
prepare:
  inputs: [stdlib]
  output_prefix: {folder}/data/text
  train_sentencepiece: 600
  max_bytes: 300_000
  validation_documents: 2
model: {{num_layers: 2, hidden_size: 64, ffn_hidden_size: 128, num_attention_heads: 4}}
layout: single
data:
  train: {folder}/data/text
  validation: {folder}/data/text-validation
  sequence_length: 256
training: {{steps: 6, global_batch_size: 8, lr: 1.0e-3, warmup_steps: 2, tensorboard: false}}
runs:
  base:
    data: {{sequence_length: 64}}
    training: {{steps: 100, save_interval: 10}}
  dense: {{start: base, weighting: dense}}
scoring: {{scorer: base, window: 64, stride: 48, shards: 2}}
evaluation: {{data: "{folder}/data/text-validation", max_sequences: 4, window: 64}}
"""

STAGES = {
    "prepare", "train-base", "score-parts", "score", "train-dense", "export-dense",
    "evaluate-dense", "report",
}  # fmt: skip


@dataclass
class Launched:
    """What a launch.py said, the recipe's folder and its output folder."""

    folder: Path
    out: str
    output: Path

    def losses(self, run: str) -> list[dict[str, float]]:
        return logged(self.output / run)

    def steps(self, run: str) -> int:
        """Steps in the log of a run."""
        path = self.output / run / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    def wait_for_steps(self, run: str, steps: int, seconds: float = 240) -> None:
        deadline = time.monotonic() + seconds
        while self.steps(run) < steps:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{run}: {steps} steps not reached; {self.logs()}")
            time.sleep(0.02)

    def done(self) -> set[str]:
        return {path.stem for path in (self.output / "launch").glob("*.done")}

    def log(self, job: str) -> str:
        return (self.output / "launch" / f"{job}.log").read_text()

    def logs(self) -> str:
        """The end of every job's log, for a failing assertion."""
        paths = sorted((self.output / "launch").glob("*.log"))
        return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in paths)


def cluster_file(folder: Path, **settings: object) -> Path:
    """configs/clusters/slurm_cpu_test.yaml with this Python and ``settings``."""
    values = yaml.safe_load((PROJECT / "configs/clusters/slurm_cpu_test.yaml").read_text())
    values["setup"] = [f"export PATH={Path(sys.executable).parent}:$PATH"]
    path = folder / "cluster.yaml"
    path.write_text(yaml.safe_dump(values | settings))
    return path


def launch(
    folder: Path,
    *arguments: object,
    recipe: str = RECIPE,
    slurm: SmallSlurm | None = None,
) -> Launched:
    """launch.py RECIPE, with ``recipe`` written into ``folder``; ``slurm``: where to submit it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(recipe.format(folder=folder))
    cluster = ["--cluster", cluster_file(folder)] if slurm else []
    answer = call("launch.py", path, *cluster, *arguments, slurm=slurm)
    return Launched(folder, answer, folder / "out")


def without_prepare(chain: Launched) -> str:
    """RECIPE on the data that ``chain`` has made."""
    head, rest = RECIPE.split("prepare:\n")
    rest = rest.split("model:", 1)[1].replace("{folder}", str(chain.folder))
    return f"{head}model:{rest}"


def call(tool: str, *arguments: object, slurm: SmallSlurm | None = None) -> str:
    """What a tool prints; it must end well."""
    answer = subprocess.run(
        [sys.executable, f"tools/{tool}", *map(str, arguments)],
        cwd=PROJECT,
        env={**(slurm.environment if slurm else os.environ), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert answer.returncode == 0, f"{answer.stdout}\n{answer.stderr}"
    return answer.stdout
