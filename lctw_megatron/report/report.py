"""Runs side by side: figures as PNG, one HTML page with all of them, and tables of plain text.

Results come first: is it better, where, and what does it cost; then each part of it; how training
went is last. Runs that differ only in their seed are one line.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lctw_megatron.atomic import atomic_file
from lctw_megatron.data.earlier_output import check_earlier_mark
from lctw_megatron.errors import few
from lctw_megatron.report import plot_style
from lctw_megatron.report.benchmarks import benchmark_lines, benchmark_table
from lctw_megatron.report.coloured_text import legend_html, scale_for, to_html
from lctw_megatron.report.comparisons import judge, overview_table, reading_lines, verdict_lines
from lctw_megatron.report.cost import cost_table
from lctw_megatron.report.curve_plots import (
    difference_curves,
    difference_lines,
    loss_curves,
    recall_curves,
    weight_curves,
)
from lctw_megatron.report.groups import Group, group_runs
from lctw_megatron.report.left_out import left_out
from lctw_megatron.report.page import MARK, Section, render_page
from lctw_megatron.report.plot_style import write_png
from lctw_megatron.report.probe_plots import (
    gain_by_distance,
    loss_by_distance,
    loss_by_position,
)
from lctw_megatron.report.recall_plots import (
    recall_by_depth,
    recall_by_length,
    recall_difference,
)
from lctw_megatron.report.recall_table import recall_lines, recall_tables
from lctw_megatron.report.result_tables import (
    explain,
    loss_table,
    only_measured,
    run_table,
    unfinished,
    weight_table,
)
from lctw_megatron.report.runs import RunRecord, read_runs
from lctw_megatron.report.shared_recall import with_shared_depths
from lctw_megatron.report.shared_samples import with_shared_samples
from lctw_megatron.report.table import Rows, to_markdown, to_text
from lctw_megatron.report.weight_plots import text_page, weight_histogram

Figures = tuple[tuple[str, str, Callable[[Sequence[Group]], Figure | None]], ...]

RECALL: Figures = (
    ("recall_difference", "Recall: what differs", recall_difference),
    ("recall_by_length", "Recall by length", recall_by_length),
    ("recall_by_depth", "Recall by depth", recall_by_depth),
)
"""File name, heading, and the function that draws it or finds nothing to draw."""

LOSSES: Figures = (
    ("loss_by_position", "Held-out loss by position", loss_by_position),
    ("loss_by_distance", "Held-out loss by distance of the last occurrence", loss_by_distance),
    ("gain_by_distance", "Gain from long context", gain_by_distance),
    (
        "weight_histogram",
        "The weights",
        lambda groups: weight_histogram([group.example for group in groups]),
    ),
)

TRAINING: Figures = (
    ("recall_curves", "Recall during training", recall_curves),
    ("loss_curves", "Losses during training", loss_curves),
    ("difference_curves", "Losses during training, difference to the first", difference_curves),
    ("weight_curves", "The weights during training", weight_curves),
)
"""These stand last."""

PAGE = "report.html"
FEW = 3
"""With more groups what is long opens on a click."""


def write_report(
    folders: list[str],
    output: str | Path | None,
    note: str | None,
    markdown: bool = False,
    baseline: str | None = None,
) -> str:
    """Write the report of the runs in ``folders``; the text for the terminal.

    output: default: `report` beside the first run's folder. markdown: tables as Markdown. baseline:
    the run to compare with, and others of its group; default: the first. The HTML file comes last,
    so that a report that is there is complete. Raises InputError, also for a file under one of the
    report's names that no report wrote. Pictures under these names that this one has not are
    removed: they are of a report before.
    """
    runs, first = read_runs(folders, baseline)
    groups, fewer = with_shared_samples(group_runs(runs, first))
    groups, unshared = with_shared_depths(groups)
    folder = Path(output) if output else Path(folders[0]).resolve().parent / "report"
    _check_names(groups, folder)
    sections = [
        _results(groups, [*unfinished(runs), *fewer, *unshared, *left_out(groups)]),
        *_drawn(RECALL, groups, folder),
        Section("Benchmarks", tables=[benchmark_table(groups)], lines=benchmark_lines(groups)),
        Section("Held-out loss", tables=[loss_table(groups)], lines=explain(runs)),
        *_drawn(LOSSES, groups, folder),
        *_weights(groups, folder),
        Section("What training took", tables=[cost_table(groups)]),
        Section(
            "Recall, task by task",
            tables=recall_tables(groups),
            lines=recall_lines(groups),
            folded="show the tables" if len(groups) > FEW else "",
        ),
        Section("The runs", tables=[run_table(runs)], lines=only_measured(runs)),
        *_drawn(TRAINING, groups, folder),
    ]
    sections = [part for part in map(_without_empty_tables, sections) if _is_something(part)]
    page = folder / PAGE
    title = _title(groups)
    with atomic_file(page, "w") as file:
        file.write(render_page(title, sections, note))
    text = _text(sections, to_markdown if markdown else to_text)
    ends = [*_without_weights(runs), *([note] if note else []), f"report: {page}"]
    return "\n\n".join([*text, *ends])


def _check_names(groups: Sequence[Group], folder: Path) -> None:
    """InputError before anything is written, unless what has one of a report's names is of one."""
    check_earlier_mark("--output", folder / PAGE, "report", MARK)
    drawn = [folder / f"{name}.png" for name, *_ in (*RECALL, *LOSSES, *TRAINING)]
    for path in [*drawn, *(_text_png(folder, group.example) for group in groups)]:
        check_earlier_mark("--output", path, "picture of a report", plot_style.MARK)


