"""How the scoring of a corpus is split: windows into blocks, blocks into forwards and shards. Pure.

The order of all windows is that of the corpus. Their lengths are counted up, and every
``tokens_per_block`` tokens read a new *block* begins; a window belongs to the block in which it
begins. A *shard* is a run of blocks, so shards carry equal work, long documents are split between
them and short ones cost nothing. A *forward* is a batch of windows of one block, longest first.

So which windows share a forward, and the shape of that forward, follow from the lengths of the
documents and ``tokens_per_forward`` alone. The number of shards, ranks and restarts does not touch
the arithmetic (kernels may sum in another order when a batch has another shape), hence not one byte
of the result.
"""

from bisect import bisect_right
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from lctw_megatron.scoring.windows import (
    Table,
    Windowing,
    WindowStatistics,
    check_windows,
    document_windows,
    tokens_read,
    window_statistics,
)

FORWARDS_PER_BLOCK = 8
"""Full forwards in a block. More would leave fewer forwards partly filled (the last of each block)
and allow fewer shards."""

_CHUNK = 1 << 16  # documents whose lengths are in memory at a time


class WindowPlan:
    """All windows over documents of ``lengths`` (int32 [documents], a memory map too), in blocks.

    Making it reads the lengths once. Memory does not depend on their number; walking over a
    document takes about 200 bytes for each of its windows.
    """

    def __init__(
        self, lengths: NDArray[np.int32], windowing: Windowing, tokens_per_forward: int
    ) -> None:
        check_windows(windowing.window, windowing.stride, windowing.sequence_length)
        self.lengths = lengths
        self.windowing = windowing
        self.tokens_per_block = FORWARDS_PER_BLOCK * max(tokens_per_forward, windowing.window)
        self._chunk_begins = [0]  # tokens read before each chunk of documents
        parts = []
        for begin in range(0, len(lengths), _CHUNK):
            chunk = lengths[begin : begin + _CHUNK]
            parts.append(window_statistics(chunk, *windowing))
            self._chunk_begins.append(self._chunk_begins[-1] + parts[-1].tokens)
        self.statistics = _joined(parts)

    @property
    def tokens(self) -> int:
        """Tokens that the scorer reads."""
        return self._chunk_begins[-1]

    @property
    def blocks(self) -> int:
        return -(-self.tokens // self.tokens_per_block)

    def shard(self, number: int, shards: int) -> range:
        """The blocks of shard ``number`` of ``shards``."""
        return range(self.blocks * number // shards, self.blocks * (number + 1) // shards)

    def tokens_in(self, blocks: range) -> int:
        """About how many tokens the scorer reads for these blocks (to the last window)."""
        size = self.tokens_per_block
        return max(min(blocks.stop * size, self.tokens) - blocks.start * size, 0)

    def tables(self, blocks: range) -> Iterator[Table]:
        """The windows of each of these blocks that has any, in the order of the corpus: int64
        [windows, 5], columns document, start, end, score_start, score_end (tokens of the
        document)."""
        size = self.tokens_per_block
        first, stop = blocks.start * size, blocks.stop * size
        block = blocks.start
        waiting: list[Table] = []
        for document, begin in self._documents(first, stop):
            windows = document_windows(int(self.lengths[document]), *self.windowing)
            read = windows[:, 1] - windows[:, 0]
            position = begin + np.cumsum(read) - read
            inside = (position >= first) & (position < stop)
            windows = np.insert(windows[inside], 0, document, axis=1)
            number = position[inside] // size
            while len(number) and number[-1] > block:  # the block ends in this document
                cut = int(np.searchsorted(number, block, side="right"))
                yield np.concatenate([*waiting, windows[:cut]])
                windows, number, waiting, block = windows[cut:], number[cut:], [], block + 1
            waiting.append(windows)
        if any(len(part) for part in waiting):  # a last block that no window begins in is empty
            yield np.concatenate(waiting)

    def _documents(self, first: int, stop: int) -> Iterator[tuple[int, int]]:
        """Documents with windows among the tokens read [first, stop): (document, tokens read before
        it)."""
        chunk = bisect_right(self._chunk_begins, first) - 1
        for begin in range(chunk * _CHUNK, len(self.lengths), _CHUNK):
            before = self._chunk_begins[begin // _CHUNK]
            if before >= stop:
                return
            read = tokens_read(self.lengths[begin : begin + _CHUNK], *self.windowing)
            ends = before + np.cumsum(read)
            begins = ends - read
            for i in np.flatnonzero((read > 0) & (ends > first) & (begins < stop)):
                yield begin + int(i), int(begins[i])


def forwards(
    table: Table, tokens_per_forward: int, window: int, narrowest: int = 1
) -> Iterator[tuple[NDArray[np.int64], int]]:
    """The batches in which the windows of a block are run: (rows of ``table``, width).

    Longest windows first, so that little is padded. rows x width is at most ``tokens_per_forward``
    unless a single window is longer. No width is below ``narrowest``.
    """
    lengths = table[:, 2] - table[:, 1]
    order = np.argsort(-lengths, kind="stable")
    begin = 0
    while begin < len(order):
        width = min(max(round_width(int(lengths[order[begin]])), narrowest), window)
        rows, left = max(1, tokens_per_forward // width), len(order) - begin
        if rows > left:
            rows = 1 << (left.bit_length() - 1)
        yield order[begin : begin + rows], width
        begin += rows


def round_width(length: int) -> int:
    """``length`` rounded up to 64, 128, 192, 256, 384, 512, 768, ...: two widths per power of two.

    Like the powers of two in which the last windows of a block are run, this keeps the number of
    shapes small: on a GPU, kernels are compiled for every shape. It costs little, as most windows
    are of full length (documents of 1,800 tokens in the median, K = 2048, D = 512: four shapes,
    0.7 % of padding; all windows of up to 32k tokens: 39 shapes, 32 %).
    """
    step = max(1 << max((length - 1).bit_length() - 2, 0), 64)
    return -(-length // step) * step


def _joined(parts: list[WindowStatistics]) -> WindowStatistics:
    """The statistics of a corpus from those of its parts, exactly: contexts are whole numbers."""
    scored = sum(part.scored for part in parts)
    context = sum(round(part.mean_context * part.scored) for part in parts)
    return WindowStatistics(
        windows=sum(part.windows for part in parts),
        tokens=sum(part.tokens for part in parts),
        scored=scored,
        min_context=min((part.min_context for part in parts if part.scored), default=0),
        mean_context=context / scored if scored else 0.0,
    )
