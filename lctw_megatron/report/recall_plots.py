"""Recall by length and by depth."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from lctw_megatron.evaluation.recall_result import select
from lctw_megatron.report.plot_style import (
    legend,
    line_of,
    marker_of,
    marker_size,
    new_figure,
    number_of,
)
from lctw_megatron.report.probe_plots import short_number
from lctw_megatron.report.recall_table import (
    KINDS,
    lengths_of,
    measured_runs,
    recall_sums,
    tasks_of,
)
from lctw_megatron.report.runs import RunRecord

_COLUMNS = 4


def recall_by_length(runs: Sequence[RunRecord]) -> Figure | None:
    """Share right and nats of every task over the length; None if no run was measured."""
    measured = measured_runs(runs)
    if not measured:
        return None
    tasks, lengths = tasks_of(measured), lengths_of(measured)
    columns = min(len(tasks), _COLUMNS)
    blocks = -(-len(tasks) // columns)
    with new_figure(max(8, 3 * columns), 0.6 + 4.6 * blocks) as figure:
        axes = figure.subplots(2 * blocks, columns, squeeze=False, sharex=True, sharey="row")
        for place, task in enumerate(tasks):
            block, column = divmod(place, columns)
            for row, kind in enumerate(KINDS):
                panel = axes[2 * block + row][column]
                for run in measured:
                    for of, look in ((kind, "-"), (f"short_{kind}", ":")):
                        found = [recall_sums(run, task, length, of) for length in lengths]
                        means = [None if x is None else x.mean() for x in found]
                        panel.errorbar(
                            np.arange(len(lengths)) + 0.05 * (number_of(run, runs) % 5),
                            [np.nan if x is None else x.mean for x in means],
                            yerr=[np.nan if x is None else x.error or 0.0 for x in means],
                            linestyle=look,
                            marker=marker_of(run, runs),
                            markerfacecolor=None if look == "-" else "white",
                            markersize=marker_size(run, runs),
                            elinewidth=1.0,
                            capsize=2,
                            **line_of(run, runs),
                        )
                panel.set_xticks(range(len(lengths)), [short_number(n) for n in lengths])
                panel.tick_params(labelbottom=True)
                if row == 0:
                    panel.set_title(task)
                    panel.set_ylim(-0.05, 1.05)
                if column == 0:
                    panel.set_ylabel(KINDS[kind])
        for place in range(len(tasks), blocks * columns):
            for row in (0, 1):
                axes[2 * (place // columns) + row][place % columns].set_axis_off()
        figure.supxlabel("tokens of the text", fontsize="medium")
        legend(figure, measured, runs)
        return figure


def recall_by_depth(runs: Sequence[RunRecord]) -> Figure | None:
    """Share right, a map of depth and length for each task and run; None if there is no depth."""
    measured = measured_runs(runs)
    tasks = [
        task
        for task in (tasks_of(measured) if measured else [])
        if any(c["depth"] is not None for run in measured for c in select(run.recall or {}, task))
    ]
    if not tasks:
        return None
    with new_figure(max(8, 0.8 + 2.4 * len(tasks)), 0.6 + 2.4 * len(measured)) as figure:
        panels = figure.subplots(len(measured), len(tasks), squeeze=False)
        for row, run in enumerate(measured):
            assert run.recall
            settings = run.recall["settings"]
            lengths, depths = settings["lengths"], settings["depths"]
            for column, task in enumerate(tasks):
                panel = panels[row][column]
                panel.grid(False)
                shares = np.full((len(depths), len(lengths)), np.nan)
                for cell in select(run.recall, task):
                    if cell["depth"] is not None:
                        place = depths.index(cell["depth"]), lengths.index(cell["length"])
                        shares[place] = cell["mean"]["right"][0]
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
                    panel.set_ylabel(f"{run.name}\ndepth of the fact")
        figure.supxlabel("tokens of the text", fontsize="medium")
        figure.colorbar(image, ax=panels, label="share of answers right", shrink=0.8)
        return figure
