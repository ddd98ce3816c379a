"""What a run's training took: tokens, device hours, FLOPs. From metrics.jsonl and run.yaml."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

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
    steps = int(run.metrics[-1]["step"]) + 1
    batch, length = run.config.training.global_batch_size, run.config.data.sequence_length
    work = step_flops(run.config)
    return Cost(steps, steps * batch * length, _hours(run, work), float(steps) * work)


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


def _hours(run: RunRecord, work: int) -> float | None:
    """A line stands for the steps since the one before it (`training.log_interval`)."""
    series, rate = run.series("speed/seconds"), run.series("speed/tflops_per_rank")
    known = rate.values * series.values if len(rate) == len(series) else np.zeros(0)
    if not len(known) or not (np.isfinite(known) & (known > 0)).all():
        return None
    ranks = np.maximum(np.round(work / (known * 1e12)), 1)  # a resumed run may have others
    covered = np.diff(series.steps, prepend=-1)
    return float((covered * series.values * ranks).sum()) / 3600
