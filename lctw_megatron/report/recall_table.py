"""Recall in numbers, and how groups of runs differ in it."""

from collections.abc import Sequence

from lctw_megatron.errors import few
from lctw_megatron.evaluation.recall_result import show
from lctw_megatron.report import measures
from lctw_megatron.report.estimate import difference, is_beyond, level
from lctw_megatron.report.groups import Group
from lctw_megatron.report.table import Rows, marked

KINDS = {"right": "share of answers right", "nats": "nats an answer token"}


def recall_tables(groups: Sequence[Group]) -> list[Rows]:
    """Share right and nats of every task and group, a column a length; then what further groups
    differ from the first by, on the same samples. Last, of several tasks, the mean of those that
    all groups have."""
    measured = [group for group in groups if measures.has_recall(group)]
    if not measured:
        return []
    lengths, tables = measures.lengths_of(measured), []
    parts = {task: [task] for task in measures.tasks_of(measured)}
    if len(shared := measures.shared_tasks(measured)) > 1:
        parts[f"mean of {len(shared)}"] = shared
    for kind, unit in KINDS.items():
        rows = [[f"recall, {unit}", *(f"{length:,}" for length in lengths)]]
        for name, tasks in parts.items():
            for group in measured:
                found = [measures.recall(group, tasks, length, kind) for length in lengths]
                if any(value is not None for value in found):
                    values = ["-" if x is None else show(level(x)) for x in found]
                    rows.append([f"{name}: {group.name}", *values])
            for group in measured[1:]:
                gaps = _differences(group, measured[0], tasks, lengths, kind)
                rows.append([f"{name}: {group.name} - {measured[0].name}", *gaps])
        tables.append(rows)
    return tables


def _differences(
    group: Group, first: Group, tasks: Sequence[str], lengths: Sequence[int], kind: str
) -> list[str]:
    cells = []
    for length in lengths:
        ours, theirs = (measures.recall(each, tasks, length, kind) for each in (group, first))
        found = difference(ours, theirs)
        if found is None:
            cells.append("other samples" if ours and theirs else "-")
        else:
            better = (found.mean < 0) == (kind == "nats")
            cells.append(marked(show(found, "+"), better, is_beyond(found)))
    return cells


def recall_lines(groups: Sequence[Group]) -> list[str]:
    """What the tables and figures need to be read rightly."""
    if not any(measures.has_recall(group) for group in groups):
        return []
    return [
        f"Recall: {_said(groups, 'samples')} samples of each task, length and depth in "
        f"{_said(groups, 'haystack')}, teacher-forced; ± is the standard error over samples and, "
        f"of several, seeds; of a difference that of the same samples. Dotted and hollow: with the "
        f"last {_said(groups, 'window')} tokens of the context only."
    ]


def _said(groups: Sequence[Group], setting: str) -> str:
    """What recall was measured with; where that differs, with which groups had what."""
    found: dict[str, dict[str, None]] = {}
    for group in groups:
        for run in group.runs:
            if run.recall:
                value = run.recall["settings"][setting]
                text = f"{value:,}" if isinstance(value, int) else str(value)
                found.setdefault(text, {})[group.name] = None
    if len(found) == 1:
        return next(iter(found))
    return " or ".join(f"{text} ({few(list(names))})" for text, names in found.items())
