"""What a run has left behind: metrics.jsonl, evaluation.json, recall.json, run.yaml."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lctw_megatron.config.load import load_run
from lctw_megatron.config.schema import RunConfig
from lctw_megatron.data.metrics_file import read_metrics
from lctw_megatron.errors import InputError
from lctw_megatron.evaluation.buckets import Difference, Pair, paired_difference
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
    if not metrics and evaluation is None and recall is None:
        raise InputError(
            f"{folder}: holds neither steps in metrics.jsonl nor evaluation.json or recall.json; "
            "is this a run folder?"
        )
    config = load_run(folder / "run.yaml") if (folder / "run.yaml").is_file() else None
    return RunRecord(folder.resolve().name, folder, config, metrics, evaluation, recall)


def read_runs(folders: Sequence[str | Path]) -> list[RunRecord]:
    """All runs, under different names: the folder's, and where that is not enough its parent's too,
    or the whole path. Raises InputError for one given twice."""
    paths = [Path(folder).resolve() for folder in folders]
    for path, folder in zip(paths, folders, strict=True):
        if paths.count(path) > 1:
            raise InputError(f"{folder}: given twice; name each run once")
    for names in (
        [path.name for path in paths],
        ["/".join(path.parts[-2:]) for path in paths],
        [str(path) for path in paths],
    ):
        if len(set(names)) == len(names):
            break
    return [replace(read_run(f), name=name) for f, name in zip(folders, names, strict=True)]


def comparable(run: RunRecord, first: RunRecord) -> bool:
    """Whether both were evaluated on the same sequences with the same classes."""
    if run.evaluation is None or first.evaluation is None:
        return False
    ours, theirs = run.evaluation, first.evaluation
    same = ("tokens_fingerprint", "sequence_length", "near")
    return ours["sequences"] == theirs["sequences"] and all(
        ours["settings"][key] == theirs["settings"][key] for key in same
    )


def differences(run: RunRecord, first: RunRecord, group: str) -> list[Difference | None]:
    """Of each bin of a ``group`` of probes: run - first. Both must be comparable."""
    ours, theirs = sums(run, group), sums(first, group)
    return [
        paired_difference(Pair(a, b, n))
        for a, b, n in zip(ours[0].T, theirs[0].T, ours[1].T, strict=True)
    ]


def total_difference(run: RunRecord, first: RunRecord) -> Difference | None:
    """Of all targets."""
    (ours, targets), (theirs, _) = sums(run, "classes"), sums(first, "classes")
    return paired_difference(Pair(ours.sum(1), theirs.sum(1), targets.sum(1)))


def sums(run: RunRecord, group: str) -> tuple[np.ndarray, np.ndarray]:
    """Σ loss and targets [sequences, bins] of a group of probes."""
    assert run.evaluation
    values = run.evaluation[group]
    return np.array(values["sequence_loss"]), np.array(values["sequence_targets"])
