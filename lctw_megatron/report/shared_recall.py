"""Runs asked for their recall at different depths are compared at those that all were asked at.

A mean over five depths is no other's over three. Lengths need no such care, as each stands apart,
and tasks little: only those that all runs have are averaged.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lctw_megatron.errors import few
from lctw_megatron.report.groups import Group
from lctw_megatron.report.measures import shared_tasks, tasks_of
from lctw_megatron.report.runs import RunRecord
from lctw_megatron.report.table import short_number

_Cells = dict[tuple[str, int], dict[Any, str]]
"""Task and length -> depth -> the identity of its samples."""

_Lacking = dict[Any, dict[tuple[str, int], set[str]]]
"""A depth that not all have -> task and length -> the runs that lack it there."""


def with_shared_depths(groups: Sequence[Group]) -> tuple[list[Group], list[str]]:
    """The groups with, of every task and length, only the depths that all runs have which were
    asked the same; and what the means are without, a line each.

    A run that shares no samples with those before it narrows nothing and stays whole: it is not
    compared with them anyway.
    """
    cells = {run.name: _cells(run) for group in groups for run in group.runs if run.recall}
    shared: _Cells = {}
    for places in cells.values():
        for place, found in places.items():
            common = dict(shared.setdefault(place, found).items() & found.items())
            shared[place] = common or shared[place]
    without: _Lacking = {}
    for place, kept in shared.items():
        alike = {name: found[place] for name, found in cells.items() if place in found}
        alike = {name: found for name, found in alike.items() if kept.items() <= found.items()}
        for depth in {depth for found in alike.values() for depth in found} - kept.keys():
            lacking = {name for name, found in alike.items() if depth not in found}
            without.setdefault(depth, {})[place] = lacking
    narrowed = [
        replace(group, runs=tuple(_narrowed(run, shared) for run in group.runs)) for group in groups
    ]
    return narrowed, [*_depth_lines(without, shared), *_task_lines(groups)]


def _cells(run: RunRecord) -> _Cells:
    found: _Cells = {}
    for cell in (run.recall or {"cells": []})["cells"]:
        place = cell["task"], cell["length"]
        found.setdefault(place, {})[cell["depth"]] = cell["samples_digest"]
    return found


def _narrowed(run: RunRecord, shared: _Cells) -> RunRecord:
    if run.recall is None:
        return run
    kept = {
        place: shared[place] if shared[place].items() <= found.items() else found
        for place, found in _cells(run).items()
    }
    cells = [
        cell for cell in run.recall["cells"] if cell["depth"] in kept[cell["task"], cell["length"]]
    ]
    return replace(run, recall=run.recall | {"cells": cells})


def _depth_lines(without: _Lacking, shared: _Cells) -> list[str]:
    by_runs: dict[tuple[str, str], list[Any]] = {}
    for depth in sorted(without, key=str):
        places = without[depth]
        names = few(sorted(set.union(*places.values())))
        # A depth that is compared nowhere needs no list of where.
        kept = any(depth in found for found in shared.values())
        where = [f"{task} at {short_number(length)}" for task, length in places]
        by_runs.setdefault((names, f" of {few(where)}" if kept else ""), []).append(depth)
    return [
        f"Recall is compared at the depths that all have: without {few(depths)}{where}, at which "
        f"{names} was not asked."
        for (names, where), depths in by_runs.items()
    ]


def _task_lines(groups: Sequence[Group]) -> list[str]:
    shared = set(shared_tasks(groups))
    missing = [task for task in tasks_of(groups) if task not in shared]
    names = [
        run.name
        for group in groups
        for run in group.runs
        if run.recall and not set(missing) <= set(run.recall["settings"]["tasks"])
    ]
    if not missing:
        return []
    return [f"Recall in the mean of tasks is without {few(missing)}, which {few(names)} lacks."]
