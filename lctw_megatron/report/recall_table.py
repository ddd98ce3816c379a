"""Recall in numbers, and how runs differ in it."""

from collections.abc import Sequence

from lctw_megatron.evaluation.recall_result import Sums, same_samples, select, show, sums
from lctw_megatron.report.runs import RunRecord
from lctw_megatron.report.table import Rows

KINDS = {"right": "share of answers right", "nats": "nats an answer token"}


def measured_runs(runs: Sequence[RunRecord]) -> list[RunRecord]:
    return [run for run in runs if run.recall is not None]


def tasks_of(runs: Sequence[RunRecord]) -> list[str]:
    """Of all runs, in the order of the first that has them."""
    tasks = (task for run in runs if run.recall for task in run.recall["settings"]["tasks"])
    return list(dict.fromkeys(tasks))


def lengths_of(runs: Sequence[RunRecord]) -> list[int]:
    known = (length for run in runs if run.recall for length in run.recall["settings"]["lengths"])
    return sorted(set(known))


def recall_tables(runs: Sequence[RunRecord]) -> list[Rows]:
    """Share right and nats of every task and run, a column a length, with standard errors over
    samples; then what further runs differ from the first by, on the same samples."""
    measured = measured_runs(runs)
    if not measured:
        return []
    lengths, tables = lengths_of(measured), []
    for kind, name in KINDS.items():
        rows = [[f"recall, {name}", *(f"{length:,}" for length in lengths)]]
        for task in tasks_of(measured):
            for run in measured:
                found = [recall_sums(run, task, length, kind) for length in lengths]
                if any(found):
                    values = ["-" if x is None else show(x.mean()) for x in found]
                    rows.append([f"{task}: {run.name}", *values])
            rows += [_difference_row(run, measured[0], task, lengths, kind) for run in measured[1:]]
        tables.append(rows)
    return tables


def _difference_row(
    run: RunRecord, first: RunRecord, task: str, lengths: Sequence[int], kind: str
) -> list[str]:
    row = [f"{task}: {run.name} - {first.name}"]
    assert run.recall and first.recall
    for length in lengths:
        pair = [select(each.recall, task, length) for each in (run, first) if each.recall]
        ours, theirs = (recall_sums(each, task, length, kind) for each in (run, first))
        if ours and theirs and same_samples(*pair):
            row.append(show(ours.minus(theirs), "+"))
        else:
            row.append("other samples" if ours and theirs else "-")
    return row


def recall_lines(runs: Sequence[RunRecord]) -> list[str]:
    """What the tables and figures need to be read rightly."""
    lines = []
    for run in measured_runs(runs)[:1]:
        assert run.recall
        settings = run.recall["settings"]
        lines.append(
            f"Recall: {settings['samples']} samples of each task, length and depth in "
            f"{settings['haystack']}, teacher-forced; ± is the standard error over samples, of a "
            f"difference that of the same samples. Dotted and hollow: with the last "
            f"{settings['window']:,} tokens of the context only."
        )
    return lines


def recall_sums(run: RunRecord, task: str, length: int, kind: str) -> Sums | None:
    """Of one kind of value, all depths together; None if the run has none."""
    return sums(select(run.recall or {"cells": []}, task, length), kind)
