"""Which windows the short-context model reads, and which targets each of them scores. Pure numpy.

A window sees K = ``window`` tokens; windows start D = ``stride`` tokens apart, at 0, D, 2D, …,
until one reaches the end. Each scores the targets that no earlier one scored; for 10 tokens, K = 4
and D = 2 (``.`` is seen, a digit is the context that the target there is scored with)::

    token     0 1 2 3 4 5 6 7 8 9
    window 0  . 1 2 3
    window 2      . . 2 3
    window 4          . . 2 3
    window 6              . . 2 3

So apart from the first window the context runs from K - D to K - 1 tokens: a smaller stride scores
with more context and costs K/D forward passes over the text. D = K leaves the first token of every
later window unscored, as it has no context there.

If only the last token is left, no window is run for it: the last input of a full window predicts
it, with K tokens of context. So the S + 1 tokens of a sequence, S = 32,768, take four windows of
8,192 after the first, 6,144 apart, not five.

Windows run over *regions*: whole documents, or, with ``sequence_length`` S, the S + 1 tokens
[mS, (m + 1)S] that training on S-token chunks reads as inputs and labels.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lctw_megatron.errors import InputError

Table = NDArray[np.int64]

WINDOWS_VERSION = 2
"""Of the rules above: scores of another version are others. 1: the last token may have a window of
its own."""


def check_windows(window: int, stride: int, sequence_length: int | None = None) -> None:
    """Refuse windows that could not score anything. Raises InputError."""
    if window < 2:
        raise InputError(f"window is {window}; a window needs at least 2 tokens to score one")
    if stride < 1:
        raise InputError(f"stride is {stride}; windows start at least 1 token apart")
    if stride > window:
        raise InputError(
            f"stride {stride} > window {window}: tokens between two windows would never be scored; "
            "choose a stride of at most the window"
        )
    if sequence_length is not None and window >= sequence_length:
        raise InputError(
            f"window {window} >= sequence length {sequence_length}: both contexts would be the "
            "same; choose a smaller window"
        )


def windows(n: int, window: int, stride: int) -> Table:
    """The windows over a region of ``n`` tokens: int64 [windows, 4], columns start, end,
    score_start, score_end.

    A window reads tokens [start, end) and scores the targets [score_start, score_end): its logits
    at score_start - 1 … score_end - 2 predict them. score_end is end, or end + 1 = n in the last
    window. A region of fewer than 2 tokens has none. With stride < window every target 1 … n-1 is
    scored exactly once.
    """
    check_windows(window, stride)
    if n < 2:
        return np.empty((0, 4), dtype=np.int64)
    count = 1 + max(0, -(-(n - 1 - window) // stride))
    start = np.arange(count, dtype=np.int64) * stride
    end = np.minimum(start + window, n)
    previous_end = np.concatenate([start[:1], end[:-1]])
    score_start = np.maximum(previous_end, start + 1)
    score_end = np.append(end[:-1], n)
    return np.stack([start, end, score_start, score_end], axis=1)


def regions(length: int, sequence_length: int | None = None) -> Table:
    """The regions of a document of ``length`` tokens that hold a target: int64 [regions, 2],
    columns start, end (exclusive)."""
    if length < 2:
        return np.empty((0, 2), dtype=np.int64)
    step = sequence_length or length
    start = np.arange(0, length - 1, step, dtype=np.int64)
    return np.stack([start, np.minimum(start + step + 1, length)], axis=1)


def document_windows(
    length: int,
    window: int,
    stride: int,
    sequence_length: int | None = None,
    score_first_window: bool = True,
) -> Table:
    """The windows over all regions of a document of ``length`` tokens: rows as in ``windows``, in
    the document's own numbering.

    Without ``score_first_window`` the first window of each region is left out: its targets have
    all their context in it, so a short and a long context are the same there.
    """
    check_windows(window, stride, sequence_length)
    tables = [np.empty((0, 4), dtype=np.int64)]
    bounds = regions(length, sequence_length)
    sizes = bounds[:, 1] - bounds[:, 0]
    # Regions of one document have at most two sizes: the full one and that of the last.
    for size in np.unique(sizes)[::-1]:
        table = windows(int(size), window, stride)[0 if score_first_window else 1 :]
        starts = bounds[sizes == size, 0]
        tables.append((starts[:, None, None] + table[None]).reshape(-1, 4))
    return np.concatenate(tables)


class Windowing(NamedTuple):
    """How a corpus is cut into windows: the last arguments of ``document_windows``, in order."""

    window: int
    stride: int
    sequence_length: int | None = None
    score_first_window: bool = False


class WindowStatistics(NamedTuple):
    """What scoring a corpus takes, and with how much context its targets are scored."""

    windows: int
    tokens: int
    """Tokens that the scorer reads: the sum of the windows' lengths."""
    scored: int
    """Targets scored."""
    min_context: int
    """The fewest tokens of context of a scored target; 0 if none is scored."""
    mean_context: float


