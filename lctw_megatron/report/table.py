"""The report in a few lines of plain text."""

import math

import numpy as np

from lctw_megatron.errors import few
from lctw_megatron.evaluation.buckets import Difference
from lctw_megatron.report.runs import (
    RunRecord,
    comparable,
    differences,
    total_difference,
)

Rows = list[list[str]]

FEW_KEY_TOKENS = 100
"""With fewer, LongPPL is the luck of single tokens."""


def loss_table(runs: list[RunRecord]) -> Rows:
    """Held-out losses of near, far and first-seen targets and of all, a row a run; then, a row a
    further run, the differences to the first. The first row is the heading."""
    heading = ["held-out loss, nats a target", "all", "near", "far", "first seen"]
    rows = [heading]
    evaluated = [run for run in runs if run.evaluation is not None]
    for run in evaluated:
        assert run.evaluation
        classes = run.evaluation["classes"]["loss"]
        rows.append([run.name, *(_loss(value) for value in (run.evaluation["loss"], *classes))])
    for run in evaluated[1:]:
        first = evaluated[0]
        label = f"{run.name} - {first.name}"
        if comparable(run, first):
            parts = [total_difference(run, first), *differences(run, first, "classes")]
            rows.append([label, *(_difference(part) for part in parts)])
        else:
            rows.append([label, "evaluated on other sequences: not compared", "", "", ""])
    return rows


def further_table(runs: list[RunRecord]) -> Rows:
    """What else there is in numbers, a row a run; columns that no run has are left out."""
    columns = {
        "scheme": lambda run: run.config.weighting.scheme if run.config else None,
        "steps": lambda run: _last(run, "step", "{:.0f}", add=1),
        "validation loss": lambda run: _last(run, "validation/loss/plain", "{:.4f}"),
        "LongPPL": lambda run: _longppl(run, "longppl", "{:.2f}"),
        "key tokens": lambda run: _longppl(run, "key_tokens", "{:,}"),
        "perplexity": lambda run: _longppl(run, "perplexity", "{:.2f}"),
        "n_eff share": lambda run: _last(run, "weights/n_eff_share", "{:.2f}"),
        "tokens/s": lambda run: _median(run, "speed/tokens_per_second", "{:,.0f}"),
        "peak GiB": lambda run: _last(run, "memory/peak_gib", "{:.1f}"),
    }
    found = {name: [read(run) for run in runs] for name, read in columns.items()}
    kept = {name: values for name, values in found.items() if any(values)}
    body = [
        [run.name, *(values[at] or "-" for values in kept.values())] for at, run in enumerate(runs)
    ]
    return [["run", *kept], *body]


def explain(runs: list[RunRecord]) -> list[str]:
    """What the tables need to be read rightly, a line each."""
    lines = []
    # A run of which only recall was measured lacks nothing.
    missing = [run.name for run in runs if run.evaluation is None and run.recall is None]
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
        lines.append(
            f"{evaluated['targets']:,} targets of {len(evaluated['sequences'])} sequences of "
            f"{settings['sequence_length']:,} tokens from {documents} documents of "
            f"{settings['data']}; ± is the standard error of the paired difference over sequences."
        )
        if longppl := evaluated.get("longppl"):
            line = (
                f"LongPPL: short context {settings['window']} tokens, key tokens picked by "
                f"{longppl['evaluator']}."
            )
            if longppl["key_tokens"] < FEW_KEY_TOKENS:
                line += f" On {longppl['key_tokens']} key tokens it says nothing."
            lines.append(line)
    return lines


def to_text(rows: Rows, left: int = 0) -> str:
    """Columns side by side, numbers to the right; the first column and column ``left`` to the left.

    A cell that explains why nothing is compared runs over the columns after it.
    """
    widths = [
        max(len(row[at]) for row in rows if "not compared" not in row[at])
        for at in range(len(rows[0]))
    ]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if at in (0, left) else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def to_markdown(rows: Rows) -> str:
    """The table for a README: the first column to the left, numbers to the right."""
    ruler = [":--", *["--:"] * (len(rows[0]) - 1)]
    lines = [[cell.replace("|", "\\|") for cell in row] for row in [rows[0], ruler, *rows[1:]]]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _difference(value: Difference | None) -> str:
    if value is None:
        return "-"
    error = "" if value.error is None else f" ±{value.error:.4f}"
    return f"{value.mean:+.4f}{error}"


def _last(run: RunRecord, metric: str, form: str, add: float = 0) -> str | None:
    series = run.series(metric)
    return form.format(series.values[-1] + add) if len(series) else None


def _median(run: RunRecord, metric: str, form: str) -> str | None:
    series = run.series(metric)
    return form.format(np.median(series.values)) if len(series) else None


def _longppl(run: RunRecord, key: str, form: str) -> str | None:
    value = ((run.evaluation or {}).get("longppl") or {}).get(key)
    return None if value is None or not math.isfinite(value) else form.format(value)
