"""The quickstart recipe from end to end, with fewer bytes and steps than `make quickstart`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lctw_megatron.config.load import load_fragment
from lctw_megatron.config.schema import ClusterConfig
from lctw_megatron.launch.queue import plan_jobs
from lctw_megatron.launch.stage_graph import build_stage_graph

ROOT = Path(__file__).parents[1]


def quickstart(folder: Path) -> subprocess.CompletedProcess[str]:
    data = f"{folder}/data/stdlib"
    changes = {
        "output_dir": str(folder),
        "prepare.output_prefix": data,
        "prepare.max_bytes": "700_000",
        "prepare.train_sentencepiece": "1000",
        "data.train": data,
        "data.validation": f"{data}-validation",
        "evaluation.data": f"{data}-validation",
        "evaluation.max_sequences": "2",
        "training.steps": "3",
        "runs.base.training.steps": "4",
    }
    command = [sys.executable, "tools/launch.py", "recipes/quickstart/recipe.yaml"]
    for field, value in changes.items():
        command += ["--set", f"{field}={value}"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=590)


@pytest.mark.parametrize("cluster", ["slurm_generic", "slurm_cpu_test"])
def test_the_quickstart_fits_the_shipped_clusters_as_it_is(cluster: str) -> None:
    graph = build_stage_graph("recipes/quickstart/recipe.yaml")
    site = ClusterConfig.model_validate(load_fragment("cluster", cluster, "the test"))
    assert "train-base" in [job.name for job in plan_jobs(graph, graph.stages, site)]


@pytest.mark.timeout(1300)
def test_the_quickstart_goes_from_text_to_exported_models_and_a_report(tmp_path: Path) -> None:
    result = quickstart(tmp_path / "q")
    assert result.returncode == 0, result.stderr[-2000:] + result.stdout[-2000:]
    for word in ("uniform", "dense", "near", "far", "first seen"):
        assert word in result.stdout.lower()
    for run in ("uniform", "dense"):
        folder = tmp_path / "q" / run
        assert json.loads((folder / "hf" / "config.json").read_text())["architectures"]
        assert (folder / "evaluation.json").exists()
        assert len((folder / "metrics.jsonl").read_text().splitlines()) == 3
    page = (tmp_path / "q" / "report" / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")

    again = quickstart(tmp_path / "q")
    assert again.returncode == 0 and "train.py" not in again.stdout
