"""What was measured, in numbers: losses, weights, and every run for itself."""

import math
import re
from collections.abc import Callable, Sequence

import numpy as np

from lctw_megatron.errors import few
from lctw_megatron.evaluation.buckets import Estimate
from lctw_megatron.evaluation.recall_result import show
from lctw_megatron.report import measures
from lctw_megatron.report.estimate import Measured, difference, is_beyond, level
from lctw_megatron.report.groups import Group
from lctw_megatron.report.runs import RunRecord
from lctw_megatron.report.table import Rows, marked, mean_of

FEW_KEY_TOKENS = 100
"""With fewer, LongPPL is the luck of single tokens."""


def loss_table(groups: Sequence[Group]) -> Rows:
    """Held-out losses of near, far and first-seen targets and of all, and on LongPPL's key tokens
    if they were measured, a row a group; then, a row a further group, the differences to the first.
    The first row is the heading."""
    heading = ["held-out loss, nats a target", "all", "near", "far", "first seen"]
    evaluated = [group for group in groups if measures.has_losses(group)]
    if any(measures.key_loss(group) is not None for group in evaluated):
        heading.append("key tokens")
    rows: Rows = [heading]
    for group in evaluated:
        rows.append([group.name, *(_loss(part) for part in _losses(group, len(heading)))])
    for group in evaluated[1:]:
        label = f"{group.name} - {evaluated[0].name}"
        both = (_losses(each, len(heading)) for each in (group, evaluated[0]))
        parts = zip(*both, strict=True)
        found = [difference(ours, theirs) for ours, theirs in parts]
        if found[0] is None:
            rows.append(
                [label, "evaluated on other sequences: not compared", *[""] * (len(heading) - 2)]
            )
        else:
            rows.append([label, *(_marked_difference(part) for part in found)])
    return rows


def _losses(group: Group, width: int) -> list[Measured | None]:
    """Those of a row of ``width`` columns, the first of which is a name."""
    chosen: list[list[int] | None] = [None, [0], [1], [2]]
    found = [measures.loss(group, "classes", bins) for bins in chosen]
    return [*found, measures.key_loss(group)][: width - 1]


def weight_table(groups: Sequence[Group]) -> Rows:
    """The weights of the last step, in the mean over a group's runs; empty if all are uniform."""
    names = {
        "n_eff share": "weights/n_eff_share",
        "weight 0": "weights/zero_share",
        "mean": "weights/mean",
        "largest": "weights/max",
        "rank correlation with loss": "weights/spearman",
    }
    rows: Rows = [["weights at the last step", *names]]
    for group in groups:
        found = [mean_of([_last(run, metric) for run in group.runs]) for metric in names.values()]
        if any(value is not None for value in found):
            rows.append([group.name, *("-" if v is None else f"{v:.3g}" for v in found)])
    return rows if any(row[1] not in ("1", "-") for row in rows[1:]) else rows[:1]


def run_table(runs: Sequence[RunRecord]) -> Rows:
    """What else there is in numbers, a row a run; columns that no run has are left out."""
    columns: dict[str, Callable[[RunRecord], str | None]] = {
        "scheme": lambda run: run.config.weighting.scheme if run.config else None,
        "seed": lambda run: str(run.config.seed) if run.config else None,
        "steps": lambda run: _show(_last(run, "step"), "{:.0f}", add=1),
        "validation loss": lambda run: _show(_last(run, "validation/loss/plain"), "{:.4f}"),
        "held-out loss": lambda run: _show((run.evaluation or {}).get("loss"), "{:.4f}"),
        "LongPPL": lambda run: _longppl(run, "longppl", "{:.2f}"),
        "key tokens": lambda run: _longppl(run, "key_tokens", "{:,}"),
        "perplexity": lambda run: _longppl(run, "perplexity", "{:.2f}"),
        "n_eff share": lambda run: _show(_last(run, "weights/n_eff_share"), "{:.2f}"),
        "tokens/s": lambda run: _median(run, "speed/tokens_per_second", "{:,.0f}"),
        "peak GiB": lambda run: _show(_last(run, "memory/peak_gib"), "{:.1f}"),
    }
    found = {name: [read(run) for run in runs] for name, read in columns.items()}
    kept = {name: values for name, values in found.items() if any(values)}
    body = [
        [run.name, *(values[at] or "-" for values in kept.values())] for at, run in enumerate(runs)
    ]
    return [["run", *kept], *body]


