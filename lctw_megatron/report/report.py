"""Runs side by side: figures as PNG, one HTML page with all of them, and a table of plain text."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lctw_megatron.atomic import atomic_file
from lctw_megatron.report.coloured_text import legend_html, scale_for, to_html
from lctw_megatron.report.curve_plots import (
    difference_curves,
    loss_curves,
    recall_curves,
    weight_curves,
)
from lctw_megatron.report.page import Section, render_page
from lctw_megatron.report.plot_style import write_png
from lctw_megatron.report.probe_plots import (
    gain_by_distance,
    loss_by_distance,
    loss_by_position,
)
from lctw_megatron.report.recall_plots import recall_by_depth, recall_by_length
from lctw_megatron.report.recall_table import recall_lines, recall_tables
from lctw_megatron.report.runs import RunRecord, read_runs
from lctw_megatron.report.table import explain, further_table, loss_table, to_markdown, to_text
from lctw_megatron.report.weight_plots import text_page, weight_histogram

Figures = tuple[tuple[str, str, Callable[[Sequence[RunRecord]], Figure | None]], ...]

RESULTS: Figures = (
    ("recall_by_length", "Recall by length", recall_by_length),
    ("recall_by_depth", "Recall by depth", recall_by_depth),
    ("loss_by_position", "Held-out loss by position", loss_by_position),
    ("loss_by_distance", "Held-out loss by distance of the last occurrence", loss_by_distance),
    ("gain_by_distance", "Gain from long context", gain_by_distance),
    ("weight_histogram", "The weights", weight_histogram),
)
"""File name, heading, and the function that draws it or finds nothing to draw."""

TRAINING: Figures = (
    ("recall_curves", "Recall during training", recall_curves),
    ("loss_curves", "Losses during training", loss_curves),
    ("difference_curves", "Losses during training, difference to the first run", difference_curves),
    ("weight_curves", "The weights during training", weight_curves),
)
"""Likewise; these stand last."""


def write_report(
    folders: list[str], output: str | Path | None, note: str | None, markdown: bool = False
) -> str:
    """Write the report of the runs in ``folders``; the text for the terminal.

    output: default: `report` beside the first run's folder. markdown: tables as Markdown. The HTML
    file comes last, so that a report that is there is complete. Raises InputError.
    """
    runs = read_runs(folders)
    folder = Path(output) if output else Path(folders[0]).resolve().parent / "report"
    found = [*recall_tables(runs), loss_table(runs), further_table(runs)]
    tables = [table for table in found if len(table) > 1 and len(table[0]) > 1]
    lines = [*recall_lines(runs), *explain(runs)]
    sections = [Section("Results", tables=tables, lines=lines)]
    sections += _drawn(RESULTS, runs, folder)
    for run in runs:
        if run.weights:
            sections.append(_text_section(run, run.weights, folder))
    sections += _drawn(TRAINING, runs, folder)
    page = folder / "report.html"
    title = f"Report: {', '.join(run.name for run in runs)}"
    with atomic_file(page, "w") as file:
        file.write(render_page(title, sections, note))
    write = to_markdown if markdown else to_text
    text = [*(write(table) + "\n" for table in tables), *lines]
    text += _without_weights(runs)
    text += ["", note] if note else []
    return "\n".join([*text, "", f"report: {page}"])


def _drawn(figures: Figures, runs: Sequence[RunRecord], folder: Path) -> list[Section]:
    """A section for each figure that has something to show."""
    drawn = [(name, title, draw(runs)) for name, title, draw in figures]
    return [
        Section(title, png=write_png(folder / f"{name}.png", figure))
        for name, title, figure in drawn
        if figure is not None
    ]


def _text_section(run: RunRecord, sample: dict[str, Any], folder: Path) -> Section:
    """A page of text coloured by the run's weights, in HTML, and as a PNG beside it."""
    page = sample["page"]
    scheme = sample["weighting"]["scheme"]
    name = run.name if run.name == scheme else f"{run.name} ({scheme})"
    title = f"Text coloured by weight: {name}"
    weights = np.array(page["weight"], dtype=float)
    scale = scale_for(weights, signed=False)
    picture = text_page(page["text"], weights, scale, title)
    write_png(folder / f"text_{run.name.replace('/', '_')}.png", picture)
    titles = [
        f"weight {weight:g}, long loss {_nats(long)}, short loss {_nats(short)}"
        for weight, long, short in zip(
            page["weight"], page["long_loss"], page["short_loss"], strict=True
        )
    ]
    text = to_html(page["text"], weights, scale, titles)
    place = (
        f"The last {len(weights)} targets of a training sequence, from token "
        f"{page['first_target']:,} of document {page['document']} of {page['data']}."
    )
    body = f'{legend_html(scale, "weight")}\n<div class="tokens">{text}</div>'
    return Section(title, lines=[place, *_shares(run, sample)], body=body)


def _shares(run: RunRecord, sample: dict[str, Any]) -> list[str]:
    """Where the weight goes, in one line."""
    classes = sample["classes"]
    targets, weight = np.array(classes["targets"], float), np.array(classes["weight"], float)
    if not (targets.sum() and weight.sum()):
        return []
    parts = [
        f"{name.replace('_', '-')} targets are {100 * a:.0f} % and carry {100 * b:.0f} %"
        for name, a, b in zip(
            classes["bins"], targets / targets.sum(), weight / weight.sum(), strict=True
        )
    ]
    return [f"Of the weight of {sample['sequences']} sequences: {'; '.join(parts)}."]


def _without_weights(runs: Sequence[RunRecord]) -> list[str]:
    reasons = [(run.name, (run.evaluation or {}).get("weights")) for run in runs]
    return [f"{name}: no weights shown: {why}" for name, why in reasons if isinstance(why, str)]


def _nats(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"