def window_statistics(
    lengths: ArrayLike,
    window: int,
    stride: int,
    sequence_length: int | None = None,
    score_first_window: bool = True,
) -> WindowStatistics:
    """The statistics of ``document_windows`` over documents of ``lengths``, in closed form: O(1)
    per document, so cheap for any corpus."""
    check_windows(window, stride, sequence_length)
    sizes, repeats = _region_sizes(np.asarray(lengths, dtype=np.int64), sequence_length)
    later, rest = _later_windows(sizes, window, stride)
    least = max(window - stride, 1)  # fewest tokens of context in a later window

    full = np.maximum(later - 1, 0)  # later windows before the last
    count = later.copy()
    tokens = full * window + np.minimum(rest, window)
    scored = full * (window - least) + np.maximum(rest - least, 0)
    context = full * _sum_below(least, window) + _sum_below(least, np.maximum(rest, least))
    if score_first_window:
        first = np.where(later > 0, window, sizes)
        count += 1
        tokens += np.minimum(first, window)
        scored += first - 1
        context += _sum_below(1, first)
    total = int((scored * repeats).sum())
    return WindowStatistics(
        windows=int((count * repeats).sum()),
        tokens=int((tokens * repeats).sum()),
        scored=total,
        min_context=0 if not total else 1 if score_first_window else least,
        mean_context=int((context * repeats).sum()) / total if total else 0.0,
    )


def tokens_read(
    lengths: ArrayLike,
    window: int,
    stride: int,
    sequence_length: int | None = None,
    score_first_window: bool = True,
) -> Table:
    """Tokens that the scorer reads for each document, the sum of its windows' lengths: int64
    [documents]; 0 where ``document_windows`` finds nothing to score. O(1) per document."""
    check_windows(window, stride, sequence_length)

    def in_region(sizes: Table) -> Table:
        later, rest = _later_windows(sizes, window, stride)
        read = np.maximum(later - 1, 0) * window + np.minimum(rest, window)
        return np.where(sizes < 2, 0, read + score_first_window * np.minimum(sizes, window))

    lengths = np.asarray(lengths, dtype=np.int64)
    if sequence_length is None:
        return in_region(lengths)
    full, rest = np.divmod(np.maximum(lengths - 1, 0), sequence_length)
    return full * in_region(np.array(sequence_length + 1)) + in_region(rest + 1)


def _later_windows(sizes: Table, window: int, stride: int) -> tuple[Table, Table]:
    """Of regions of ``sizes`` tokens: how many windows follow the first, and how many tokens there
    are from the last of those on, up to window + 1 (0 if there are none)."""
    later = -(-np.maximum(sizes - 1 - window, 0) // stride)
    return later, np.where(later > 0, sizes - later * stride, 0)


def _region_sizes(lengths: Table, sequence_length: int | None) -> tuple[Table, Table]:
    """Sizes of the regions of all documents, and how often each occurs."""
    lengths, repeats = np.unique(lengths[lengths >= 2], return_counts=True)
    if sequence_length is None:
        return lengths, repeats
    full, rest = np.divmod(lengths - 1, sequence_length)
    sizes = np.append(rest[rest > 0] + 1, sequence_length + 1)
    return sizes, np.append(repeats[rest > 0], (full * repeats).sum())


def _sum_below(first: int, end: int | Table) -> int | Table:
    """first + … + (end - 1)."""
    return (end * (end - 1) - first * (first - 1)) // 2
