"""What a run has left behind: metrics.jsonl, run.yaml and what was measured of it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lctw_megatron.config.load import load_run
from lctw_megatron.config.schema import RunConfig
from lctw_megatron.data.metrics_file import read_metrics
from lctw_megatron.errors import InputError
from lctw_megatron.evaluation.harness_result import read_harness
from lctw_megatron.evaluation.recall_result import read_recall
from lctw_megatron.evaluation.result_file import read_evaluation


@dataclass(frozen=True)
class Series:
    """One metric over the steps where it was measured."""

    steps: np.ndarray
    """int64"""
    values: np.ndarray
    """float64"""

    def __len__(self) -> int:
        return len(self.steps)


@dataclass(frozen=True)
class RunRecord:
    """One run as the report sees it."""

    name: str
    folder: Path
    config: RunConfig | None
    metrics: list[dict[str, float]]
    """The lines of metrics.jsonl."""
    evaluation: dict[str, Any] | None
    recall: dict[str, Any] | None = None
    """See ``recall_result.FORMAT``."""
    harness: dict[str, Any] | None = None
    """See ``harness_result.FORMAT``."""

    def series(self, metric: str) -> Series:
        """``metric`` over the steps; empty if it was never written."""
        known = [(line["step"], line[metric]) for line in self.metrics if metric in line]
        steps, values = zip(*known, strict=True) if known else ((), ())
        return Series(np.array(steps, dtype=np.int64), np.array(values, dtype=np.float64))

    @property
    def weights(self) -> dict[str, Any] | None:
        """The weight sample of the evaluation, if it has one."""
        found = (self.evaluation or {}).get("weights")
        return found if isinstance(found, dict) else None


def read_run(folder: str | Path) -> RunRecord:
    """Read a run folder. Raises InputError if it holds nothing to report."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such run folder; train the run first")
    log = folder / "metrics.jsonl"
    metrics = read_metrics(log) if log.is_file() else []
    evaluation = read_evaluation(folder / "evaluation.json")
    recall = read_recall(folder / "recall.json")
    harness = read_harness(folder / "harness.json")
    if not metrics and not any((evaluation, recall, harness)):
        raise InputError(
            f"{folder}: holds neither steps in metrics.jsonl nor evaluation.json, recall.json or "
            "harness.json; is this a run folder?"
        )
    config = load_run(folder / "run.yaml") if (folder / "run.yaml").is_file() else None
    return RunRecord(folder.resolve().name, folder, config, metrics, evaluation, recall, harness)


def read_runs(
    folders: Sequence[str | Path], baseline: str | Path | None = None
) -> tuple[list[RunRecord], RunRecord]:
    """All runs, and the one to compare with, by default the first, which may be one of ``folders``
    or not. Raises InputError for a folder given twice.

    They get different names: the folder's, and where that is not enough its parent's too, or the
    whole path. What cannot be drawn or would move a terminal's cursor stands there as \ufffd.
    """
    paths = [Path(folder).resolve() for folder in folders]
    for path, folder in zip(paths, folders, strict=True):
        if paths.count(path) > 1:
            raise InputError(f"{folder}: given twice; name each run once")
    folders = list(folders)
    if baseline is not None and Path(baseline).resolve() not in paths:
        folders.insert(0, baseline)
        paths.insert(0, Path(baseline).resolve())
    for found in (
        [path.name for path in paths],
        ["/".join(path.parts[-2:]) for path in paths],
        [str(path) for path in paths],
        [f"{at}: {path}" for at, path in enumerate(paths, 1)],
    ):
        names = ["".join(c if c.isprintable() else "\ufffd" for c in name) for name in found]
        if len(set(names)) == len(names):
            break
    runs = [replace(read_run(f), name=name) for f, name in zip(folders, names, strict=True)]
    return runs, runs[paths.index(Path(baseline).resolve()) if baseline is not None else 0]
