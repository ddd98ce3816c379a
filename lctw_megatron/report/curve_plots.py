"""Metrics over the steps of training, of groups of runs the mean over their seeds."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lctw_megatron.errors import few
from lctw_megatron.report.groups import Group
from lctw_megatron.report.plot_style import (
    GUIDE,
    legend,
    line_of,
    marker_of,
    marker_size,
    new_figure,
)
from lctw_megatron.report.runs import RunRecord

LOSSES = (
    ("loss/plain", "training, all targets alike"),
    ("loss/weighted", "training, weighted: the objective"),
    ("validation/loss/plain", "validation, all targets alike"),
    ("loss/near", "training, near targets"),
    ("loss/far", "training, far targets"),
    ("loss/first_seen", "training, first-seen targets"),
)
WEIGHTS = (
    ("weights/n_eff_share", "effective sample size ÷ targets"),
    ("weights/zero_share", "share of targets with weight 0"),
    ("weights/max", "largest weight"),
    ("weights/spearman", "rank correlation of weight and loss"),
)


_OF_EQUAL_TARGETS = ("loss/plain", "loss/near", "loss/far", "loss/first_seen")
"""Metrics whose difference means something: the weighted loss is another quantity in every run."""


def loss_curves(groups: Sequence[Group]) -> Figure | None:
    """Losses over the steps; None if no run has metrics."""
    runs = _merged(groups)
    return _curves(runs, runs, LOSSES, columns=3, unit="loss, nats a target", settles=True)


def difference_curves(groups: Sequence[Group]) -> Figure | None:
    """Training losses less those of the first group, where both trained on the same sequences: then
    the noise of the batches, which hides the difference between the curves, is gone. Of several
    seeds those that both have, see ``difference_lines``."""
    runs, first = _merged(groups), groups[0]
    panels = [(metric, title) for metric, title in LOSSES if metric in _OF_EQUAL_TARGETS]
    metrics = [metric for metric, _ in panels]
    shown = [
        _difference(_of_seeds(group, seeds), _of_seeds(first, seeds), metrics)
        for group in groups[1:]
        if (seeds := _shared_seeds(group, first))
    ]
    return _curves(runs, shown, panels, columns=2, unit=f"nats, less {runs[0].name}", zero=True)


def difference_lines(groups: Sequence[Group]) -> list[str]:
    """Who is drawn in ``difference_curves`` with some of the seeds, and who is not."""
    first, trained = groups[0], [group for group in groups[1:] if _trained(group)]
    seeds = {group.name: (_shared_seeds(group, first), _trained(group)) for group in trained}
    some = [
        name
        for name, (shared, own) in seeds.items()
        if shared and not shared == own == _trained(first)
    ]
    none = [name for name, (shared, _) in seeds.items() if not shared]
    lines = [f"Of the seeds that {first.name} has too: {few(some)}."] if some else []
    if none:
        lines.append(
            f"Not drawn, since trained on other batches than {first.name} or with none of its "
            f"seeds: {few(none)}."
        )
    return lines


def weight_curves(groups: Sequence[Group]) -> Figure | None:
    """Statistics of the weights over the steps; None if all runs are uniform."""
    runs = _merged(groups)
    return _curves(runs, [run for run in runs if _is_weighted(run)], WEIGHTS, columns=2, unit="")


def recall_curves(groups: Sequence[Group]) -> Figure | None:
    """What `training.recall` measured; None if no run has it."""
    runs = _merged(groups)
    found = {name for run in runs for line in run.metrics for name in line}
    names = sorted(name for name in found if name.startswith("recall/"))
    panels = [(name, name.removeprefix("recall/").replace("/", ", ")) for name in names]
    return _curves(runs, runs, panels, columns=2, unit="")


def same_batches(run: RunRecord, first: RunRecord) -> bool:
    """Whether step n of both runs trained on the same sequences, but for the order that a seed
    makes."""
    ours, theirs = run.config, first.config
    if ours is None or theirs is None:
        return False
    return (
        ours.data.model_copy(update={"scores": theirs.data.scores}) == theirs.data
        and ours.training.global_batch_size == theirs.training.global_batch_size
    )


def _trained(group: Group) -> set[int]:
    """Seeds of its runs whose training is known."""
    return {run.config.seed for run in group.runs if run.config and run.metrics}


def _shared_seeds(group: Group, first: Group) -> set[int]:
    """With which both trained on the same sequences."""
    same = same_batches(group.first, first.first)
    return _trained(group) & _trained(first) if same else set()


def _of_seeds(group: Group, seeds: set[int]) -> RunRecord:
    """The mean over the runs with these seeds, under the group's name."""
    runs = tuple(run for run in group.runs if run.config and run.config.seed in seeds)
    return replace(replace(group, runs=runs).merged, name=group.name)


