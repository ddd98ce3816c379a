"""Runs of a group that do not count: measured on other samples than its first, or not at all."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

from lctw_megatron.errors import few
from lctw_megatron.report.benchmarks import samples_by_name
from lctw_megatron.report.groups import Group
from lctw_megatron.report.measures import key_samples, loss_samples
from lctw_megatron.report.runs import RunRecord

Samples = dict[Hashable, Any]
"""What was measured -> the identity of the samples it was measured on."""

_KEYS = "key tokens of LongPPL"


def left_out(groups: Sequence[Group]) -> list[str]:
    """A line each group and kind of measurement; one for all of key tokens that none shares."""
    kinds: dict[str, Callable[[RunRecord], Samples]] = {
        "held-out losses": lambda run: {"": loss_samples(run)} if run.evaluation else {},
        _KEYS: lambda run: {"": found} if (found := key_samples(run)) else {},
        "recall": _recall_samples,
        "benchmarks": samples_by_name,
    }
    lines = _own_keys(groups)
    if lines:
        del kinds[_KEYS]
    for what, samples in kinds.items():
        for group in groups:
            known = [(run.name, found) for run in group.runs if (found := samples(run))]
            others = [name for name, found in known if not _agree(found, known[0][1])]
            if others:
                lines.append(
                    f"{group.name}: {what}: {few(others)} left out, measured on other samples than "
                    f"{known[0][0]}."
                )
            every = {name for _, found in known for name in found}
            lacking = [run.name for run in group.runs if samples(run).keys() < every]
            if lacking:
                lines.append(
                    f"{group.name}: {what}: {few(lacking)} was not, or not in all, measured; what "
                    "it lacks is the mean of the others."
                )
    return lines


def _own_keys(groups: Sequence[Group]) -> list[str]:
    """A line if no group was evaluated on the baseline's key tokens, though on its sequences."""
    found = [next((run for run in group.runs if key_samples(run)), None) for group in groups]
    baseline = found[0]
    if baseline is None:
        return []
    # Of each group the first such run, on whose key tokens its loss is.
    others = [run for run in found[1:] if run and loss_samples(run) == loss_samples(baseline)]
    if not others or any(key_samples(run) == key_samples(baseline) for run in others):
        return []
    return [
        f"Key tokens of LongPPL: no other group has those of {groups[0].name}, so the loss on them "
        "is not compared, and shown on those of each group's first run; evaluate all with the same "
        "--key-checkpoint."
    ]


def _agree(ours: Samples, theirs: Samples) -> bool:
    """In all that both have."""
    return all(ours[name] == theirs[name] for name in ours.keys() & theirs.keys())


def _recall_samples(run: RunRecord) -> Samples:
    return {
        (cell["task"], cell["length"], cell["depth"]): cell["samples_digest"]
        for cell in (run.recall or {"cells": []})["cells"]
    }
