"""Runs asked for their recall with different numbers of samples are compared on those all have.

Sample 7 of a task is the same question however many are asked, so 20 of them are the first 20 of
100: a longer list that begins like a shorter one is cut to it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from lctw_megatron.errors import few
from lctw_megatron.evaluation.recall_result import digest_of, first_samples
from lctw_megatron.report.groups import Group
from lctw_megatron.report.runs import RunRecord


def with_shared_samples(groups: Sequence[Group]) -> tuple[list[Group], list[str]]:
    """The groups with, of every task, length and depth, only the samples that all runs have which
    were asked the same; and what was left out, a line for each number of samples.

    Files of before, which say of all samples together only which they are, can be what another is
    cut to, but are not cut themselves.
    """
    runs = [run for group in groups for run in group.runs if run.recall]
    shortest: dict[Any, dict[str, int]] = {}
    """Where -> the digest of a cell's samples -> how many they are."""
    for run in runs:
        for cell in _cells(run):
            shortest.setdefault(_place(cell), {})[cell["samples_digest"]] = len(cell["nats"])
    cut: dict[int, list[str]] = {}
    """Samples that were kept -> the runs that have more."""
    narrowed: dict[str, RunRecord] = {}
    for run in runs:
        assert run.recall
        cells = [_cut(cell, shortest[_place(cell)]) for cell in _cells(run)]
        most = max((len(cell["nats"]) for cell in cells), default=0)
        if cells != _cells(run):
            cut.setdefault(most, []).append(run.name)
            settings = run.recall["settings"] | {"samples": most}
            changed = run.recall | {"cells": cells, "settings": settings}
            narrowed[run.name] = replace(run, recall=changed)
    lines = [
        f"Recall is compared on the first {number} samples of each task, length and depth, which "
        f"all have; more were asked of {few(names)}."
        for number, names in sorted(cut.items())
    ]
    kept = [
        replace(group, runs=tuple(narrowed.get(run.name, run) for run in group.runs))
        for group in groups
    ]
    return kept, lines


def _cells(run: RunRecord) -> list[dict[str, Any]]:
    return run.recall["cells"] if run.recall else []


def _place(cell: dict[str, Any]) -> tuple[Any, ...]:
    return cell["task"], cell["length"], cell["depth"]


def _cut(cell: dict[str, Any], others: dict[str, int]) -> dict[str, Any]:
    """To the shortest of ``others`` that its samples begin with."""
    digests = cell.get("digests") or []
    fitting: Iterable[int] = (
        count
        for digest, count in others.items()
        if count < len(digests) and digest_of(digests[:count]) == digest
    )
    number = min(fitting, default=None)
    return cell if number is None else first_samples(cell, number)
