"""Runs asked for their recall with different numbers of samples are compared on those all have.

Sample 7 of a task is the same question however many are asked, so 20 of them are the first 20 of
100: a longer list that begins like a shorter one is cut to it.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lctw_megatron.errors import few
from lctw_megatron.evaluation.recall_result import digest_of, first_samples
from lctw_megatron.report.groups import Group
from lctw_megatron.report.runs import RunRecord

Cells = list[dict[str, Any]]
"""Of one run."""


def with_shared_samples(groups: Sequence[Group]) -> tuple[list[Group], list[str]]:
    """The groups with, of every task, length and depth, only the samples that all runs have which
    were asked the same; and what was left out, a line for each number of samples.

    Files of before, which say of all samples together only which they are, can be what another is
    cut to, but are not cut themselves.
    """
    cells = {run.name: run.recall["cells"] for g in groups for run in g.runs if run.recall}
    while (shorter := _cut_once(cells)) != cells:  # what was cut is what others are cut to
        cells = shorter
    cut: dict[int, list[str]] = {}
    """Samples that were kept -> the runs that have more."""

    def narrowed(run: RunRecord) -> RunRecord:
        if run.recall is None or cells[run.name] == run.recall["cells"]:
            return run
        most = max(len(cell["nats"]) for cell in cells[run.name])
        cut.setdefault(most, []).append(run.name)
        settings = run.recall["settings"] | {"samples": most}
        changed = {"cells": cells[run.name], "settings": settings}
        return replace(run, recall=run.recall | changed)

    kept = [replace(group, runs=tuple(map(narrowed, group.runs))) for group in groups]
    lines = [
        f"Recall is compared on the first {number} samples of each task, length and depth, which "
        f"all have; more were asked of {few(names)}."
        for number, names in sorted(cut.items())
    ]
    return kept, lines


def _cut_once(cells: dict[str, Cells]) -> dict[str, Cells]:
    """Every run's cells, all depths of a task and length alike, cut to the shortest list of
    another that one of them begins with."""
    lengths: dict[Any, dict[str, int]] = {}
    """Task, length and depth -> the digest of a list of samples -> how many they are."""
    for found in cells.values():
        for cell in found:
            place = cell["task"], cell["length"], cell["depth"]
            lengths.setdefault(place, {})[cell["samples_digest"]] = len(cell["nats"])
    return {name: _shorter(found, lengths) for name, found in cells.items()}


def _shorter(cells: Cells, lengths: dict[Any, dict[str, int]]) -> Cells:
    numbers: dict[Any, int] = {}
    for cell in cells:
        digests, place = cell.get("digests") or [], (cell["task"], cell["length"])
        for digest, number in lengths[*place, cell["depth"]].items():
            if number < len(digests) and digest_of(digests[:number]) == digest:
                numbers[place] = min(number, numbers.get(place, number))
    return [
        first_samples(cell, numbers[place])
        if (place := (cell["task"], cell["length"])) in numbers and cell.get("digests")
        else cell
        for cell in cells
    ]
