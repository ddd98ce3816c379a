"""Held-out losses by position and by distance, and how groups of runs differ there."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lctw_megatron.evaluation.buckets import Estimate
from lctw_megatron.report import measures
from lctw_megatron.report.estimate import BEYOND, Measured, difference, level
from lctw_megatron.report.groups import Group
from lctw_megatron.report.plot_style import (
    GUIDE,
    legend,
    line_of,
    marker_of,
    marker_size,
    new_figure,
    shift_of,
)
from lctw_megatron.report.table import short_number

POSITION = (
    "context: tokens of the sequence before the target (log buckets, labelled by their start)"
)
DISTANCE = (
    "last occurrence of the target's token, tokens back (log buckets, labelled by their start)"
)


def loss_by_position(groups: Sequence[Group]) -> Figure | None:
    """Held-out loss by the context a target has; None if no run was evaluated."""
    return _by_bucket(groups, "position", POSITION)


def loss_by_distance(groups: Sequence[Group]) -> Figure | None:
    """Held-out loss by how far back the target's token last stood; None likewise."""
    return _by_bucket(groups, "distance", DISTANCE)


def gain_by_distance(groups: Sequence[Group]) -> Figure | None:
    """What the context beyond the window is worth to each model, in the mean over a group's runs;
    None if not measured. Groups measured on other samples or windows than the first are left out.
    """
    measured = [(group, found) for group in groups if (found := _gains(group))]
    if not measured:
        return None
    how, first = measured[0][1][0]
    settings, bins = first["settings"], first["distance"]["bins"]
    measured = [(group, found) for group, found in measured if found[0][0] == how]
    with new_figure(8, 3.9) as figure:
        axes = figure.add_subplot()
        axes.axhline(0, color=GUIDE, linewidth=0.8)
        for group, found in measured:
            gains = [_numbers(evaluation["distance"]["gain"]) for _, evaluation in found]
            _line(axes, bins, np.mean(gains, axis=0), group, groups)
        _bucket_axis(axes, bins, settings["near"])
        axes.set_title(f"gain: loss with the last {settings['window']} tokens only − loss with all")
        axes.set_xlabel(DISTANCE)
        axes.set_ylabel("nats a target")
        legend(figure, [group for group, _ in measured], groups)
        return figure


def _by_bucket(groups: Sequence[Group], probes: str, label: str) -> Figure | None:
    evaluated = [group for group in groups if measures.has_losses(group)]
    if not evaluated:
        return None
    first, evaluation = evaluated[0], _evaluation(evaluated[0])
    settings, bins = evaluation["settings"], evaluation[probes]["bins"]
    targets = evaluation[probes]["targets"]
    # What was measured on other sequences has nothing to do with these bins.
    whole = measures.loss(first, probes)
    others = [g for g in evaluated[1:] if difference(measures.loss(g, probes), whole) is not None]
    losses = {group.name: _losses(group, probes, len(bins)) for group in [first, *others]}
    with new_figure(8, 6.6 if others else 3.9) as figure:
        ratios = [2, 3] if others else [1]
        grid = figure.add_gridspec(len(ratios), 1, height_ratios=ratios)
        above = axes = figure.add_subplot(grid[0])
        for group in [first, *others]:
            levels = [None if x is None else level(x) for x in losses[group.name]]
            _line(above, bins, _means(levels), group, groups)
        above.set_ylabel("nats a target")
        above.set_title("held-out loss")
        if others:
            axes = figure.add_subplot(grid[1], sharex=above)
            above.tick_params(labelbottom=False)
            axes.axhline(0, **line_of(first, groups))
            ends = [0.0]
            for group in others:
                pairs = zip(losses[group.name], losses[first.name], strict=True)
                found = [difference(ours, base) for ours, base in pairs]
                means = _means(found)
                errors = np.array([np.nan if d is None else d.error or np.nan for d in found])
                _line(axes, bins, means, group, groups, BEYOND * errors)
                ends += _ends(targets, means, errors)
            margin = 0.06 * (max(ends) - min(ends)) or 1e-6
            axes.set_ylim(min(ends) - margin, max(ends) + margin)
            axes.set_ylabel("nats a target")
            axes.set_title(
                f"difference to {first.name}, ±{BEYOND:g} standard errors (below 0: better)"
            )
        near = settings["near"] if probes == "distance" else None
        _bucket_axis(axes, bins, near)
        if others and near is not None:
            _mark_near(above, bins, near, words=False)
        axes.set_xlabel(label)
        legend(figure, [first, *others], groups)
        return figure


