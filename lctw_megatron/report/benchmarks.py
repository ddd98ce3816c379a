"""Benchmarks of lm-evaluation-harness side by side: what harness.json of each run says."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lctw_megatron.evaluation.harness_tasks import RULER
from lctw_megatron.evaluation.recall_result import show
from lctw_megatron.report.estimate import Measured, difference, is_beyond, level
from lctw_megatron.report.groups import Group
from lctw_megatron.report.measures import seed_of
from lctw_megatron.report.runs import RunRecord
from lctw_megatron.report.table import Rows, marked, short_number


def benchmark_names(groups: Sequence[Group]) -> list[str]:
    """Of all runs, in the order of the first that has them."""
    runs = [run for group in groups for run in group.runs if run.harness]
    return list(dict.fromkeys(_name(record) for run in runs for record in _records(run.harness)))


def lower_is_better(groups: Sequence[Group], name: str) -> bool:
    """Whether a smaller value of the task's main metric is a better one, as of a perplexity."""
    runs = [run for group in groups for run in group.runs]
    records = [record for run in runs for record in _records(run.harness)]
    return any(record.get("lower_is_better", False) for record in records if _name(record) == name)


def benchmark(group: Group, name: str) -> Measured | None:
    """The main metric of one task: a value a run, and the standard error over the samples, which
    are the same for every seed and so do not become more. None if no run has it."""
    found = [
        (seed_of(run), record)
        for run in group.runs
        for record in _records(run.harness)
        if _name(record) == name
    ]
    if not found:
        return None
    samples = _samples(found[0][1])
    same = [(seed, record) for seed, record in found if _samples(record) == samples]
    values = [record["metrics"][record["main"]] for _, record in same]
    errors = [value[1] for value in values if value[1] is not None]
    error = float(np.mean(errors)) if len(errors) == len(values) else None
    seeds = tuple(seed for seed, _ in same)
    return Measured(seeds, samples, np.array([float(value[0]) for value in values]), (), error)


def benchmark_table(groups: Sequence[Group]) -> Rows:
    """A row a task, a column a group; marked where one is better or worse than the first."""
    measured = [group for group in groups if any(run.harness for run in group.runs)]
    rows: Rows = [["benchmark", *(group.name for group in measured)]]
    for name in benchmark_names(measured):
        first, lower = benchmark(groups[0], name), lower_is_better(measured, name)
        row = [name]
        for group in measured:
            value = benchmark(group, name)
            if value is None:
                row.append("-")
                continue
            gap = difference(value, first)
            better = gap is not None and (gap.mean < 0) == lower
            row.append(marked(show(level(value)), better, is_beyond(gap)))
        rows.append(row)
    return rows


def benchmark_lines(groups: Sequence[Group]) -> list[str]:
    if not benchmark_names(groups):
        return []
    return [
        "Benchmarks: lm-evaluation-harness, the main metric of each task; ± over seeds and "
        "samples. Single answers are not kept, so differences are not paired by sample."
    ]


def _records(harness: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The results, and RULER's means over its tasks, by length. Means are alike where they are over
    the same samples of the same tasks."""
    if not harness:
        return []
    counts = {(r["task"], r.get("length")): r.get("samples") for r in harness["results"]}
    means = [
        {
            "task": f"ruler, {len(mean['tasks'])} of {len(RULER)} tasks",
            "length": int(length),
            "main": "score",
            "metrics": {"score": [mean["mean"], mean["error"]]},
            "samples": sorted(
                f"{task}: {counts.get((task, int(length)))}" for task in mean["tasks"]
            ),
        }
        for length, mean in harness.get("ruler", {}).items()
    ]
    return [*harness["results"], *means]


def _name(record: dict[str, Any]) -> str:
    """A task that was measured at several lengths, or numbers of shots, has several."""
    length, shots = record.get("length"), (record.get("call") or {}).get("fewshot")
    name = f"{record['task']} at {short_number(length)}" if length else record["task"]
    return f"{name}, {shots} shots" if shots else name


def samples_by_name(run: RunRecord) -> dict[Any, Any]:
    """Task -> on what it was measured."""
    return {_name(record): _samples(record) for record in _records(run.harness)}


def _samples(record: dict[str, Any]) -> tuple[Any, ...]:
    keys = ("task", "length", "main", "version", "fewshot", "samples")
    return tuple(str(record.get(key)) for key in keys)
