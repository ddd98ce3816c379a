"""Is it better, where, and what does it cost: the first table of a comparison, and sentences."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from lctw_megatron.errors import few
from lctw_megatron.evaluation.buckets import Estimate
from lctw_megatron.evaluation.recall_result import show
from lctw_megatron.report import measures
from lctw_megatron.report.benchmarks import benchmark, benchmark_names, lower_is_better
from lctw_megatron.report.cost import cost_words, hours_name, training_cost
from lctw_megatron.report.estimate import BEYOND, Measured, difference, is_beyond, level
from lctw_megatron.report.groups import Group
from lctw_megatron.report.table import (
    BETTER,
    WORSE,
    Rows,
    marked,
    mean_of,
    short_number,
)

FEW_SAMPLES = 10
"""With fewer a standard error is itself far from sure: by 1 / √(2 (n - 1)), 40 % of 4 samples."""


@dataclass(frozen=True)
class Comparison:
    """One quantity in which groups are compared."""

    kind: str
    where: str
    """Together its name; the sentences say a kind once."""
    read: Callable[[Group], Measured | None]
    lower_is_better: bool
    in_table: bool = True
    """Whether it has a column in the overview; all are in the sentences."""

    @property
    def name(self) -> str:
        return f"{self.kind} {self.where}"


def comparisons(groups: Sequence[Group]) -> list[Comparison]:
    """All that at least one group measured: recall at each length in the mean over the tasks, loss
    with long and short contexts, loss at a short length, benchmarks."""
    benchmarks = [
        Comparison(
            "benchmark", name, partial(benchmark, name=name), lower_is_better(groups, name), False
        )
        for name in benchmark_names(groups)
    ]
    return _recall_comparisons(groups) + _loss_comparisons(groups) + benchmarks


def _recall_comparisons(groups: Sequence[Group]) -> list[Comparison]:
    tasks, lengths = measures.shared_tasks(groups), measures.shared_lengths(groups)
    found = []
    for kind, name in (("right", "recall"), ("nats", "recall nats")):
        for length in lengths:
            read = partial(measures.recall, tasks=tasks, length=length, kind=kind)
            # The longest is what training is for, the shortest its price.
            shown = length == lengths[-1] or (kind == "right" and length == lengths[0])
            where = short_number(length)
            found.append(Comparison(f"{name} at", where, read, kind == "nats", shown))
    return found


def _loss_comparisons(groups: Sequence[Group]) -> list[Comparison]:
    first = next((group for group in groups if measures.has_losses(group)), None)
    if first is None:
        return []
    long, long_bins = measures.long_context_bins(first)
    short, short_bins = measures.short_context_bins(first)
    parts: list[tuple[str, str, list[int] | None]] = [
        (f"after {short_number(long)}", "position", long_bins),
        (f"before {short_number(short)}", "position", short_bins),
        ("on far targets", "classes", [1]),
        ("on all", "classes", None),
    ]
    found = [
        # The loss of all targets stands in a table of its own.
        Comparison(
            "loss", where, partial(measures.loss, probes=probes, bins=bins), True, bins is not None
        )
        for where, probes, bins in parts
    ]
    if any(measures.key_loss(group) is not None for group in groups):
        found.append(Comparison("loss", "on key tokens", measures.key_loss, True, False))
    return found


def verdict(found: Estimate | None, comparison: Comparison) -> tuple[bool, bool]:
    """Whether it is better, and whether that is sure: beyond two standard errors."""
    better = found is not None and (found.mean < 0) == comparison.lower_is_better
    return better, is_beyond(found)


def overview_table(groups: Sequence[Group]) -> Rows:
    """The baseline's values, then what each other group differs from them by, and what training
    took. Columns that no group has are left out."""
    baseline, others = groups[0], groups[1:]
    columns = [comparison for comparison in comparisons(groups) if comparison.in_table]
    rows: Rows = [["difference to " + baseline.name, "seeds"]]
    for group in groups:
        name = f"{group.name} itself" if group is baseline else group.name
        fewest, most = _seeds_that_count(group, columns)
        rows.append([name, str(most) if fewest == most else f"{fewest} to {most}"])
    for comparison in columns:
        ours = comparison.read(baseline)
        rows[0].append(comparison.name)
        rows[1].append("-" if ours is None else show(level(ours)))
        for row, group in zip(rows[2:], others, strict=True):
            theirs = comparison.read(group)
            found = difference(theirs, ours)
            unknown = "other samples" if ours and theirs else "-"
            text = unknown if found is None else show(found, "+")
            row.append(marked(text, *verdict(found, comparison)))
    _add_cost(rows, groups)
    return rows


def _seeds_that_count(group: Group, compared: Sequence[Comparison]) -> tuple[int, int]:
    """The fewest and the most of a group's runs that one of its comparisons is made of: those
    without a measurement, or with one on other samples, are left out of it."""
    measured = [comparison.read(group) for comparison in compared]
    counts = [len(found.seeds) for found in measured if found] or [len(group.runs)]
    return min(counts), max(counts)


def _add_cost(rows: Rows, groups: Sequence[Group]) -> None:
    """Of one run, in the mean over the seeds."""
    costs = [[training_cost(run) for run in group.runs] for group in groups]
    hours = [mean_of([cost.hours for cost in found if cost]) for found in costs]
    work = [mean_of([cost.flops for cost in found if cost]) for found in costs]
    for name, values, form, scale in (
        (hours_name(groups), hours, "{:.3g}", 1.0),
        ("PFLOP", work, "{:,.3g}", 1e-15),
    ):
        if any(value is not None for value in values):
            rows[0].append(name)
            for row, value in zip(rows[1:], values, strict=True):
                row.append("-" if value is None else form.format(value * scale))


class Judgement(NamedTuple):
    """Where a group differs from the baseline beyond two standard errors."""

    group: Group
    made: int
    """Comparisons that could be made."""
    sure: dict[str, dict[str, list[str]]]
    """BETTER or WORSE -> kind -> where."""


def judge(groups: Sequence[Group]) -> list[Judgement]:
    """Of every group but the first, which is the baseline."""
    baseline, found = groups[0], []
    compared = [(comparison, comparison.read(baseline)) for comparison in comparisons(groups)]
    for group in groups[1:]:
        sure: dict[str, dict[str, list[str]]] = {BETTER: {}, WORSE: {}}
        made = 0
        for comparison, theirs in compared:
            gap = difference(comparison.read(group), theirs)
            if gap is not None and gap.error is not None:
                made += 1
                better, is_sure = verdict(gap, comparison)
                if is_sure:
                    kinds = sure[BETTER if better else WORSE]
                    kinds.setdefault(comparison.kind, []).append(comparison.where)
        found.append(Judgement(group, made, sure))
    return found


def verdict_lines(baseline: Group, judged: Sequence[Judgement]) -> list[str]:
    """A sentence a group: where it is better, where worse, of how many comparisons, and what it
    cost."""
    lines = []
    for group, made, sure in judged:
        if not made:
            lines.append(f"{group.name}: nothing measured on the same samples as {baseline.name}.")
            continue
        parts = [
            f"{word} in " + "; ".join(f"{kind} {', '.join(at)}" for kind, at in sure[mark].items())
            for mark, word in ((BETTER, "better"), (WORSE, "worse"))
            if sure[mark]
        ]
        parts = parts or ["no difference that is sure"]
        cost = cost_words(group, baseline)
        lines.append(f"{group.name}: {', '.join(parts)} (of {made} comparisons){cost}.")
    return lines


def reading_lines(groups: Sequence[Group], judged: Sequence[Judgement]) -> list[str]:
    """How to read the overview, and what its errors do not know."""
    made = sum(judgement.made for judgement in judged)
    if not made:
        return []
    lines = [
        f"{BETTER} better, {WORSE} worse than {groups[0].name} by more than {BEYOND:g} standard "
        f"errors (±, over seeds and samples); without a mark it is not sure. Of {made} comparisons "
        f"about {max(1, round(0.046 * made))} would be marked by chance, more with few seeds or "
        "samples. Recall: mean of the tasks that all have, share of answers right and nats an "
        "answer token. Loss: nats a target of held-out text, after so many tokens of context. "
        "Cost: of one run's training steps, without what scoring a corpus takes once."
    ]
    lines += _seed_lines(groups)
    runs = [run for group in groups for run in group.runs]
    questions = [len(cell["nats"]) for run in runs if run.recall for cell in run.recall["cells"]]
    sequences = [len(run.evaluation["sequences"]) for run in runs if run.evaluation]
    small = [
        f"{min(counts)} {what}"
        for counts, what in (
            (questions, "samples of a task, length and depth"),
            (sequences, "sequences"),
        )
        if counts and min(counts) < FEW_SAMPLES
    ]
    if small:
        lines.append(f"From {' and from '.join(small)} ± is itself a guess: measure more of them.")
    return lines


def _seed_lines(groups: Sequence[Group]) -> list[str]:
    """Whose ± knows nothing of other seeds, and whose spread over seeds is not that of pairs of
    equal seeds: see ``estimate``."""
    baseline = groups[0]
    compared = [(comparison, comparison.read(baseline)) for comparison in comparisons(groups)]
    alone: dict[str, bool] = {}
    """Group -> whether it has one seed, as the baseline, in all that it is compared in."""
    unlike: dict[str, bool] = {}
    """Likewise: other seeds than the baseline."""
    sides: list[tuple[int, int]] = []
    """Seeds of a group and of the baseline where these are unlike."""
    for group in groups[1:]:
        pairs = [(comparison.read(group), theirs) for comparison, theirs in compared]
        # Without what is not compared, such as key tokens that each run picked itself.
        made = [(a.seeds, b.seeds) for a, b in pairs if a and b and difference(a, b) is not None]
        single = [len(ours) == len(theirs) == 1 for ours, theirs in made]
        other = [
            not one and sorted(ours) != sorted(theirs)
            for one, (ours, theirs) in zip(single, made, strict=True)
        ]
        for found, where in ((alone, single), (unlike, other)):
            if any(where):
                found[group.name] = all(where)
        sides += [(len(a), len(b)) for (a, b), differ in zip(made, other, strict=True) if differ]
    lines = []
    if alone:
        everywhere = all(alone.values()) and len(alone) == len(groups) - 1
        who = f"{_in_part(alone)}: only one seed, as {baseline.name}"
        lines.append(
            f"{'All have one seed' if everywhere else who}: what another order of the data would "
            "have given is not in ±."
        )
    if unlike:
        least, most = min(b for _, b in sides), max(b for _, b in sides)
        number = str(most) if least == most else f"{least} to {most}"
        mean = "its one" if most == 1 else f"the mean of its {number}"
        source = "these" if all(a == 1 for a, _ in sides) else "both groups together"
        lines.append(
            f"{_in_part(unlike)}: fewer or other seeds than {baseline.name}: compared with {mean}, "
            f"and the spread over seeds in ± is taken from {source}."
        )
    return lines


def _in_part(names: dict[str, bool]) -> str:
    return few([name if whole else f"{name} (in part)" for name, whole in names.items()])
