"""What is compared: quantities of a group of runs, from its evaluation.json and recall.json.

Of a group's runs those that were measured count, on the samples of the first of them;
``left_out.py`` tells which others there are.
"""

import json
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from lctw_megatron.evaluation.probes import short_length
from lctw_megatron.evaluation.recall_result import select, sums
from lctw_megatron.report.estimate import Block, Measured, of_blocks
from lctw_megatron.report.groups import Group
from lctw_megatron.report.runs import RunRecord


def seed_of(run: RunRecord) -> int:
    return run.config.seed if run.config else -1


def has_losses(group: Group) -> bool:
    return any(run.evaluation is not None for run in group.runs)


def has_recall(group: Group) -> bool:
    return any(run.recall is not None for run in group.runs)


def loss(group: Group, probes: str, bins: Iterable[int] | None = None) -> Measured | None:
    """Held-out loss in nats a target, of some bins of a group of probes, or of all."""
    return _of_runs(group, lambda run: _loss_block(run, probes, bins))


def short_context_bins(group: Group) -> tuple[int, list[int]]:
    """The bins of `position` below ``short_length``, and that limit."""
    settings, bins = _position_bins(group)
    limit = short_length(settings["sequence_length"])
    return limit, [at for at, start in enumerate(bins) if start < limit]


def long_context_bins(group: Group) -> tuple[int, list[int]]:
    """The bins of `position` in the second half of the sequence, and where the first begins."""
    settings, bins = _position_bins(group)
    limit = settings["sequence_length"] // 2
    chosen = [at for at, start in enumerate(bins) if start >= limit]
    return int(bins[chosen[0]]), chosen


def recall(group: Group, tasks: Sequence[str], length: int, kind: str) -> Measured | None:
    """Recall at one length, all depths together, in the mean over ``tasks``; ``kind`` is one of
    ``recall_result.VALUES``. None where a task was not measured."""
    return _of_runs(group, lambda run: _recall_blocks(run, tasks, length, kind))


def tasks_of(groups: Sequence[Group]) -> list[str]:
    """Of all runs, in the order of the first that has them."""
    found = _recall_settings(groups)
    return list(dict.fromkeys(task for settings in found for task in settings["tasks"]))


def shared_tasks(groups: Sequence[Group]) -> list[str]:
    """Those that every run has of which recall was measured at all."""
    measured = [found["tasks"] for found in _recall_settings(groups)]
    return [task for task in tasks_of(groups) if all(task in tasks for tasks in measured)]


def lengths_of(groups: Sequence[Group]) -> list[int]:
    return sorted({length for found in _recall_settings(groups) for length in found["lengths"]})


def shared_lengths(groups: Sequence[Group]) -> list[int]:
    """Those of the first group that another has too, which can be compared; all, if none can."""
    ours, theirs = lengths_of(groups[:1]), lengths_of(groups[1:])
    return [length for length in ours if length in theirs] or lengths_of(groups)


def _of_runs(
    group: Group, read: Callable[[RunRecord], tuple[str, list[Block]] | None]
) -> Measured | None:
    """The runs' blocks, one row of values each, stacked."""
    found = [(seed_of(run), read(run)) for run in group.runs]
    measured = [(seed, *value) for seed, value in found if value is not None]
    if not measured:
        return None
    samples = measured[0][1]
    same = [(seed, blocks) for seed, where, blocks in measured if where == samples]
    blocks = [
        Block(np.concatenate([block.values for block in parts]), parts[0].units)
        for parts in zip(*(blocks for _, blocks in same), strict=True)
    ]
    return of_blocks([seed for seed, _ in same], samples, blocks)


def loss_samples(run: RunRecord) -> str | None:
    if run.evaluation is None:
        return None
    keys = ("tokens_fingerprint", "sequence_length")
    settings = run.evaluation["settings"]
    return json.dumps([[settings[key] for key in keys], run.evaluation["sequences"]])


def _loss_block(
    run: RunRecord, probes: str, bins: Iterable[int] | None
) -> tuple[str, list[Block]] | None:
    samples = loss_samples(run)
    if samples is None or run.evaluation is None:
        return None
    found = run.evaluation[probes]
    losses, targets = np.array(found["sequence_loss"]), np.array(found["sequence_targets"])
    chosen = list(range(losses.shape[1]) if bins is None else bins)
    if max(chosen, default=0) >= losses.shape[1]:  # bins of longer sequences
        return None
    if bins is not None and probes == "classes" and {0, 1} & set(chosen):
        # With another --near other targets are near and far.
        samples = json.dumps([samples, run.evaluation["settings"]["near"]])
    return samples, [Block(losses[:, chosen].sum(1)[None], targets[:, chosen].sum(1))]


def key_loss(group: Group) -> Measured | None:
    """Held-out loss on LongPPL's key tokens, nats each: its exponential is LongPPL. Compared where
    one evaluator picked the same tokens."""
    return _of_runs(group, _key_block)


def key_samples(run: RunRecord) -> str | None:
    """None also for files of before, which hold no sums."""
    found = (run.evaluation or {}).get("longppl") or {}
    return json.dumps([loss_samples(run), found["keys"]]) if "keys" in found else None


def _key_block(run: RunRecord) -> tuple[str, list[Block]] | None:
    samples = key_samples(run)
    if samples is None or run.evaluation is None:
        return None
    found = run.evaluation["longppl"]
    return samples, [
        Block(np.array(found["sequence_loss"])[None], np.array(found["sequence_targets"]))
    ]


def _recall_samples(cells: Sequence[dict]) -> str:
    return json.dumps([[cell["task"], cell["length"], cell["samples_digest"]] for cell in cells])


def _recall_blocks(
    run: RunRecord, tasks: Sequence[str], length: int, kind: str
) -> tuple[str, list[Block]] | None:
    if run.recall is None:
        return None
    cells = [select(run.recall, task, length) for task in tasks]
    found = [sums(part, kind) for part in cells]
    blocks = [Block(each.values[None], each.units) for each in found if each is not None]
    if len(blocks) < len(tasks):
        return None
    return _recall_samples([cell for part in cells for cell in part]), blocks


def _recall_settings(groups: Sequence[Group]) -> list[dict]:
    return [run.recall["settings"] for group in groups for run in group.runs if run.recall]


def _position_bins(group: Group) -> tuple[dict, list[int]]:
    evaluation = next(run.evaluation for run in group.runs if run.evaluation)
    return evaluation["settings"], evaluation["position"]["bins"]