def _text_png(folder: Path, run: RunRecord) -> Path:
    return folder / f"text_{run.name.replace('/', '_')}.png"


def _remove(path: Path) -> None:
    """A picture of an earlier report that would be taken for one of this."""
    if path.is_file():
        path.unlink()


def _text(sections: Sequence[Section], write: Callable[[Rows], str]) -> list[str]:
    """Tables and what explains them, paragraph by paragraph, without figures and coloured text."""
    text = []
    for section in sections:
        if section.tables or (section.lines and not section.body):
            text += [f"## {section.title}"]
            text += ["\n".join(section.lead)] if section.lead else []
            text += map(write, section.tables)
            text += ["\n".join(section.lines)] if section.lines else []
    return text


def _title(groups: Sequence[Group]) -> str:
    first, others = groups[0].name, [group.name for group in groups[1:]]
    return f"{few(others, most=12)} against {first}" if others else f"Report: {first}"


def _results(groups: Sequence[Group], exceptions: Sequence[str]) -> Section:
    if len(groups) == 1:
        return Section("Results", lines=exceptions)
    judged = judge(groups)
    return Section(
        "Results",
        lead=verdict_lines(groups[0], judged),
        tables=[overview_table(groups)],
        lines=[*exceptions, *reading_lines(groups, judged)],
    )


def _weights(groups: Sequence[Group], folder: Path) -> list[Section]:
    """The statistics, and a page of text of each group that has weights; folded if several."""
    shown = [(group.example, group.example.weights) for group in groups]
    for run, found in shown:
        if not (found and found["page"]):
            _remove(_text_png(folder, run))
    texts = [_text_section(run, found, folder) for run, found in shown if found and found["page"]]
    if len(texts) > 1:
        texts = [replace(text, folded="show the text") for text in texts]
    return [Section("The weights in numbers", tables=[weight_table(groups)]), *texts]


def _without_empty_tables(section: Section) -> Section:
    """Without tables that have only a heading."""
    tables = [table for table in section.tables if len(table) > 1 and len(table[0]) > 1]
    return replace(section, tables=tables)


def _is_something(section: Section) -> bool:
    return bool(section.lead or section.tables or section.png or section.lines or section.body)


def _drawn(figures: Figures, groups: Sequence[Group], folder: Path) -> list[Section]:
    """A section for each figure that has something to show, or of which something is to be said."""
    sections = []
    for name, title, draw in figures:
        figure, path = draw(groups), folder / f"{name}.png"
        png = None if figure is None else write_png(path, figure)
        if png is None:
            _remove(path)
        lines = difference_lines(groups) if draw is difference_curves else []
        if png or lines:
            sections.append(Section(title, png=png, lines=lines))
    return sections


def _text_section(run: RunRecord, sample: dict[str, Any], folder: Path) -> Section:
    """A page of text coloured by the run's weights, in HTML, and as a PNG beside it."""
    page = sample["page"]
    scheme = sample["weighting"]["scheme"]
    name = run.name if run.name == scheme else f"{run.name} ({scheme})"
    title = f"Text coloured by weight: {name}"
    weights = np.array(page["weight"], dtype=float)
    scale = scale_for(weights, signed=False)
    picture = text_page(page["text"], weights, scale, title)
    write_png(_text_png(folder, run), picture)
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
    return Section(title, lines=[place, *_weight_shares(sample)], body=body)


def _weight_shares(sample: dict[str, Any]) -> list[str]:
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