def _merged(groups: Sequence[Group]) -> list[RunRecord]:
    return [group.merged for group in groups]


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Means of ``width`` neighbours: float64 [n - width + 1]."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    return (sums[width:] - sums[:-width]) / width


def _curves(
    runs: Sequence[RunRecord],
    shown: Sequence[RunRecord],
    panels: Sequence[tuple[str, str]],
    columns: int,
    unit: str,
    settles: bool = False,
    zero: bool = False,
) -> Figure | None:
    """One panel a metric that is not 0 throughout. settles: the steep fall at the beginning of a
    run from random weights may leave the axis; beside it nothing else could be seen."""
    panels = [
        (metric, title)
        for metric, title in panels
        if any(run.series(metric).values.any() for run in shown)
    ]
    if not panels:
        return None
    rows = -(-len(panels) // columns)
    with new_figure(4.1 * columns, 2.8 * rows + 0.4) as figure:
        for at, (metric, title) in enumerate(panels):
            axes = figure.add_subplot(rows, columns, at + 1)
            if zero:
                axes.axhline(0, color=GUIDE, linewidth=0.8)
            drawn = [run for run in shown if len(run.series(metric))]
            lines = [_curve(axes, run, metric, runs) for run in drawn]
            tenth = 10 if settles else 10**9
            _show(axes, np.concatenate([values[len(values) // tenth :] for values in lines]))
            axes.set_title(title)
            axes.set_xlabel("step")
            if at % columns == 0:
                axes.set_ylabel(unit)
        legend(figure, shown, runs)
        return figure


def _curve(axes: Axes, run: RunRecord, metric: str, runs: Sequence[RunRecord]) -> np.ndarray:
    """Draw a metric, faint as it is and strong its running mean; the values of the latter."""
    series = run.series(metric)
    steps, values = series.steps.astype(float), series.values
    width = max(1, len(series) // 40)
    if width > 1:
        axes.plot(steps, values, **line_of(run, runs) | {"alpha": 0.2, "linewidth": 0.8})
        steps, values = running_mean(steps, width), running_mean(values, width)
    marker = marker_of(run, runs) if len(series) < 30 else None
    size = marker_size(run, runs)
    axes.plot(steps, values, marker=marker, markersize=size, **line_of(run, runs))
    return values


def _show(axes: Axes, values: np.ndarray) -> None:
    """Let the axis hold these values."""
    values = values[np.isfinite(values)]
    if len(values):
        low, high = float(values.min()), float(values.max())
        margin = 0.08 * (high - low) or 0.05 * max(abs(high), 0.1)
        axes.set_ylim(low - margin, high + margin)


def _difference(run: RunRecord, first: RunRecord, metrics: list[str]) -> RunRecord:
    """A record of ``run`` whose ``metrics`` are less those of ``first``, at steps both have."""
    theirs = {line["step"]: line for line in first.metrics}
    lines = [
        {"step": line["step"]}
        | {
            metric: line[metric] - theirs[line["step"]][metric]
            for metric in metrics
            if metric in line and metric in theirs[line["step"]]
        }
        for line in run.metrics
        if line["step"] in theirs
    ]
    return replace(run, metrics=lines)


def _is_weighted(run: RunRecord) -> bool:
    """Whether its weights ever differed from 1."""
    shares = run.series("weights/n_eff_share")
    return bool((shares.values < 1 - 1e-9).any())
