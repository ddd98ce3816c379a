"""The weights of a run: their histogram, and one page of text coloured by them."""

from collections.abc import Sequence
from functools import cache
from itertools import groupby

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.patches import Rectangle

from lctw_megatron.report.coloured_text import Colour, Scale, colour, ink, visible
from lctw_megatron.report.plot_style import GUIDE, legend, line_of, new_figure
from lctw_megatron.report.runs import RunRecord

PAGE_COLUMNS = 100
PAGE_LINES = 56
MISSING = "\u25a1"
"""□, for characters that the font of the picture lacks; the HTML page has them all."""


def weight_histogram(runs: Sequence[RunRecord]) -> Figure | None:
    """How targets, and how the total weight, spread over the weights; None without samples."""
    shown = [run for run in runs if run.weights]
    if not shown:
        return None
    zeros = any(run.weights and run.weights["histogram"]["targets"][0] for run in shown)
    used = _used(shown)
    low, high = float(np.floor(used[0])), float(np.ceil(used[-1] + 0.5))
    with new_figure(8, 5.4) as figure:
        upper = figure.add_subplot(2, 1, 1)
        lower = figure.add_subplot(2, 1, 2, sharex=upper)
        for axes, key, title in (
            (upper, "targets", "share of the targets in each half-octave of weight"),
            (lower, "weight", "share of the total weight"),
        ):
            for number, run in enumerate(shown):
                assert run.weights
                histogram = run.weights["histogram"]
                shares = _shares(histogram[key])
                edges = np.append(np.log2(histogram["starts"][1:]), 10.5)
                look = line_of(run, runs) | {"linewidth": 1.8}
                tint, dash = look["color"], look["linestyle"]
                axes.stairs(shares[1:], edges, **look)
                if len(shown) <= 3:  # more areas on each other would be mud
                    axes.stairs(shares[1:], edges, color=tint, alpha=0.12, fill=True)
                width = 0.8 / len(shown)
                ground = tint if dash == "-" else "none"
                axes.bar(
                    low - 1.4 + number * width,
                    shares[0],
                    width,
                    facecolor=ground,
                    edgecolor=tint,
                    linestyle=dash,
                )
            axes.axvline(0, color=GUIDE, linewidth=0.8, linestyle=":")
            axes.set_title(title)
            axes.set_ylabel("%")
        step = 1 if high - low < 9 else 2
        marks = [place for place in range(-12, 12, step) if low <= place <= high]
        labels = [_power(place) for place in marks]
        upper.set_xlim(low - 2 if zeros else low, high)
        lower.set_xticks([low - 1.0] * zeros + marks, ["0"] * zeros + labels)
        upper.tick_params(labelbottom=False)
        left = "; bars on the left: weight 0" if zeros else ""
        lower.set_xlabel(f"weight (uniform training: 1{left})")
        legend(figure, shown, runs)
        return figure


def text_page(texts: Sequence[str], values: np.ndarray, scale: Scale, title: str) -> Figure:
    """The first PAGE_LINES lines of the texts on ground coloured by their values [n]."""
    lines = lay_out(texts, PAGE_COLUMNS)[:PAGE_LINES]
    rows = len(lines)
    # One column is as wide as a monospaced character: 0.602 em of DejaVu Sans Mono, 8 points.
    figure = Figure(figsize=(PAGE_COLUMNS * 0.602 * 8 / 72 + 0.4, (rows + 3) * 0.19))
    margin = 0.2 / float(figure.get_figwidth())
    axes = figure.add_axes((margin, 0, 1 - 2 * margin, 1))
    axes.set_xlim(0, PAGE_COLUMNS)
    axes.set_ylim(rows + 3, 0)
    axes.axis("off")
    axes.text(0, 0.9, title, fontsize=9, fontweight="bold", va="center", parse_math=False)
    _draw_legend(axes, scale)
    for row, cells in enumerate(lines):
        column = 0
        for token, run in groupby(cells, key=lambda cell: cell[1]):
            text = "".join(character for character, _ in run)
            _draw_token(axes, column, row + 2.5, text, colour(scale.level(float(values[token]))))
            column += len(text)
    return figure


def _draw_token(axes: Axes, column: int, row: float, text: str, ground: Colour) -> None:
    if ground != (255, 255, 255):
        # A little wider, so that no seam shows between the boxes.
        box = Rectangle((column, row), len(text) + 0.03, 1, facecolor=_unit(ground), linewidth=0)
        axes.add_patch(box)
    if text.strip():
        drawable = _drawable()
        shown = "".join(c if ord(c) in drawable else MISSING for c in text)
        axes.text(
            column, row + 0.5, shown, color=_unit(ink(ground)), family="monospace", fontsize=8,
            va="center_baseline", parse_math=False,
        )  # fmt: skip


def lay_out(texts: Sequence[str], columns: int) -> list[list[tuple[str, int]]]:
    """Lines of at most ``columns`` cells (character, number of its token). A newline is a cell
    that shows as ↵, so that its colour is seen; tabs become four blanks."""
    lines: list[list[tuple[str, int]]] = [[]]
    for token, text in enumerate(texts):
        for character in visible(text).replace("\t", "    "):
            if len(lines[-1]) == columns:
                lines.append([])
            lines[-1].append(("\u21b5" if character == "\n" else character, token))
            if character == "\n":
                lines.append([])
    return [line for line in lines if line]


@cache
def _drawable() -> frozenset[int]:
    """Characters that the monospaced font has."""
    return frozenset(get_font(findfont("DejaVu Sans Mono")).get_charmap())


def _draw_legend(axes: Axes, scale: Scale) -> None:
    """A few shades with their values, at the right of the title's line."""
    shares = (-1.0, -0.1, 0.0, 0.1, 1.0) if scale.signed else (0.0, 0.1, 0.5, 1.0)
    for at, share in enumerate(shares):
        value = scale.zero + share * (scale.limit - scale.zero)
        ground = colour(scale.level(value))
        left = PAGE_COLUMNS - 8 * (len(shares) - at)
        axes.add_patch(Rectangle((left, 0.2), 7.6, 1.2, facecolor=_unit(ground), edgecolor=GUIDE))
        label = f"{'≥' if share == 1 else '≤' if share == -1 else ''}{value:.2g}"
        axes.text(
            left + 3.8, 0.8, label, color=_unit(ink(ground)), fontsize=8, ha="center", va="center"
        )


def _unit(rgb: Colour) -> tuple[float, float, float]:
    return rgb[0] / 255, rgb[1] / 255, rgb[2] / 255


def _shares(counts: list[float]) -> np.ndarray:
    """In percent."""
    values = np.array(counts, dtype=float)
    return 100 * values / max(float(values.sum()), 1e-30)


def _used(shown: Sequence[RunRecord]) -> np.ndarray:
    """log2 of the starts of all buckets above 0 that hold a 2000th of a run's targets or weight."""
    used: set[float] = {-1.0, 0.5}
    for run in shown:
        assert run.weights
        histogram = run.weights["histogram"]
        visible_part = (
            np.maximum(_shares(histogram["targets"]), _shares(histogram["weight"])) > 0.05
        )
        used.update(np.log2(np.array(histogram["starts"])[1:][visible_part[1:]]).tolist())
    return np.array(sorted(used))


def _power(exponent: int) -> str:
    return f"{2**exponent:g}" if exponent >= 0 else f"1/{2**-exponent}"