def unfinished(runs: Sequence[RunRecord]) -> list[str]:
    """What of a run is of fewer steps than its recipe has, or than it has by now: a line each."""
    lines = []
    for run in runs:
        done = int(run.metrics[-1]["step"]) + 1 if run.metrics else 0
        if run.config and 0 < done < (steps := run.config.training.steps):
            lines.append(f"{run.name}: not finished, at step {done:,} of {steps:,}.")
        results = {"evaluation.json": run.evaluation, "recall.json": run.recall}
        for name, result in results.items():
            measured = (result or {"settings": {}})["settings"].get("checkpoint", "")
            at = re.search(r"step_(\d+)$", measured)
            if at and (step := int(at.group(1))) < done:
                lines.append(
                    f"{run.name}: {name} is of step {step:,}, but the run is at step {done:,}; "
                    "measure it again."
                )
    return lines


def only_measured(runs: Sequence[RunRecord]) -> list[str]:
    """A line of each folder without a training, such as what a model could do before."""
    lines = []
    for run in runs:
        if not run.metrics and not run.evaluation:
            files = {"recall.json": run.recall, "harness.json": run.harness}
            there = " and ".join(name for name, content in files.items() if content)
            lines.append(f"{run.name}: only {there}, nothing of its training or held-out losses.")
    return lines


def explain(runs: Sequence[RunRecord]) -> list[str]:
    """What the tables need to be read rightly, a line each."""
    lines = []
    # A run of which only recall or benchmarks were measured lacks nothing.
    missing = [run.name for run in runs if not any((run.evaluation, run.recall, run.harness))]
    if missing:
        lines.append(
            f"{few(missing)}: no evaluation.json; make it with tools/evaluate_model.py "
            "losses --checkpoint RUN_DIR --data PREFIX"
        )
    evaluated = next((run.evaluation for run in runs if run.evaluation is not None), None)
    if evaluated:
        settings, classes = evaluated["settings"], evaluated["classes"]
        total = max(sum(classes["targets"]), 1)
        shares = [f"{100 * count / total:.0f} %" for count in classes["targets"]]
        documents = len({document for document, _ in evaluated["sequences"]})
        lines.append(
            f"near: the target's token last stood at most {settings['near']} tokens back "
            f"({shares[0]} of the targets), far: farther back ({shares[1]}), first seen: not in "
            f"the sequence before ({shares[2]})."
        )
        nears: dict[int, list[str]] = {}
        for run in runs:
            if run.evaluation is not None:
                nears.setdefault(run.evaluation["settings"]["near"], []).append(run.name)
        if len(nears) > 1:
            given = "; ".join(f"{near} for {few(names)}" for near, names in nears.items())
            lines.append(
                f"--near was {given}: losses of near and of far targets are compared only where it "
                "was the same."
            )
        lines.append(
            f"{evaluated['targets']:,} targets of {len(evaluated['sequences'])} sequences of "
            f"{settings['sequence_length']:,} tokens from {documents} documents of "
            f"{settings['data']}; ± is the standard error over sequences and, of several, seeds."
        )
    return lines + _longppl_lines(runs)


def _longppl_lines(runs: Sequence[RunRecord]) -> list[str]:
    """Who picked the key tokens, and where they are too few."""
    found = [(run, run.evaluation) for run in runs if (run.evaluation or {}).get("longppl")]
    picked: dict[str, list[str]] = {}
    for run, evaluation in found:
        assert evaluation
        how = (
            f"short context {evaluation['settings']['window']} tokens, key tokens picked by "
            f"{evaluation['longppl']['evaluator']}"
        )
        picked.setdefault(how, []).append(run.name)
    if not picked:
        return []
    ways = [how if len(picked) == 1 else f"{few(names)}: {how}" for how, names in picked.items()]
    line = f"LongPPL, exp of the loss on key tokens: {few(ways, '; ', most=4)}."
    least = min(evaluation["longppl"]["key_tokens"] for _, evaluation in found if evaluation)
    if least < FEW_KEY_TOKENS:
        line += f" On {least} key tokens it says nothing."
    return [line]


def _loss(value: Measured | None) -> str:
    return "-" if value is None else f"{level(value).mean:.4f}"


def _marked_difference(value: Estimate | None) -> str:
    if value is None:
        return "-"
    return marked(show(value, "+", 4), value.mean < 0, is_beyond(value))


def _show(value: float | None, form: str, add: float = 0) -> str | None:
    return None if value is None else form.format(value + add)


def _last(run: RunRecord, metric: str) -> float | None:
    series = run.series(metric)
    return float(series.values[-1]) if len(series) else None


def _median(run: RunRecord, metric: str, form: str) -> str | None:
    series = run.series(metric)
    return form.format(np.median(series.values)) if len(series) else None


def _longppl(run: RunRecord, key: str, form: str) -> str | None:
    value = ((run.evaluation or {}).get("longppl") or {}).get(key)
    return None if value is None or not math.isfinite(value) else form.format(value)
