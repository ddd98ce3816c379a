"""Recall by length and by depth."""

from collections.abc import Sequence
from itertools import product

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lctw_megatron.errors import few
from lctw_megatron.evaluation.buckets import Estimate
from lctw_megatron.evaluation.recall_result import select
from lctw_megatron.report import measures
from lctw_megatron.report.estimate import BEYOND, difference, level
from lctw_megatron.report.groups import Group
from lctw_megatron.report.plot_style import (
    legend,
    line_of,
    marker_of,
    marker_size,
    new_figure,
    shift_of,
)
from lctw_megatron.report.recall_table import KINDS
from lctw_megatron.report.table import short_number

_COLUMNS = 4
_FEW = 3
"""With more groups only the first one's short context is drawn, and only the share right: it says
of a task how far back its facts are, and its nats would leave no room to tell the groups apart."""


def recall_difference(groups: Sequence[Group]) -> Figure | None:
    """What groups differ from the first by, over the length, in the mean over the tasks that all
    have; None where nothing is to compare."""
    measured = [group for group in groups if measures.has_recall(group)]
    others = measured[1:]
    if not others or measured[0] is not groups[0]:
        return None
    tasks, lengths = measures.shared_tasks(measured), measures.lengths_of(measured)
    with new_figure(10, 4.6) as figure:
        panels = figure.subplots(1, 2)
        for panel, (kind, name) in zip(panels, KINDS.items(), strict=True):
            panel.axhline(0, **line_of(groups[0], groups))
            for part in _trained_first(others):
                for group in part:
                    pairs = ([measures.recall(g, tasks, n, kind) for g in (group, groups[0])]
                             for n in lengths)  # fmt: skip
                    found = [difference(*pair) for pair in pairs]
                    _line(panel, found, group, groups, "-", BEYOND)
                panel.set_ylim(panel.get_ylim())
            _length_axis(panel, lengths)
            better = "below" if kind == "nats" else "above"
            panel.set_title(f"{name} ({better} 0: better)")
        figure.supxlabel(_text_axis(others), fontsize="medium")
        figure.supylabel(f"difference to {groups[0].name},\n±{BEYOND:g} standard errors",
                         fontsize="medium")  # fmt: skip
        legend(figure, measured, groups)
        return figure


