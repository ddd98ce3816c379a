"""Text whose tokens are coloured by a number: for terminals and for self-contained HTML.

Colours are light where the number is small and dark where it is large, in one hue (weights), or
blue below zero and orange above (differences), so that they can be told apart without seeing red
from green, and in grey. Text is never taken on trust: control characters become visible signs, and
HTML is escaped.
"""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Colour = tuple[int, int, int]

# Stops of equal distance, from small to large; perceived lightness falls from each to the next.
_ORANGE: tuple[Colour, ...] = ((255, 255, 255), (254, 227, 180), (253, 174, 97), (201, 86, 10))
_BLUE: tuple[Colour, ...] = ((255, 255, 255), (198, 219, 239), (107, 160, 214), (25, 84, 160))
UNKNOWN: Colour = (224, 224, 224)
"""Of tokens without a number: first tokens, unscored targets."""

LEVELS = 24
"""Shades on each side of zero."""


@dataclass(frozen=True)
class Scale:
    """From numbers to shades: ``zero`` is white, ``limit`` and beyond the darkest."""

    limit: float
    signed: bool
    """Whether numbers below ``zero`` mean something (blue); if not, they are white too."""
    zero: float = 0.0

    def level(self, value: float) -> int | None:
        """Shade -LEVELS ... LEVELS of a number; None for NaN. Square root: small values differ
        visibly, the few huge ones do not swallow the rest."""
        if math.isnan(value):
            return None
        above, span = value - self.zero, self.limit - self.zero
        share = math.sqrt(min(abs(above) / span, 1.0)) if span > 0 else 0.0
        level = round(share * LEVELS)
        return level if above > 0 else -level if self.signed else 0


def scale_for(values: np.ndarray, signed: bool) -> Scale:
    """A scale on which 99 % of ``values`` are below the darkest shade; NaN is left out.

    Unsigned scales begin at the smallest value: weights mixed with uniform ones have a floor.
    """
    known = values[np.isfinite(values)]
    if not len(known):
        return Scale(1.0, signed)
    sizes = np.abs(known)
    limit = float(np.quantile(sizes, 0.99)) or float(sizes.max())
    zero = 0.0 if signed else float(known.min())
    return Scale(limit if limit > zero else float(sizes.max()), signed, zero)


def heavy_from(values: np.ndarray) -> float:
    """The magnitude that a tenth of ``values`` reach; infinity if all have the same."""
    sizes = np.abs(values[np.isfinite(values)])
    if not len(sizes) or sizes.min() == sizes.max():
        return math.inf
    bound = float(np.quantile(sizes, 0.9))
    # Where more than nine tenths are equal (sparse weights), only what is above them.
    return bound if bound > sizes.min() else float(sizes[sizes > bound].min())


def colour(level: int | None) -> Colour:
    """The colour of a shade."""
    if level is None:
        return UNKNOWN
    stops = _BLUE if level < 0 else _ORANGE
    place = abs(level) / LEVELS * (len(stops) - 1)
    below = min(int(place), len(stops) - 2)
    part = place - below
    low, high = stops[below], stops[below + 1]
    red, green, blue = (round(a + (b - a) * part) for a, b in zip(low, high, strict=True))
    return red, green, blue


def ink(background: Colour) -> Colour:
    """Black or white, whichever reads better on ``background``."""
    red, green, blue = background
    return (0, 0, 0) if 0.299 * red + 0.587 * green + 0.114 * blue > 110 else (255, 255, 255)


def visible(text: str) -> str:
    """``text`` with control characters other than tab and newline as signs that do nothing."""
    return "".join(_sign(character) for character in text)


def _sign(character: str) -> str:
    code = ord(character)
    if character in "\n\t" or (code >= 32 and not 0x7F <= code < 0xA0):
        # Marks that turn the direction of writing could make the text read as another.
        return "\u00b7" if 0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069 else character
    return chr(0x2400 + code) if code < 32 else "\u00b7"


def to_terminal(texts: Sequence[str], values: np.ndarray, scale: Scale) -> str:
    """The texts on coloured ground, in 24-bit ANSI escapes."""
    parts = []
    for text, value in zip(texts, values.tolist(), strict=True):
        ground = colour(scale.level(value))
        code = f"\x1b[48;2;{';'.join(map(str, ground))};38;2;{';'.join(map(str, ink(ground)))}m"
        # Colour ends before each line break: terminals would fill the rest of the line with it.
        lines = [f"{code}{line}\x1b[0m" if line else "" for line in visible(text).split("\n")]
        parts.append("\n".join(lines))
    return "".join(parts)


def to_plain(texts: Sequence[str], values: np.ndarray, bound: float) -> str:
    """The texts without colour, those of at least ``bound`` (in magnitude) in ⟦brackets⟧."""
    parts = []
    for text, value in zip(texts, values.tolist(), strict=True):
        shown = visible(text)
        core = shown.strip()
        heavy = abs(value) >= bound and core
        parts.append(shown.replace(core, f"⟦{core}⟧", 1) if heavy else shown)
    return "".join(parts)


def to_html(
    texts: Sequence[str], values: np.ndarray, scale: Scale, titles: Sequence[str] | None = None
) -> str:
    """The texts as <span>s of the classes of ``style``; ``titles`` appear on hovering."""
    parts = []
    for at, (text, value) in enumerate(zip(texts, values.tolist(), strict=True)):
        title = f' title="{html.escape(visible(titles[at]))}"' if titles else ""
        body = html.escape(visible(text)).replace("\n", "\u21b5\n")  # a coloured newline is seen
        parts.append(f'<span class="{_class(scale.level(value))}"{title}>{body}</span>')
    return "".join(parts)


def legend_html(scale: Scale, name: str) -> str:
    """A line that explains the colours: ``name`` is what the numbers are."""
    cells = []
    for share in (-1.0, -0.5, -0.1, 0.0, 0.1, 0.5, 1.0) if scale.signed else (0.0, 0.1, 0.5, 1.0):
        value = scale.zero + share * (scale.limit - scale.zero)
        more = "\u2265 " if share == 1.0 else "\u2264 " if share == -1.0 else ""
        shade = _class(scale.level(value))
        cells.append(f'<span class="{shade}">&nbsp;{more}{value:.2g}&nbsp;</span>')
    cells.append(f'<span class="{_class(None)}">&nbsp;none&nbsp;</span>')
    return f'<p class="legend">{html.escape(name)}: {" ".join(cells)}</p>'


def style() -> str:
    """The CSS of ``to_html``."""
    rules = [
        ".tokens{font:13px/1.7 ui-monospace,Menlo,Consolas,monospace;white-space:pre-wrap;"
        "overflow-wrap:anywhere;tab-size:4}",
    ]
    for level in [None, *range(-LEVELS, LEVELS + 1)]:
        ground = colour(level)
        background, foreground = (f"#{r:02x}{g:02x}{b:02x}" for r, g, b in (ground, ink(ground)))
        rules.append(f".{_class(level)}{{background:{background};color:{foreground}}}")
    return "\n".join(rules)


def _class(level: int | None) -> str:
    return "u" if level is None else f"n{-level}" if level < 0 else f"p{level}"
