"""What all figures of a report share: the look, and one colour, marker and dash for each line.

Okabe and Ito's palette, then three of Paul Tol's, which the common kinds of colour blindness tell
apart, and markers for print without colour. Figures are made without pyplot, so nothing is shared
or left open.
"""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lctw_megatron.atomic import atomic_file

_SOFTWARE = "LCTW-Megatron"
MARK = f"Software\0{_SOFTWARE}"
"""By which a picture is known as ours: PNG's keyword and its text."""
COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000",
    "#882255", "#999933", "#332288",
)  # fmt: skip
DASHES = ("-", "--", "-.")
"""Of each round of colours: many figures have no markers. Dotted are short contexts."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GUIDE = "#777777"
"""Of lines and words that guide the eye."""

_LOOK: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e0e0e0",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "text.parse_math": False,  # a name with two dollars is no formula
}


@contextmanager
def new_figure(width: float, height: float) -> Iterator[Figure]:
    """A figure of this size in inches, with the look in force while it is drawn."""
    with mpl.rc_context(_LOOK):
        yield Figure(figsize=(width, height), layout="constrained")


class Named(Protocol):
    """A run, or a group of runs: what one line of a figure is of."""

    @property
    def name(self) -> str: ...


def number_of(run: Named, runs: Sequence[Named]) -> int:
    """Its place among all of the report, by name."""
    return [other.name for other in runs].index(run.name)


def shift_of(run: Named, runs: Sequence[Named]) -> float:
    """From -0.5 to 0.5: side by side, so that error bars do not hide each other."""
    return (number_of(run, runs) + 0.5) / len(runs) - 0.5


def marker_of(run: Named, runs: Sequence[Named]) -> str:
    """The second round of colours has other markers than the first."""
    return MARKERS[number_of(run, runs) % len(MARKERS)]


def line_of(run: Named, runs: Sequence[Named]) -> dict[str, Any]:
    """Colour, dash and width. The first one's is broad, so that it shows under others on it."""
    number = number_of(run, runs)
    return {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": DASHES[number // len(COLOURS) % len(DASHES)],
        "linewidth": 1.5 if number else 3.0,
    }


def marker_size(run: Named, runs: Sequence[Named]) -> float:
    """Likewise, in points."""
    return 4.5 if number_of(run, runs) else 7.5


def legend(figure: Figure, shown: Sequence[Named], runs: Sequence[Named]) -> None:
    """The names, above everything."""
    handles = [
        Line2D(
            [],
            [],
            marker=marker_of(run, runs),
            markersize=marker_size(run, runs),
            label="name",
            **line_of(run, runs),
        )
        for run in shown
    ]
    for columns in range(min(len(handles), 5), 0, -1):
        # Long enough that a dash is seen beside the marker.
        made = figure.legend(
            handles=handles, loc="outside upper left", ncols=columns, handlelength=3.0
        )
        for text, run in zip(made.get_texts(), shown, strict=True):
            text.set_text(run.name)  # now, since a label that begins with _ would be left out
        if columns == 1 or made.get_window_extent().width <= figure.bbox.width:
            return
        made.remove()  # too wide


def write_png(path: str | Path, figure: Figure) -> bytes:
    """Write the figure atomically; its bytes."""
    buffer = io.BytesIO()
    # Hinting would move characters to whole pixels, and tokens apart in the middle of a word.
    with mpl.rc_context({"text.hinting": "no_hinting"}):
        figure.savefig(buffer, format="png", dpi=130, metadata={"Software": _SOFTWARE})
    with atomic_file(path) as file:
        file.write(buffer.getvalue())
    return buffer.getvalue()