def recall_by_length(groups: Sequence[Group]) -> Figure | None:
    """Share right and nats of every task over the length; None if no run was measured."""
    measured = [group for group in groups if measures.has_recall(group)]
    if not measured:
        return None
    tasks, lengths = measures.tasks_of(measured), measures.lengths_of(measured)
    columns = min(len(tasks), _COLUMNS)
    blocks = -(-len(tasks) // columns)
    with new_figure(max(8, 3 * columns), 0.8 + 4.6 * blocks) as figure:
        axes = figure.subplots(2 * blocks, columns, squeeze=False, sharex=True, sharey="row")
        for part in _trained_first(measured):
            for place, task in enumerate(tasks):
                block, column = divmod(place, columns)
                for row, kind in enumerate(KINDS):
                    panel = axes[2 * block + row][column]
                    for group, (of, look) in product(part, ((kind, "-"), (f"short_{kind}", ":"))):
                        many = look == ":" and len(measured) > _FEW
                        if many and (group is not measured[0] or kind == "nats"):
                            continue
                        found = [measures.recall(group, [task], n, of) for n in lengths]
                        levels = [None if x is None else level(x) for x in found]
                        _line(panel, levels, group, groups, look, 1.0)
                    _length_axis(panel, lengths)
                    panel.tick_params(labelbottom=True)
                    if row == 0:
                        panel.set_title(task)
                        panel.set_ylim(-0.05, 1.05)
                    if column == 0:
                        panel.set_ylabel(KINDS[kind])
            for panel in axes[:, 0]:
                panel.set_ylim(panel.get_ylim())
        for place in range(len(tasks), blocks * columns):
            for row in (0, 1):
                axes[2 * (place // columns) + row][place % columns].set_axis_off()
        figure.supxlabel(_text_axis(measured), fontsize="medium")
        legend(figure, measured, groups)
        return figure


def recall_by_depth(groups: Sequence[Group]) -> Figure | None:
    """Share right, a map of depth and length for each task and group; None if there is no depth."""
    measured = [group for group in groups if measures.has_recall(group)]
    tasks = [
        task
        for task in measures.tasks_of(measured)
        if any(
            cell["depth"] is not None
            for group in measured
            for run in group.runs
            for cell in select(run.recall or {"cells": []}, task)
        )
    ]
    if not tasks:
        return None
    lengths = measures.lengths_of(measured)
    depths = sorted({d for g in measured for r in g.runs for d in _depths(r.recall)})
    height = 0.45 + 0.3 * len(depths)
    with new_figure(max(8, 0.8 + 2.4 * len(tasks)), 0.8 + height * len(measured)) as figure:
        panels = figure.subplots(len(measured), len(tasks), squeeze=False, sharex=True, sharey=True)
        for row, group in enumerate(measured):
            for column, task in enumerate(tasks):
                panel = panels[row][column]
                panel.grid(False)
                shares = _depth_map(group, task, lengths, depths)
                image = panel.imshow(shares, vmin=0, vmax=1, cmap="viridis", aspect="auto")
                for (y, x), share in np.ndenumerate(shares):
                    if np.isfinite(share):
                        colour = "black" if share > 0.6 else "white"
                        panel.text(x, y, f"{share:.2f}", ha="center", va="center", color=colour,
                                   fontsize="small")  # fmt: skip
                panel.set_xticks(range(len(lengths)), [short_number(n) for n in lengths])
                panel.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
                if row == 0:
                    panel.set_title(task)
                if column == 0:
                    panel.set_ylabel(group.name, rotation=0, ha="right", va="center")
        figure.supxlabel("tokens of the text", fontsize="medium")
        figure.supylabel("depth of the fact: 0 is the beginning", fontsize="medium")
        figure.colorbar(
            image, ax=panels, label="share of answers right", shrink=min(0.8, 3 / len(measured))
        )
        return figure


def _trained_first(groups: Sequence[Group]) -> tuple[list[Group], list[Group]]:
    """Groups that were trained, whose values a panel is made for, then those of which only results
    are known: beyond its length a base model loses so much that no difference could be seen."""
    trained = [group for group in groups if any(run.metrics for run in group.runs)] or [*groups]
    return trained, [group for group in groups if group not in trained]


def _text_axis(groups: Sequence[Group]) -> str:
    outside = few([group.name for group in _trained_first(groups)[1]])
    return "tokens of the text" + (f" (panels are made for all but {outside})" if outside else "")


def _depths(recall: dict | None) -> list[float]:
    cells = recall["cells"] if recall else []
    return [cell["depth"] for cell in cells if cell["depth"] is not None]


def _depth_map(
    group: Group, task: str, lengths: Sequence[int], depths: Sequence[float]
) -> np.ndarray:
    """Share right [depths, lengths] in the mean over the group's runs; NaN where not measured."""
    found: dict[tuple[int, int], list[float]] = {}
    for run in group.runs:
        for cell in select(run.recall or {"cells": []}, task):
            if cell["depth"] is not None:
                place = depths.index(cell["depth"]), lengths.index(cell["length"])
                found.setdefault(place, []).append(np.mean(cell["right"]))
    shares = np.full((len(depths), len(lengths)), np.nan)
    for place, values in found.items():
        shares[place] = np.mean(values)
    return shares


def _line(
    axes: Axes,
    found: Sequence[Estimate | None],
    group: Group,
    groups: Sequence[Group],
    look: str,
    errors: float,
) -> None:
    """A group's values over the lengths with bars of so many standard ``errors``."""
    axes.errorbar(
        np.arange(len(found)) + 0.3 * shift_of(group, groups),
        [np.nan if x is None else x.mean for x in found],
        yerr=[np.nan if x is None else errors * (x.error or 0.0) for x in found],
        marker=marker_of(group, groups),
        markerfacecolor=None if look == "-" else "white",
        markersize=marker_size(group, groups),
        elinewidth=1.0,
        capsize=2,
        **line_of(group, groups) | ({} if look == "-" else {"linestyle": look}),
    )


def _length_axis(axes: Axes, lengths: Sequence[int]) -> None:
    axes.set_xticks(range(len(lengths)), [short_number(n) for n in lengths])
