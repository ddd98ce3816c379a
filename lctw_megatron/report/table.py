"""Tables as plain text and as Markdown."""

import re
from collections.abc import Sequence

Rows = list[list[str]]
"""The heading first, then rows as long as it is."""

BETTER, WORSE = "\u2713", "\u2717"
"""After a number: better or worse than the baseline beyond two standard errors."""


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
    """The table for a README: the first column to the left, numbers to the right. Signs that are
    markup stand for themselves (_ inside a word is none)."""
    ruler = [":--", *["--:"] * (len(rows[0]) - 1)]
    cells = [[re.sub(r"([\\|*`<\[])", r"\\\1", cell) for cell in row] for row in rows]
    lines = [cells[0], ruler, *cells[1:]]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


def marked(text: str, better: bool, sure: bool) -> str:
    """With BETTER or WORSE behind it, if that is sure."""
    return f"{text} {BETTER if better else WORSE}" if sure else text


def short_number(number: int) -> str:
    """1024 -> 1k, 1536 -> 1.5k, 1048576 -> 1M; 1500 and 32000, which are no halves of them, as they
    are."""
    for size, letter in ((1 << 20, "M"), (1 << 10, "k")):
        if number >= size and number % (size // 2) == 0:
            return f"{number / size:g}{letter}"
    return str(number)


def mean_of(values: Sequence[float | None]) -> float | None:
    """Of those that are known."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
