"""harness.json: what is in it, reading it, and making it from what the harness returns."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, FiniteFloat, model_validator

from lctw_megatron.errors import InputError
from lctw_megatron.evaluation.harness_tasks import RULER, Call
from lctw_megatron.evaluation.saved_result import Shape, read_result

FORMAT = "lctw-megatron harness 1"
"""Of harness.json. Its keys:

settings    what the results depend on besides task and length, with the identity of the weights,
            and the `checkpoint` that was exported
results     one of each call: `call` (what was asked for), `task`, `length` (null but for RULER),
            `metrics`: name: [value, standard error or null], `main` (the metric to show),
            `lower_is_better` (of that metric; files of before lack it), `samples`, `fewshot`,
            `version` of the task, `max_length`, `seconds`, `file` (what the harness itself
            returned, beside harness.json) and for groups `parts`: the metrics of each task
ruler       length: `mean`, `error` and `tasks`: the mean over RULER's tasks at that length, which
            are all 13 only where `tasks` names as many
"""

Metric = list[Any]
"""[value, standard error or None]"""

MAIN = ("score", "acc_norm", "acc", "exact_match")


def to_record(call: Call, results: dict[str, Any], seconds: float) -> dict[str, Any]:
    """The harness's dictionary as one of `results`. InputError if it measured nothing."""
    measured = results["results"]
    # A file's task or group has the name that the file gives it, a tag none of its own; the
    # outermost group comes last.
    alone = measured if len(measured) == 1 else {}
    names = [call.task, *reversed(results.get("groups") or {}), *alone]
    top = next((name for name in names if name in measured), None)
    parts = {name: _metrics(values) for name, values in measured.items() if name != top}
    metrics = _metrics(measured[top]) if top else {}
    if call.length is not None:
        metrics = {"score": _ruler_score(call, results)}
    metrics = metrics or _mean_of([part for part in parts.values() if part])
    if not metrics:
        raise InputError(f"task {call.task}: lm-evaluation-harness returned no metric for it")
    counts = [count["effective"] for count in results["n-samples"].values()]
    main = _main(metrics)
    known = results.get("higher_is_better") or {}
    directions = [known.get(name) or {} for name in ([top] if top in known else parts)]
    record = {
        "call": asdict(call),
        "task": top or call.task,
        "length": call.length,
        "main": main,
        "lower_is_better": any(of.get(main.partition(",")[0]) is False for of in directions),
        "metrics": metrics,
        "samples": sum(counts),
        "fewshot": results["n-shot"].get(top, call.fewshot),
        "version": results["versions"].get(top),
        "seconds": round(seconds, 1),
    }
    return record | ({"parts": parts} if parts else {})


def ruler_means(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """RULER's own number by length: the mean over its tasks. (The harness's group averages 4,096
    only.)"""
    means = {}
    for length in sorted({r["length"] for r in records if r["length"] is not None}):
        at = [r for r in records if r["length"] == length and r["task"] in RULER]
        values, errors = zip(*(r["metrics"]["score"] for r in at), strict=True)
        error = None
        if None not in errors:
            error = math.sqrt(sum(e * e for e in errors)) / len(errors)
        tasks = [r["task"] for r in at]
        means[str(length)] = {"mean": float(np.mean(values)), "error": error, "tasks": tasks}
    return means


def to_rows(result: dict[str, Any]) -> list[list[str]]:
    """A table, a line of each task and length; heading first."""
    rows = [["task", "length", "metric", "value", "samples"]]
    for record in result["results"]:
        value = _show(*record["metrics"][record["main"]])
        length = "-" if record["length"] is None else f"{record['length']:,}"
        rows.append([record["task"], length, record["main"], value, f"{record['samples']:,}"])
    for text, mean in result["ruler"].items():
        name = f"ruler, {len(mean['tasks'])} of {len(RULER)} tasks"
        rows.append([name, f"{int(text):,}", "score", _show(mean["mean"], mean["error"]), ""])
    return rows


class _Record(Shape):
    task: str
    length: int | None = None
    main: str
    metrics: dict[str, Annotated[list[FiniteFloat | None], Field(min_length=2, max_length=2)]]

    @model_validator(mode="after")
    def _has_its_main_metric(self) -> "_Record":
        if self.metrics.get(self.main, [None])[0] is None:
            raise ValueError(f"no value of {self.main}")
        return self


class _Mean(Shape):
    mean: float
    error: float | None
    tasks: list[str]


class _Harness(Shape):
    """What other modules rely on."""

    settings: dict[str, Any] = {}
    results: list[_Record]
    ruler: dict[Annotated[str, Field(pattern=r"^\d+$")], _Mean] = {}


def read_harness(path: str | Path) -> dict[str, Any] | None:
    """The contents of a harness.json; None if there is none. InputError if it is no such."""
    return read_result(path, FORMAT, "run the harness again", _Harness)


def _metrics(values: dict[str, Any]) -> dict[str, Metric]:
    """From the harness's `acc,none` and `acc_stderr,none`, which is "N/A" where there is none."""
    found = {}
    for key, value in values.items():
        metric, comma, used = key.partition(",")
        if not comma or metric.endswith("_stderr") or not _is_number(value):
            continue
        error: Any = values.get(f"{metric}_stderr,{used}")
        name = metric if used == "none" else f"{metric},{used}"
        found[name] = [float(value), float(error) if _is_number(error) else None]
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _ruler_score(call: Call, results: dict[str, Any]) -> Metric:
    """Share of the answers found, [mean, standard error over samples]. The harness names a sample's
    score after its length, and has -1 under every other one."""
    samples = results["samples"][call.task]
    scores = np.array([sample[str(call.length)] for sample in samples], dtype=np.float64)
    error = float(scores.std(ddof=1) / math.sqrt(len(scores))) if len(scores) > 1 else None
    return [float(scores.mean()), error]


def _mean_of(parts: Sequence[dict[str, Metric]]) -> dict[str, Metric]:
    """Of the metrics that all tasks of a tag, or of a group that has none of its own, have."""
    shared = [name for name in (parts or [{}])[0] if all(name in part for part in parts)]
    return {
        name: [float(np.mean([part[name][0] for part in parts], dtype=np.float64)), None]
        for name in shared
    }


def _main(metrics: dict[str, Any]) -> str:
    known = [name for kind in MAIN for name in metrics if name.partition(",")[0] == kind]
    return (known or list(metrics))[0]


def _show(value: float, error: float | None) -> str:
    return f"{value:.4f}" + ("" if error is None else f" ±{error:.4f}")
