"""Runs that differ only in their seed are one line of a comparison."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from os.path import commonprefix
from typing import Any

from lctw_megatron.report.runs import RunRecord

_OF_ONE_RUN: dict[str, Any] = {
    **dict.fromkeys(("name", "run_dir", "seed"), True),
    # What a run takes of its machine, and what it leaves on the way.
    "training": {
        "micro_batch_size", "log_interval", "save_interval", "async_save", "keep_last",
        "keep_every", "tensorboard", "trackers", "distributed_timeout_minutes", "hang_minutes",
    },
}  # fmt: skip


@dataclass(frozen=True)
class Group:
    """Runs of one configuration and different seeds, under one name; most often just one run."""

    name: str
    runs: tuple[RunRecord, ...]

    @property
    def first(self) -> RunRecord:
        return self.runs[0]

    @property
    def seeds(self) -> list[int]:
        return sorted(run.config.seed for run in self.runs if run.config)

    @property
    def example(self) -> RunRecord:
        """The first run with a sample of its weights, else the first; under the group's name."""
        shown = next((run for run in self.runs if run.weights), self.first)
        return replace(shown, name=self.name)

    @cached_property
    def merged(self) -> RunRecord:
        """One record for curves: of every metric the mean over the runs, at the steps all have."""
        if len(self.runs) == 1:
            return self.first
        by_step = [{line["step"]: line for line in run.metrics} for run in self.runs if run.metrics]
        steps = sorted(set.intersection(*(set(lines) for lines in by_step))) if by_step else []
        metrics = [_mean_line([lines[step] for lines in by_step]) for step in steps]
        first = self.first
        return RunRecord(self.name, first.folder, first.config, metrics, None)


def group_runs(runs: Sequence[RunRecord], baseline: RunRecord) -> list[Group]:
    """The groups in the order of their first runs, the one of ``baseline`` before all.

    Runs are one group if their configurations are equal but for name, folder, seed, the micro batch
    that their machine took and how they log and save. A run whose seed the group has already, and
    one without run.yaml, is a group of its own.
    """
    groups: list[list[RunRecord]] = []
    for run in [baseline, *(run for run in runs if run is not baseline)]:
        fitting = (group for group in groups if _same_but_for_the_seed(run, group))
        found = next(fitting, None)
        if found is None:
            groups.append([run])
        else:
            found.append(run)
    names = [group_name([run.name for run in group]) for group in groups]
    return [
        # Two groups of one name keep the names of their first runs.
        Group(name if names.count(name) == 1 else group[0].name, tuple(group))
        for name, group in zip(names, groups, strict=True)
    ]


def group_name(names: Sequence[str]) -> str:
    """What the names of runs share: uniform for uniform-seed1 and uniform-seed2."""
    parts = [re.split(r"([-_/])", name) for name in names]
    if len(names) > 1 and len({len(part) for part in parts}) == 1:
        # Words that all have, each with the mark before it.
        shared = [
            "".join(parts[0][max(at - 1, 0) : at + 1])
            for at in range(0, len(parts[0]), 2)
            if len({part[at] for part in parts}) == 1
        ]
        if shared:
            return "".join(shared).lstrip("-_/")
    prefix = commonprefix(list(names)) if len(names) > 1 else names[0]
    return (prefix.rstrip("0123456789-_/") if len(names) > 1 else prefix) or names[0]


def _same_but_for_the_seed(run: RunRecord, group: Sequence[RunRecord]) -> bool:
    config, others = run.config, [other.config for other in group]
    if config is None or others[0] is None:
        return False
    seeds = [other.seed for other in others if other is not None]
    same = config.model_dump(exclude=_OF_ONE_RUN) == others[0].model_dump(exclude=_OF_ONE_RUN)
    return same and config.seed not in seeds


def _mean_line(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    shared = [
        name
        for name, value in lines[0].items()
        if name != "step" and not isinstance(value, str) and all(name in line for line in lines)
    ]
    means = {name: sum(line[name] for line in lines) / len(lines) for name in shared}
    return {"step": lines[0]["step"], **means}
