"""Held-out losses by position and by distance, and how runs differ there."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lctw_megatron.report.plot_style import (
    GUIDE,
    legend,
    line_of,
    marker_of,
    marker_size,
    new_figure,
    number_of,
)
from lctw_megatron.report.runs import RunRecord, comparable, differences

POSITION = (
    "context: tokens of the sequence before the target (log buckets, labelled by their start)"
)
DISTANCE = (
    "last occurrence of the target's token, tokens back (log buckets, labelled by their start)"
)


def loss_by_position(runs: Sequence[RunRecord]) -> Figure | None:
    """Held-out loss by the context a target has; None if no run was evaluated."""
    return _by_bucket(runs, "position", POSITION)


def loss_by_distance(runs: Sequence[RunRecord]) -> Figure | None:
    """Held-out loss by how far back the target's token last stood; None likewise."""
    return _by_bucket(runs, "distance", DISTANCE)


def gain_by_distance(runs: Sequence[RunRecord]) -> Figure | None:
    """What the context beyond the window is worth to each model; None if not measured."""
    measured = [run for run in runs if run.evaluation and "gain" in run.evaluation["distance"]]
    if not measured or measured[0].evaluation is None:
        return None
    settings = measured[0].evaluation["settings"]
    with new_figure(8, 3.9) as figure:
        axes = figure.add_subplot()
        axes.axhline(0, color=GUIDE, linewidth=0.8)
        for run in measured:
            assert run.evaluation
            group = run.evaluation["distance"]
            _line(axes, group["bins"], _numbers(group["gain"]), run, runs)
        _bucket_axis(axes, measured[0].evaluation["distance"]["bins"], settings["near"])
        axes.set_title(f"gain: loss with the last {settings['window']} tokens only − loss with all")
        axes.set_xlabel(DISTANCE)
        axes.set_ylabel("nats a target")
        legend(figure, measured, runs)
        return figure


def _by_bucket(runs: Sequence[RunRecord], group: str, label: str) -> Figure | None:
    evaluated = [run for run in runs if run.evaluation is not None]
    if not evaluated or evaluated[0].evaluation is None:
        return None
    first, measured = evaluated[0], evaluated[0].evaluation
    settings, bins, targets = (
        measured["settings"],
        measured[group]["bins"],
        measured[group]["targets"],
    )
    others = [run for run in evaluated[1:] if comparable(run, first)]
    with new_figure(8, 6.6 if others else 3.9) as figure:
        ratios = [3, 2] if others else [1]
        grid = figure.add_gridspec(len(ratios), 1, height_ratios=ratios)
        above = axes = figure.add_subplot(grid[0])
        for run in [first, *others]:
            assert run.evaluation
            _line(above, bins, _numbers(run.evaluation[group]["loss"]), run, runs)
        above.set_ylabel("nats a target")
        above.set_title("held-out loss")
        if others:
            axes = figure.add_subplot(grid[1], sharex=above)
            above.tick_params(labelbottom=False)
            axes.axhline(0, **line_of(first, runs))
            reach = 1e-6
            for run in others:
                found = differences(run, first, group)
                means = np.array([np.nan if d is None else d.mean for d in found])
                errors = np.array([np.nan if d is None else d.error or np.nan for d in found])
                _line(axes, bins, means, run, runs, 2 * errors)
                reach = max(reach, _reach(targets, means, errors))
            axes.set_ylim(-reach, reach)
            axes.set_ylabel("nats a target")
            axes.set_title(f"difference to {first.name}, ±2 standard errors (below 0: better)")
        near = settings["near"] if group == "distance" else None
        _bucket_axis(axes, bins, near)
        if others and near is not None:
            _mark_near(above, bins, near, words=False)
        axes.set_xlabel(label)
        legend(figure, [first, *others], runs)
        return figure


def _line(
    axes: Axes,
    bins: list[Any],
    values: np.ndarray,
    run: RunRecord,
    runs: Sequence[RunRecord],
    errors: np.ndarray | None = None,
) -> None:
    """One run's values over the buckets; a bin that is no number (first seen) stands apart."""
    places = _places(bins)
    named = np.array([isinstance(name, str) for name in bins])
    # Side by side within a bucket, so that error bars do not hide each other.
    shift = 0.0 if errors is None else 0.12 * (number_of(run, runs) % 5 - 1.5)
    for part in (~named, named):
        if np.isfinite(values[part]).any():
            axes.errorbar(
                places[part] + shift,
                values[part],
                yerr=None if errors is None else errors[part],
                marker=marker_of(run, runs),
                markersize=marker_size(run, runs),
                elinewidth=1.0,
                capsize=2,
                **line_of(run, runs),
            )


def _reach(targets: list[int], means: np.ndarray, errors: np.ndarray) -> float:
    """How far from 0 the bars go of buckets with at least 1 % of the targets. Those with fewer say
    little, with bars that dwarf the rest."""
    counts = np.array(targets)
    ends = np.abs(means) + 2.2 * np.nan_to_num(errors)
    shown = ends[(counts >= 0.01 * counts.sum()) & np.isfinite(ends)]
    return float(shown.max()) if len(shown) else 0.0


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


def short_number(number: int) -> str:
    """1024 -> 1k, 1048576 -> 1M."""
    for size, letter in ((1 << 20, "M"), (1 << 10, "k")):
        if number >= size:
            return f"{number / size:g}{letter}"
    return str(number)


def _numbers(values: list[float | None]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], dtype=float)