def _evaluation(group: Group) -> dict[str, Any]:
    return next(run.evaluation for run in group.runs if run.evaluation is not None)


def _losses(group: Group, probes: str, bins: int) -> list[Measured | None]:
    return [measures.loss(group, probes, [at]) for at in range(bins)]


def _gains(group: Group) -> list[tuple[Any, dict[str, Any]]]:
    """What the gain was measured on, and the evaluation: of each run that has one, on the samples
    and windows of the first."""
    found = [
        ((measures.loss_samples(run), settings["window"], settings.get("stride")), run.evaluation)
        for run in group.runs
        if run.evaluation is not None and "gain" in run.evaluation["distance"]
        for settings in [run.evaluation["settings"]]
    ]
    return [(how, evaluation) for how, evaluation in found if how == found[0][0]]


def _means(found: Sequence[Estimate | None]) -> np.ndarray:
    return np.array([np.nan if x is None else x.mean for x in found])


def _line(
    axes: Axes,
    bins: list[Any],
    values: np.ndarray,
    group: Group,
    groups: Sequence[Group],
    errors: np.ndarray | None = None,
) -> None:
    """One group's values over the buckets; a bin that is no number (first seen) stands apart."""
    places = _places(bins)
    named = np.array([isinstance(name, str) for name in bins])
    shift = 0.0 if errors is None else 0.6 * shift_of(group, groups)
    for part in (~named, named):
        if np.isfinite(values[part]).any():
            axes.errorbar(
                places[part] + shift,
                values[part],
                yerr=None if errors is None else errors[part],
                marker=marker_of(group, groups),
                markersize=marker_size(group, groups),
                elinewidth=1.0,
                capsize=2,
                **line_of(group, groups),
            )


def _ends(targets: list[int], means: np.ndarray, errors: np.ndarray) -> list[float]:
    """Lowest and highest end of the bars of buckets with at least 1 % of the targets. Those with
    fewer say little, with bars that dwarf the rest."""
    counts = np.array(targets)
    shown = (counts >= 0.01 * counts.sum()) & np.isfinite(means)
    bars = BEYOND * np.nan_to_num(errors)
    ends = np.concatenate([(means - bars)[shown], (means + bars)[shown]])
    return [float(ends.min()), float(ends.max())] if len(ends) else []


def _places(bins: list[Any]) -> np.ndarray:
    """Numbers stand one place apart; a named bin two places after them."""
    return np.array([at + isinstance(name, str) for at, name in enumerate(bins)], dtype=float)


def _bucket_axis(axes: Axes, bins: list[Any], near: int | None) -> None:
    """Labels at powers of two, at most a dozen; the line between near and far."""
    places = _places(bins)
    powers = sum(1 for name in bins if not isinstance(name, str) and name & (name - 1) == 0)
    step = -(-powers // 12)
    ticks, labels = [], []
    for place, name in zip(places.tolist(), bins, strict=True):
        if isinstance(name, str):
            ticks.append(place)
            labels.append(name.replace("_", "\n"))
        elif name & (name - 1) == 0 and (name.bit_length() - 1) % step == 0:
            ticks.append(place)
            labels.append(short_number(name))
    axes.set_xticks(ticks, labels)
    if near is not None:
        _mark_near(axes, bins, near, words=True)


def _mark_near(axes: Axes, bins: list[Any], near: int, words: bool) -> None:
    """A line where far begins."""
    numbers = np.array([name for name in bins if not isinstance(name, str)], dtype=float)
    # Bucket b is drawn from b - 1/2 to b + 1/2, log-spaced inside.
    at = float(np.interp(np.log(near), np.log(numbers), np.arange(len(numbers)) - 0.5))
    axes.axvline(at, color=GUIDE, linewidth=0.8, linestyle=":")
    if words:
        for text, side in (("near ", "right"), (" far", "left")):
            axes.annotate(
                text,
                (at, 0.99),
                xycoords=("data", "axes fraction"),
                ha=side,
                va="top",
                color=GUIDE,
            )


def _numbers(values: list[float | None]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], dtype=float)
