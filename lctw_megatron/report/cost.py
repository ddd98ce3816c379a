"""What a run's training took: tokens, device hours, FLOPs. From metrics.jsonl and run.yaml."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lctw_megatron.config.schema import RunConfig
from lctw_megatron.report.groups import Group
from lctw_megatron.report.runs import RunRecord
from lctw_megatron.report.table import Rows, mean_of
from lctw_megatron.training.flops import step_flops


@dataclass(frozen=True)
class Cost:
    """Of all steps a run has done. Not in it: start, evaluations, checkpoints, and the scoring of a
    frozen scorer, which a corpus needs once for all runs."""

    steps: int
    tokens: int
    hours: float | None
    """Wall time of the steps times ranks; None where the metrics do not tell."""
    flops: float
    """Model FLOPs, self-scoring included (``training.flops``)."""


def training_cost(run: RunRecord) -> Cost | None:
    """None without run.yaml or steps."""
    if run.config is None or not run.metrics:
        return None
    lines = np.array([line["step"] for line in run.metrics])
    covered = np.diff(lines, prepend=-1)  # a line is of the steps since the one before it
    sequences, work = _sequences(run, run.config), step_flops(run.config)
    share = sequences / run.config.training.global_batch_size
    tokens = int((covered * sequences).sum()) * run.config.data.sequence_length
    hours = _hours(run, covered, work * share)
    return Cost(int(lines[-1]) + 1, tokens, hours, float((covered * share).sum()) * work)


def _sequences(run: RunRecord, config: RunConfig) -> np.ndarray:
    """Of a step of each line. A run that went on with another batch size has several; run.yaml has
    the last."""
    series, rate = run.series("speed/seconds"), run.series("speed/tokens_per_second")
    if len(series) == len(rate) == len(run.metrics):
        found = series.values * rate.values / config.data.sequence_length
        if np.isfinite(found).all() and (found >= 0.5).all():
            return np.round(found)
    return np.full(len(run.metrics), config.training.global_batch_size)


def on_gpus(run: RunRecord) -> bool:
    """Whether the first line of the metrics names a GPU."""
    machine = next((str(m["speed/machine"]) for m in run.metrics if "speed/machine" in m), "")
    return "CUDA" in machine


def hours_name(groups: Sequence[Group]) -> str:
    """What hours are hours of."""
    gpu = any(on_gpus(run) for group in groups for run in group.runs)
    return "GPU hours" if gpu else "CPU rank hours"


def cost_table(groups: Sequence[Group]) -> Rows:
    """A row a group: of one run in the mean over the seeds, and the hours of all together."""
    hours_of_all = f"{hours_name(groups)} of all"
    rows: Rows = [
        ["a run in the mean", "runs", "steps", "tokens", hours_name(groups), hours_of_all, "PFLOP"]
    ]
    for group in groups:
        costs = [cost for run in group.runs if (cost := training_cost(run))]
        if costs:
            hours = [cost.hours for cost in costs if cost.hours is not None]
            rows.append(
                [
                    group.name,
                    str(len(costs)),
                    f"{np.mean([cost.steps for cost in costs]):,.0f}",
                    f"{np.mean([cost.tokens for cost in costs]):,.0f}",
                    f"{np.mean(hours):.3g}" if hours else "-",
                    f"{sum(hours):.3g}" if hours else "-",
                    f"{np.mean([cost.flops for cost in costs]) / 1e15:,.4g}",
                ]
            )
    return rows


def cost_words(group: Group, baseline: Group) -> str:
    """What one run of ``group`` took beside one of ``baseline``, to end a sentence; empty where
    that is not known."""
    ours, theirs = ([training_cost(run) for run in each.runs] for each in (group, baseline))
    parts = []
    for name in ("hours", "flops"):
        means = [mean_of([getattr(c, name) for c in costs if c]) for costs in (ours, theirs)]
        if means[0] is not None and means[1]:
            what = hours_name([group, baseline]) if name == "hours" else "FLOPs"
            parts.append(f"{means[0] / means[1]:.2f} × the {what}")
    return f", for {' and '.join(parts)} of a run" if parts else ""


def _hours(run: RunRecord, covered: np.ndarray, work: np.ndarray) -> float | None:
    """covered, work: the steps of each line, and the FLOPs of one of them."""
    series, rate = run.series("speed/seconds"), run.series("speed/tflops_per_rank")
    whole = len(rate) == len(series) == len(covered)
    known = rate.values * series.values if whole else np.zeros(0)
    if not len(known) or not (np.isfinite(known) & (known > 0)).all():
        return None
    ranks = np.maximum(np.round(work / (known * 1e12)), 1)  # a resumed run may have others
    return float((covered * series.values * ranks).sum()) / 3600
